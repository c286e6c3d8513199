"""Every method of docs/positions.md, pair by pair in float64.

Written from the formulas. Of an attention, only its arguments and its parameters are
read, so that gradients can be compared, too.
"""

import math

import torch


def seen(r, coords, side, trained):
    """What a relation sees of an offset along one axis."""
    if coords == 'scaled':
        return r * trained / side
    if coords == 'clamped':
        return min(max(r, 1 - trained), trained - 1)
    if coords == 'log':
        return math.copysign(math.log(1 + abs(r)), r)
    if coords == 'swinv2':
        r = 8 * r / max(trained - 1, 1)
        return math.copysign(math.log(1 + abs(r), 2) / math.log(8, 2), r)
    return r


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def hats(x, y, grid):
    """Bilinear weights (2H-1, 2W-1) of a table's entries at the offset (x, y)."""
    x = min(max(x, 1 - grid[1]), grid[1] - 1)
    y = min(max(y, 1 - grid[0]), grid[0] - 1)
    rows = [max(0.0, 1 - abs(y - b)) for b in range(1 - grid[0], grid[0])]
    columns = [max(0.0, 1 - abs(x - a)) for a in range(1 - grid[1], grid[1])]
    return torch.outer(
        torch.tensor(rows, dtype=torch.float64),
        torch.tensor(columns, dtype=torch.float64),
    )


def mlp(prior, p, h, x, y):
    names = ('w1', 'b1', 'w2', 'b2')
    w1, b1, w2, b2 = (p[n].unflatten(0, (prior.num_heads, -1))[h] for n in names)
    return w2[:, 0] @ (w1[:, 0] * x + w1[:, 1] * y + b1).clamp(min=0) + b2[0]


def linear(prior, p, h, x, y):
    return p['slope'][h, 0] * x + p['slope'][h, 1] * y + p['bias'][h]


def table(prior, p, h, x, y):
    return (p['table'][h] * hats(x, y, prior.grid)).sum()


def window(prior, p, h, x, y):
    if not prior.soft:
        return float(abs(x) < 1.5 and abs(y) < 1.5)
    away = [abs(r - p['shift'][2 * h + axis]) for axis, r in enumerate((x, y))]
    left = [p['half_size'][2 * h + axis] - away[axis] for axis in (0, 1)]
    s = p['log_sharpness'][h].exp()
    return sigmoid(s * left[0]) * sigmoid(s * left[1])


def log_cpb(prior, p, h, x, y):
    hidden = (p['w1'][:, 0] * x + p['w1'][:, 1] * y + p['b1']).clamp(min=0)
    return 1 + 16 * sigmoid(p['w2'][h] @ hidden) - 8


def alibi(prior, p, h, x, y):
    return 1 - 2 ** (-8 * (h + 1) / prior.num_heads) * math.hypot(x, y)


def kerple(prior, p, h, x, y):
    a, b = p['log_a'][h].exp(), p['log_p'][h].exp()
    return 1 - a * torch.log(1 + b * math.hypot(x, y))


# Degrees, turning from right to down.
ANGLES = {'right': 0, 'right-down': 45, 'down': 90, 'left-down': 135, 'left': 180}
ANGLES.update({'left-up': 225, 'up': 270, 'right-up': 315})
SIDES = ('right', 'left', 'down', 'up')
CORNERS = ('right-down', 'left-down', 'right-up', 'left-up')


def look_here_view(prior, h):
    """Where head h looks, and its slope: that of the n-th that sees all."""
    views = prior.views
    if len(views) % 12 == 0:
        each = len(views) // 12
        views = SIDES * each + CORNERS * each + ('all',) * 4 * each
    if views[h] != 'all':
        return views[h], 1 / 2
    return 'all', (1 / 2, 1 / 8, 1 / 32, 1 / 128)[views[:h].count('all') % 4]


def look_here(prior, p, h, x, y):
    return 1 - prior.layer_slope * look_here_view(prior, h)[1] * math.hypot(x, y)


def is_visible(prior, h, x, y):
    if not type(prior).__name__.startswith('LookHere') or x == y == 0:
        return True
    view = look_here_view(prior, h)[0]
    if view == 'all':
        return True
    away = (math.degrees(math.atan2(y, x)) - ANGLES[view] + 180) % 360 - 180
    return abs(away) <= prior.field_of_view / 2 + 1e-9


RELATIONS = dict(
    MLPSpatialPrior=mlp,
    LinearSpatialPrior=linear,
    TableSpatialPrior=table,
    WindowSpatialPrior=window,
    LogCPBSpatialPrior=log_cpb,
    ALiBiSpatialPrior=alibi,
    KERPLESpatialPrior=kerple,
    LookHereSpatialPrior=look_here,
    LookHereProduct=look_here,
)


def place(offset, coords, hw, trained, factors):
    """What a relation sees of an offset (x, y) in patches."""
    return [
        seen(offset[axis] * factors[axis], coords, hw[1 - axis], trained[1 - axis])
        for axis in (0, 1)
    ]


def relation(prior, p, h, offset, hw, factors):
    """f_h(r) of an offset r = (x, y) in patches."""
    x, y = place(offset, prior.coords, hw, prior.grid, factors)
    head = h if prior.num_heads > 1 else 0
    return RELATIONS[type(prior).__name__](prior, p, head, x, y)


def offset_of(here, there):
    """(x, y) of a key from its query, in patches; None with an extra token."""
    if here is None or there is None:
        return None
    return there[0] - here[0], there[1] - here[1]


def dot(q, k):
    """The plain score of a query and a key (B, d)."""
    return (q * k).sum(-1) / math.sqrt(q.shape[-1])


def score_with_prior(attn, p, h, q, k, here, there, hw, factors):
    score = dot(q, k) + p['score'][h] if 'score' in p else dot(q, k)
    offset = offset_of(here, there)
    if offset is None:
        return score
    if not is_visible(attn.prior, h, *offset):
        return torch.full_like(score, -math.inf)

    def value(name):
        own = {n[len(name) + 1 :]: v for n, v in p.items() if n.startswith(name + '.')}
        return relation(getattr(attn, name), own, h, offset, hw, factors)

    if attn.combine == 'add':
        return score + attn.strength * (value('prior') - 1)
    score = value('prior') * score
    if attn.combine == 'both':
        score = score + attn.strength * (value('bias_prior') - 1)
    return score


def rotated(x, attn, p, h, spot, hw, factors):
    """Channels (B, d) of a token at ``spot``, as d / 2 complex numbers, turned."""
    d = x.shape[-1]
    x = torch.complex(x[:, : d // 2], x[:, d // 2 :])
    if spot is None:
        return x
    if attn.mode == 'normalized':  # of the patch's centre, -1 .. 1 over the image
        spot = [2 * (spot[axis] + 0.5) / hw[1 - axis] - 1 for axis in (0, 1)]
        spot = [2 * math.pi * place for place in spot]
    x_place, y_place = (r * factor for r, factor in zip(spot, factors, strict=True))
    if attn.mode == 'mixed':
        fx, fy = p['freqs'].view(2, attn.num_heads, d // 2)[:, h]
        angle = fx * x_place + fy * y_place
    else:
        steps = [100 ** (-4 * t / d) for t in range(d // 4)]
        angle = [r * step for r in (x_place, y_place) for step in steps]
        angle = torch.tensor(angle, dtype=torch.float64)
    return x * torch.polar(torch.ones_like(angle), angle)


def score_with_rotation(attn, p, h, q, k, here, there, hw, factors):
    turned_q = rotated(q, attn, p, h, here, hw, factors)
    turned_k = rotated(k, attn, p, h, there, hw, factors)
    return (turned_q.conj() * turned_k).sum(-1).real / math.sqrt(q.shape[-1])


def score_with_table(attn, p, h, q, k, here, there, hw, factors):
    offset = offset_of(here, there)
    if offset is None:
        return dot(q, k)
    x, y = place(offset, attn.coords, hw, attn.grid, factors)
    entry = (p['table'][h] * hats(x, y, attn.grid)).sum((-2, -1))
    return dot(q, k) + (entry if attn.mode == 'bias' else dot(q, entry))


def plain_score(attn, p, h, q, k, here, there, hw, factors):
    return dot(q, k)


def mix(attn, p, h, weights, here, spots, factors):
    """PSA's mixture of a row (B, T) of the content attention with the position's."""
    extra = spots.count(None)
    v, position = p['position'][h], []
    for there in spots[extra:]:
        x, y = (r * f for r, f in zip(offset_of(here, there), factors, strict=True))
        position.append(v[0] * (x * x + y * y) + v[1] * x + v[2] * y)
    position = torch.stack(position).softmax(0)
    gate = sigmoid(p['gate'][h])
    patches = (1 - gate) * weights[:, extra:] + gate * position
    weights = torch.cat((weights[:, :extra], patches), dim=1)
    return weights / weights.sum(1, keepdim=True)


SCORES = dict(
    SpatialPriorAttention=score_with_prior,
    RotaryPositionAttention=score_with_rotation,
    RelativePositionAttention=score_with_table,
    GatedPositionalAttention=plain_score,
)


def attend(attn, p, x, hw, factors=(1, 1)):
    """What an attention makes of tokens (B, T, C).

    Args:
        attn (GridAttention): For its arguments.
        p (dict[str, Tensor]): Its parameters by name, float64.
        x (Tensor): (B, T, C), extra tokens in front.
        hw (tuple[int, int]): The grid (H, W).
        factors (tuple[float, float]): Of the coordinates x and y.

    Returns:
        Tensor: (B, T, C).
    """
    score = SCORES[type(attn).__name__]
    extra = x.shape[1] - hw[0] * hw[1]
    qkv = x @ p['qkv.weight'].T + p.get('qkv.bias', 0)
    patches = [(i % hw[1], i // hw[1]) for i in range(hw[0] * hw[1])]
    spots = [None] * extra + patches
    heads, split = [], qkv.unflatten(2, (3, attn.num_heads, -1)).permute(3, 2, 0, 1, 4)
    for h, (q, k, v) in enumerate(split):
        rows = []
        for i, here in enumerate(spots):
            scores = [
                score(attn, p, h, q[:, i], k[:, j], here, there, hw, factors)
                for j, there in enumerate(spots)
            ]
            weights = torch.stack(scores, dim=1).softmax(dim=1)
            if 'gate' in p and here is not None:
                weights = mix(attn, p, h, weights, here, spots, factors)
            rows.append((weights[..., None] * v).sum(1))
        heads.append(torch.stack(rows, dim=1))
    return torch.cat(heads, dim=2) @ p['proj.weight'].T + p['proj.bias']

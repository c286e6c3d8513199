import math

import pytest
import torch
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

from spvit_mm.models.heads import (
    TokenLabelClsHead,
    crop_label_maps,
    swap_tokens,
    token_label_targets,
)


def random_maps(batch, num_classes, hw, top_k=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, num_classes, *hw, generator=generator, dtype=dtype)
    values, ids = (3 * scores).topk(top_k, dim=1)
    return torch.stack((values, ids.to(dtype)), dim=1)


def naive_crop(label_map, view, num_classes, hw):
    """The definition, value by value: scatter, RoIAlign, softmax; (C, H, W)."""
    _, top_k, height, width = label_map.shape
    dense = torch.zeros(num_classes, height, width, dtype=torch.float64)
    for k in range(top_k):
        for i in range(height):
            for j in range(width):
                dense[int(label_map[1, k, i, j]), i, j] = label_map[0, k, i, j]

    left, top, right, bottom = view
    x1, x2 = min(left, right) * width - 0.5, max(left, right) * width - 0.5
    y1, y2 = min(top, bottom) * height - 0.5, max(top, bottom) * height - 0.5
    bin_h, bin_w = (y2 - y1) / hw[0], (x2 - x1) / hw[1]
    num_y, num_x = math.ceil(bin_h), math.ceil(bin_w)

    def sample(y, x):
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        i, j = min(int(y), height - 2), min(int(x), width - 2)
        dy, dx = y - i, x - j
        return (
            dense[:, i, j] * (1 - dy) * (1 - dx)
            + dense[:, i, j + 1] * (1 - dy) * dx
            + dense[:, i + 1, j] * dy * (1 - dx)
            + dense[:, i + 1, j + 1] * dy * dx
        )

    out = torch.zeros(num_classes, *hw, dtype=torch.float64)
    for i in range(hw[0]):
        for j in range(hw[1]):
            values = [
                sample(
                    y1 + (i + (sy + 0.5) / num_y) * bin_h,
                    x1 + (j + (sx + 0.5) / num_x) * bin_w,
                )
                for sy in range(num_y)
                for sx in range(num_x)
            ]
            out[:, i, j] = sum(values) / len(values)
    if left > right:
        out = out.flip(2)
    if top > bottom:
        out = out.flip(1)
    return out.softmax(dim=0)


VIEWS = [
    (0.0, 0.0, 1.0, 1.0),
    (0.1, 0.3, 0.62, 0.97),
    (0.9, 0.05, 0.2, 0.5),
    (0.4, 0.9, 0.75, 0.2),
]


@pytest.mark.parametrize('hw', [(1, 1), (3, 3), (2, 5), (9, 14)])
def test_crop_equals_the_definition(hw):
    maps = random_maps(len(VIEWS), 11, (6, 8))
    views = torch.tensor(VIEWS, dtype=torch.float64)
    got = crop_label_maps(maps, views, 11, hw)
    for i, view in enumerate(VIEWS):
        torch.testing.assert_close(
            got[i], naive_crop(maps[i], view, 11, hw), rtol=1e-12, atol=1e-12
        )


def test_the_crop_is_not_transposed():
    # Class 1 fills the right half of the image, class 0 the left one.
    label_map = torch.zeros(1, 2, 1, 4, 4)
    label_map[:, 0] = 10
    label_map[:, 1, :, :, 2:] = 1
    top = crop_label_maps(label_map, torch.tensor([[0.0, 0.0, 1.0, 0.5]]), 2, (2, 2))
    assert top[0].argmax(0).tolist() == [[0, 1], [0, 1]]
    right = crop_label_maps(label_map, torch.tensor([[0.6, 0.0, 1.0, 1.0]]), 2, (2, 2))
    assert right[0].argmax(0).tolist() == [[1, 1], [1, 1]]
    flipped = crop_label_maps(
        label_map, torch.tensor([[1.0, 0.0, 0.0, 1.0]]), 2, (2, 2)
    )
    assert flipped[0].argmax(0).tolist() == [[1, 0], [1, 0]]


def test_equals_the_released_call_but_for_the_order_of_the_box():
    from torchvision.ops import roi_align

    maps = random_maps(1, 20, (18, 18), dtype=torch.float32)
    view = torch.tensor([[0.2, 0.1, 0.9, 0.7]])
    dense = torch.zeros(1, 20, 18, 18).scatter_(1, maps[:, 1].long(), maps[:, 0])
    box = torch.cat((torch.zeros(1, 1), view * 18 - 0.5), dim=1)
    expected = roi_align(dense, box, (14, 14)).softmax(1)
    torch.testing.assert_close(crop_label_maps(maps, view, 20, (14, 14)), expected)


def test_targets_are_smoothed_as_published():
    maps = random_maps(len(VIEWS), 7, (5, 4))
    views = torch.tensor(VIEWS, dtype=torch.float64)
    cls, dense = token_label_targets(list(maps), views, 7, (2, 3), smoothing=0.1)
    on, off = 1 - 0.1 + 0.1 / 7, 0.1 / 7
    for i, view in enumerate(VIEWS):
        expected = naive_crop(maps[i], view, 7, (2, 3)).flatten(1).T * on + off
        torch.testing.assert_close(dense[i], expected)
        expected = naive_crop(maps[i], view, 7, (1, 1)).flatten() * on + off
        torch.testing.assert_close(cls[i], expected)


def test_maps_of_several_sizes_keep_their_places():
    small, large = random_maps(1, 7, (3, 3))[0], random_maps(1, 7, (6, 5), seed=1)[0]
    certain = torch.tensor([[[[1e4]]], [[[3.0]]]], dtype=torch.float64)
    views = torch.tensor(VIEWS[:3], dtype=torch.float64)
    cls, dense = token_label_targets([large, certain, small], views, 7, (2, 2), 0.0)
    torch.testing.assert_close(dense[1], torch.eye(7).double()[3].expand(4, 7))
    for i, label_map in ((0, large), (2, small)):
        expected = naive_crop(label_map, VIEWS[i], 7, (2, 2)).flatten(1).T
        torch.testing.assert_close(dense[i], expected)
        torch.testing.assert_close(
            cls[i], naive_crop(label_map, VIEWS[i], 7, (1, 1)).flatten()
        )


def samples_of(maps, views=None, **fields):
    samples = []
    for i, label_map in enumerate(maps):
        sample = DataSample(token_label=label_map)
        view = VIEWS[0] if views is None else views[i]
        sample.token_label_view = torch.tensor(view, dtype=torch.float32)
        sample.set_metainfo(fields)
        samples.append(sample)
    return samples


def soft_cross_entropy(scores, targets):
    """The definition, in float64, mean over all rows."""
    scores = scores.double()
    log_sum = torch.log(torch.exp(scores).sum(-1, keepdim=True))
    return -(targets.double() * (scores - log_sum)).sum(-1).mean()


@pytest.mark.parametrize('mixed', [False, True])
def test_loss_equals_the_definition(mixed):
    torch.manual_seed(0)
    head = TokenLabelClsHead(7, 16, dense_weight=0.5, cls_weight=2.0)
    feats = (torch.randn(4, 1 + 6, 16),)
    maps = random_maps(4, 7, (5, 4), dtype=torch.float32)
    mask = torch.tensor([0, 1, 1, 0, 0, 0], dtype=torch.bool) if mixed else None
    losses = head.loss(feats, samples_of(maps, VIEWS), hw=(2, 3), mix_mask=mask)

    on, off = 1 - 0.1 + 0.1 / 7, 0.1 / 7
    dense = torch.stack(
        [
            naive_crop(m.double(), v, 7, (2, 3)).flatten(1).T * on + off
            for m, v in zip(maps, VIEWS, strict=True)
        ]
    )
    cls = torch.stack(
        [
            naive_crop(m.double(), v, 7, (1, 1)).flatten() * on + off
            for m, v in zip(maps, VIEWS, strict=True)
        ]
    )
    scores = feats[0][:, 1:] @ head.aux_head.weight.T + head.aux_head.bias
    if mixed:
        lam = 1 - 2 / 6
        cls = lam * cls + (1 - lam) * cls.flip(0)
        scores = scores.clone()
        other = scores.flip(0)
        scores[:, 1:3] = other[:, 1:3]
    torch.testing.assert_close(
        losses['loss_dense'].double(), 0.5 * soft_cross_entropy(scores, dense)
    )
    cls_scores = feats[0][:, 0] @ head.layers.head.weight.T + head.layers.head.bias
    torch.testing.assert_close(
        losses['loss_cls'].double(), 2.0 * soft_cross_entropy(cls_scores, cls)
    )


def test_swap_tokens_is_its_own_inverse():
    x = torch.randn(5, 6, 3)
    mask = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.bool)
    swapped = swap_tokens(x, mask)
    assert torch.equal(swapped[1, mask], x[3, mask])
    assert torch.equal(swapped[1, ~mask], x[1, ~mask])
    assert torch.equal(swap_tokens(swapped, mask), x)


def test_test_scores():
    torch.manual_seed(0)
    head = TokenLabelClsHead(5, 8)
    feat = torch.randn(3, 1 + 6, 8)
    cls, aux = head.layers.head(feat[:, 0]), head.aux_head(feat[:, 1:])
    torch.testing.assert_close(head((feat,)), cls + 0.5 * aux.max(dim=1)[0])
    head.test_scores = 'cls'
    torch.testing.assert_close(head((feat,)), cls)


@pytest.mark.parametrize('shape', [(4, 7, 8), (4, 8)])
def test_without_label_maps(shape):
    torch.manual_seed(0)
    head = TokenLabelClsHead(5, 8, dense_weight=0)
    assert head.aux_head is None
    assert set(head.state_dict()) == {'layers.head.weight', 'layers.head.bias'}
    feat = torch.randn(shape)
    samples = [DataSample().set_gt_label(i) for i in range(4)]
    losses = head.loss((feat,), samples)
    assert set(losses) == {'loss_cls'}
    expected = torch.nn.functional.cross_entropy(
        head((feat,)), torch.arange(4), label_smoothing=0.1
    )
    torch.testing.assert_close(losses['loss_cls'], expected)


def test_parameter_names_and_initialization():
    head = MODELS.build(dict(type='TokenLabelClsHead', num_classes=5, in_channels=64))
    head.init_weights()
    assert set(head.state_dict()) == {
        'layers.head.weight',
        'layers.head.bias',
        'aux_head.weight',
        'aux_head.bias',
    }
    assert 0.01 < head.aux_head.weight.std() < 0.03
    assert not head.aux_head.bias.any()


def test_half_precision_scores_have_a_finite_loss():
    head = TokenLabelClsHead(7, 16).bfloat16()
    feats = (torch.randn(4, 1 + 6, 16, dtype=torch.bfloat16),)
    losses = head.loss(feats, samples_of(random_maps(4, 7, (5, 4)).half()), hw=(2, 3))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        (dict(dense_weight=-1), 'dense_weight'),
        (dict(cls_weight=-0.1), 'cls_weight'),
        (dict(label_smooth_val=1.0), 'label_smooth_val'),
        (dict(test_scores='dense'), "'dense'"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        TokenLabelClsHead(5, 8, **kwargs)


def test_bad_input():
    head = TokenLabelClsHead(5, 8)
    feats = (torch.randn(2, 1 + 6, 8),)
    maps = random_maps(2, 5, (4, 4))
    with pytest.raises(ValueError, match='2 of 2 data samples have no label map'):
        head.loss(feats, [DataSample().set_gt_label(0)] * 2, hw=(2, 3))
    mixed = [samples_of(maps)[0], DataSample().set_gt_label(0)]
    with pytest.raises(ValueError, match='1 of 2 data samples have no label map'):
        head.loss(feats, mixed, hw=(2, 3))
    with pytest.raises(ValueError, match='data set of 9 classes'):
        head.loss(feats, samples_of(maps, num_classes=9), hw=(2, 3))
    with pytest.raises(ValueError, match='6 patch tokens'):
        head.loss(feats, samples_of(maps), hw=(2, 4))
    with pytest.raises(ValueError, match=r'class ids 0..\d'):
        head.loss(feats, samples_of(random_maps(2, 9, (4, 4))), hw=(2, 3))
    with pytest.raises(ValueError, match='out_type'):
        head((torch.randn(2, 8, 3, 3),))
    with pytest.raises(ValueError, match='out_type'):
        head((torch.randn(2, 8),))

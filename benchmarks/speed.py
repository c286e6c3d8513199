"""Time and memory of attention with a spatial prior, as ratios to none.

Parts: ``layer``: q, k, v are given, and each kernel (with the prior's MLP in
front) stands beside ``sdpa`` (no prior: the floor) and ``naive`` (the formula as it
is written, with the MLP on all N x N pairs). ``model``: SP-ViT-S with each kernel
and in its deploy form beside the same skeleton without SP-SA layers (the floor), the
priors' values alone, mmpretrain's
VisionTransformer and SwinTransformer and timm's ViT with relative positions, all of
like size. ``start``: a new process that imports, builds DeiT-S, loads its checkpoint and
classifies the first image; mmpretrain's (the floor), ours with priors, and its deploy
form. ``positions``: every position method in the skeleton of SP-ViT-S beside none at all
(the floor), and in that of DeiT-S beside mmpretrain's VisionTransformer (their floor) and
timm's models of that size. ``sparse``: the skeleton of SP-ViT-S with layers that keep the
offsets within 7 patches beside the same without any (the floor), and one attention layer
so masked beside torch's own (its floor). ``growth``, which comes with it: that layer on
larger and larger grids, in time for 1,024 tokens. ``segment``: the segmentation of a picture
of 1024 x 2048 pixels by SP-ViT-S with UPerNet, before and after its layers are so masked.
``models``: every classifier that we ship, at the size of its config, one image and eight at a
time, with its deploy form.

Within one case the contestants take turns, so that a busy machine slows all of them;
medians over the rounds are reported, each taken with torch.utils.benchmark. Peak memory
is taken in a process of its own each. Prints tables, and writes them as CSV, as Markdown
and as a picture.

    python benchmarks/speed.py --short
    python benchmarks/speed.py --part layer --grids 14 24 32 48 64 --dtypes fp32 bf16
    python benchmarks/speed.py --part model --cases infer:14:8 infer:32:1 train:14:4
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measuring import (
    check_folder,
    resident_peak,
    run_apart,
    time_in_turns,
    write_csv,
    write_text,
)

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}
HEADS, HEAD_DIMS, HIDDEN, PATCH = 6, 64, 32, 16
# A value of one round is measured for this long, in seconds.
LEAST = 0.1
LAYERS = ('sdpa', 'eager', 'chunked', 'flex', 'naive')
MODELS = (
    'spvit-0spsa',
    'spvit-auto',
    'spvit-eager',
    'spvit-chunked',
    'spvit-flex',
    'spvit-deploy',
    'prior-values',
    'mmpretrain-vit',
    'mmpretrain-swin',
    'timm-relpos',
)
# Arguments of SPViT that give its layers a position.
POSITIONS = {
    'none': dict(num_spsa_layers=0),
    'product': dict(),
    'product with score': dict(attn_cfg=dict(init_score=2.0)),
    'sum': dict(attn_cfg=dict(combine='add')),
    'both': dict(attn_cfg=dict(combine='both')),
    'log-CPB': dict(
        prior=dict(type='LogCPBSpatialPrior'), attn_cfg=dict(combine='add')
    ),
    'ALiBi': dict(prior=dict(type='ALiBiSpatialPrior'), attn_cfg=dict(combine='add')),
    'KERPLE': dict(prior=dict(type='KERPLESpatialPrior'), attn_cfg=dict(combine='add')),
    'LookHere': dict(
        prior=dict(
            type='LookHereSpatialPrior',
            views=('right', 'left', 'down', 'up', 'all', 'all'),
        ),
        attn_cfg=dict(combine='add'),
    ),
    'bias table': dict(attn_cfg=dict(type='RelativePositionAttention')),
    'Shaw': dict(attn_cfg=dict(type='RelativePositionAttention', mode='embedding')),
    'PSA': dict(attn_cfg=dict(type='GatedPositionalAttention', init='random')),
    'rotary axial': dict(attn_cfg=dict(type='RotaryPositionAttention', mode='axial')),
    'rotary mixed': dict(attn_cfg=dict(type='RotaryPositionAttention')),
}
# In the shape of DeiT-S, beside models of others.
DEIT = ('none', 'product', 'sum', 'rotary axial', 'rotary mixed')
OTHERS = {
    'mmpretrain ViT': None,
    'timm DeiT': 'deit_small_patch16_224',
    'timm relative': 'vit_relpos_small_patch16_224',
    'timm rotary mixed': 'vit_small_patch16_rope_mixed_224',
    'timm ConViT': 'convit_small',
}
# What keeps the offsets within 7 patches: a mask alone, and a mask and a product.
SPARSE = {
    'none': dict(num_spsa_layers=0),
    'near keys': dict(
        prior=dict(type='WindowSpatialPrior', window=15, masked=True),
        attn_cfg=dict(combine='add'),
    ),
    'near keys, product': dict(
        prior=dict(type='WindowSpatialPrior', window=15, masked=True)
    ),
    'all keys, product': dict(),
}
NEAR = 7  # patches
# Sides of the grid.
GROWTH = {f'layer: near keys, {side**2} tokens': side for side in (32, 48, 64, 96, 128)}
SEGMENT = ('picture: all keys', 'picture: near keys')
SEGMENT_CONFIG = 'segmentation/spvit-small_upernet_4xb2-80k_cityscapes-512x1024.py'
SPARSE_LAYERS = ('layer: all keys', 'layer: near keys', 'layer: near keys, product')
# The classifiers of configs/classification/metafile.yml, small ones first.
SHIPPED = (
    'spvit-mini_1xb64-50e_digits',
    'spvit-mini_0spsa_1xb64-50e_digits',
    'sp-deit-tiny_1xb128-200e_cifar10',
    'sp-deit-tiny_1xb128-200e_cifar100',
    'sp-deit-tiny_4xb256_in100',
    'sp-deit-tiny_4xb256_in1k',
    'sp-deit-small_4xb256_in1k',
    'sp-deit-small_0spsa_4xb256_in1k',
    'sp-deit-small-9h_4xb256_in1k',
    'spvit-small_8xb128-300e_in1k',
    'spvit-medium_8xb128-300e_in1k',
    'sp-deit-base_16xb64_in1k',
    'spvit-large_8xb100-300e_in1k',
    'spvit-small_8xb32-ft-30e_in1k-384px',
    'spvit-medium_8xb16-ft-30e_in1k-384px',
    'spvit-large_8xb4-ft-30e_in1k-384px',
)
DEPLOY = ', deploy form'
# Images of one forward where as many as possible are wanted in a second.
MANY = 8
# What a new process does before its first result.
START = {
    'mmpretrain-vit': dict(type='VisionTransformer'),
    'sp-deit': dict(type='SPViT'),
    'sp-deit-deploy': dict(type='SPViT', deploy=True),
}


class Case(NamedTuple):
    """What is measured; the contestants of one case are compared."""

    part: str
    mode: str
    grid: int
    batch: int
    dtype: str
    device: str

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the grid; pictures to segment are twice as wide."""
        return self.grid, self.grid * (2 if self.part == 'segment' else 1)

    @property
    def tokens(self) -> int:
        rows, cols = self.sides
        return rows * cols


# --- contestants: each builder returns a function that does the work once


def build_layer(name: str, case: Case):
    """One attention layer between its projections, with its prior."""
    torch.manual_seed(0)
    train = case.mode == 'train'
    device, dtype = case.device, DTYPES[case.dtype]
    size, tokens = case.grid, case.tokens
    qkv = torch.randn(case.batch, tokens, 3 * HEADS * HEAD_DIMS, device=device)
    qkv = qkv.to(dtype).requires_grad_(train)
    grad = torch.randn(case.batch, tokens, HEADS * HEAD_DIMS, device=device).to(dtype)
    shapes = ((HEADS, HIDDEN, 2), (HEADS, HIDDEN, 1), (HEADS, 1, HIDDEN), (HEADS, 1, 1))
    weights = [
        (torch.randn(x, device=device) * 0.2).requires_grad_(train) for x in shapes
    ]
    axis = torch.arange(size, device=device, dtype=torch.float32)
    y, x = (a.flatten() for a in torch.meshgrid(axis, axis, indexing='ij'))
    steps = torch.arange(1 - size, size, device=device, dtype=torch.float32)
    dy, dx = (a.flatten() for a in torch.meshgrid(steps, steps, indexing='ij'))
    offsets = torch.stack([dx, dy])

    def mlp(coords):
        w1, b1, w2, b2 = weights
        return 1 + b2 + w2 @ (w1 @ coords + b1).relu()

    from spvit_mm.ops import spatial_prior_attention

    def attend():
        split = qkv.view(case.batch, tokens, 3, HEADS, HEAD_DIMS)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        if name == 'sdpa':
            return spatial_prior_attention(q, k, v, None, (size, size))
        if name == 'naive':
            pairs = torch.stack(
                [(x[None] - x[:, None]).flatten(), (y[None] - y[:, None]).flatten()]
            )
            omega = mlp(pairs).view(HEADS, tokens, tokens)
            logits = omega * (q @ k.transpose(-2, -1) * HEAD_DIMS**-0.5)
            return logits.softmax(-1).to(v.dtype) @ v
        table = mlp(offsets).view(HEADS, 2 * size - 1, 2 * size - 1)
        return spatial_prior_attention(q, k, v, table, (size, size), attn_impl=name)

    def run():
        with torch.set_grad_enabled(train):
            out = attend().transpose(1, 2).reshape(grad.shape)
            if train:
                leaves = [qkv] if name == 'sdpa' else [qkv, *weights]
                torch.autograd.grad(out, leaves, grad)

    return run


class PriorValues(torch.nn.Module):
    """What computing the values of all priors of a network costs."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.hw = net.patch_resolution
        self.priors = torch.nn.ModuleList(
            layer.attn.prior for layer in net.layers[: net.num_spsa_layers]
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([prior(self.hw) for prior in self.priors])


def build_network(name: str, case: Case) -> torch.nn.Module:
    """A network of the size of SP-ViT-S / DeiT-S for the case's image."""
    image = case.grid * PATCH
    if name == 'timm-relpos':
        import timm

        return timm.create_model(
            'vit_relpos_small_patch16_224', img_size=image, num_classes=0
        )
    if name == 'mmpretrain-vit':
        from mmpretrain.models import VisionTransformer

        return VisionTransformer(arch='deit-small', img_size=image, patch_size=PATCH)
    if name == 'mmpretrain-swin':
        from mmpretrain.models import SwinTransformer

        return SwinTransformer(arch='tiny', img_size=image, pad_small_map=True)
    from spvit_mm.models import SPViT

    kind = name.split('-')[1]
    if kind == '0spsa':
        return SPViT(arch='spvit-small', img_size=image, num_spsa_layers=0)
    if kind == 'deploy':
        return SPViT(arch='spvit-small', img_size=image, deploy=True)
    if kind == 'values':
        return PriorValues(SPViT(arch='spvit-small', img_size=image))
    attn_cfg = {'type': 'SpatialPriorAttention', 'attn_impl': kind}
    return SPViT(arch='spvit-small', img_size=image, attn_cfg=attn_cfg)


def build_positions(name: str, case: Case) -> torch.nn.Module:
    """SP-ViT-S, or DeiT-S after 'DeiT-S, ', with a position method, or another's."""
    image = case.grid * PATCH
    skeleton, _, method = name.rpartition(', ')
    if method in OTHERS:
        if OTHERS[method] is None:
            return build_network('mmpretrain-vit', case)
        import timm

        return timm.create_model(OTHERS[method], num_classes=0, img_size=image)
    from spvit_mm.models import SPViT

    arch = dict(arch='deit-small', num_spsa_layers=10) if skeleton else {}
    arch = arch or dict(arch='spvit-small')
    return SPViT(img_size=image, **{**arch, **POSITIONS[method]})


def near_offsets(hw: tuple[int, int]) -> torch.Tensor:
    """Which offsets lie within ``NEAR`` patches, (2H-1, 2W-1)."""
    rows, cols = (torch.arange(1 - side, side).abs() <= NEAR for side in hw)
    return rows[:, None] & cols


def build_growth(name: str, case: Case):
    """One attention layer over near keys, on the grid that its name says."""
    # 'auto' would take another kernel on the smallest grid.
    return build_sparse('layer: near keys', case._replace(grid=GROWTH[name]), 'local')


def build_segment(name: str, case: Case):
    """SP-ViT-S with UPerNet, its priors as they are or masked."""
    import mmseg.models  # noqa: F401
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS as REGISTRY
    from mmengine.registry import DefaultScope

    import spvit_mm  # noqa: F401

    torch.manual_seed(0)
    configs = Path(__file__).parents[1] / 'configs'
    cfg = Config.fromfile(str(configs / SEGMENT_CONFIG)).model
    masked = name == 'picture: near keys'
    cfg.backbone.update(
        img_size=[side * PATCH for side in case.sides], attn_cfg=dict(masked=masked)
    )
    with DefaultScope.overwrite_default_scope('mmseg'):
        net = revert_sync_batchnorm(REGISTRY.build(cfg)).to(case.device).eval()
    if masked:
        for layer in net.backbone.layers[: net.backbone.num_spsa_layers]:
            near = near_offsets(case.sides).expand(layer.attn.num_heads, -1, -1)
            layer.attn.set_kept(near)
    size = [side * PATCH for side in case.sides]
    images = torch.randn(case.batch, 3, *size, device=case.device)

    def run():
        with torch.inference_mode():
            net(images, mode='tensor')

    return run


def build_sparse(name: str, case: Case, attn_impl: str = 'auto'):
    """SP-ViT-S, or one attention layer, with what it keeps; the layer's kernel."""
    if name in SPARSE:
        from spvit_mm.models import SPViT

        image = case.grid * PATCH
        return work(SPViT(arch='spvit-small', img_size=image, **SPARSE[name]), case)
    from spvit_mm.ops import spatial_prior_attention

    torch.manual_seed(0)
    hw, train = (case.grid, case.grid), case.mode == 'train'
    qkv = torch.randn(case.batch, case.tokens, 3, HEADS, HEAD_DIMS, device=case.device)
    q, k, v = qkv.requires_grad_(train).permute(2, 0, 3, 1, 4).unbind(0)
    keep = near_offsets(hw)[None].to(case.device)
    prior = torch.rand(HEADS, *keep.shape[1:], device=case.device)
    prior.requires_grad_(train)
    tables = {
        'layer: all keys': dict(prior=None),
        'layer: near keys': dict(prior=None, keep=keep),
        'layer: near keys, product': dict(prior=prior, keep=keep),
    }

    def run():
        with torch.set_grad_enabled(train):
            out = spatial_prior_attention(
                q, k, v, hw=hw, attn_impl=attn_impl, **tables[name]
            )
            if train:
                torch.autograd.grad(out, [qkv], torch.ones_like(out), retain_graph=True)

    return run


def at_work(build: Callable) -> Callable:
    """From a contestant and a case to the work of the whole network that is built."""

    def run(name: str, case: Case):
        torch.manual_seed(0)
        return work(build(name, case), case)

    return run


def work(net: torch.nn.Module, case: Case):
    """A network's forward, or its forward, backward and one AdamW step."""
    net = net.to(case.device)
    image = case.grid * PATCH
    images = torch.randn(case.batch, 3, image, image, device=case.device)
    if case.mode == 'infer':
        net.eval()  # of mmpretrain it returns nothing
        return inference(net, images, case)
    half = case.dtype == 'bf16'
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)

    def step():
        with torch.autocast(case.device, torch.bfloat16, enabled=half):
            out = net(images)
        out = out[-1] if isinstance(out, (tuple, list)) else out
        F.mse_loss(out.float(), torch.zeros_like(out, dtype=torch.float32)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def inference(net: Callable, images: torch.Tensor, case: Case):
    """A network's forward."""

    def infer():
        with (
            torch.inference_mode(),
            torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == 'bf16'),
        ):
            net(images)

    return infer


# --- starting: run in processes of their own


def build_starter(name: str, side: int) -> torch.nn.Module:
    """DeiT-S for images of side x side tokens, from its config."""
    from mmpretrain.registry import MODELS as REGISTRY

    settings = dict(arch='deit-small', img_size=side * PATCH, patch_size=PATCH)
    return REGISTRY.build(START[name] | settings)


def start(name: str, side: int, path: str, cpu_time: bool) -> dict[str, float]:
    """Seconds of each step of a new process, up to its first result.

    A step happens once in a process, so the clock is read between them.
    """
    timer = time.process_time if cpu_time else time.perf_counter
    marks = [timer()]
    import mmpretrain  # noqa: F401

    if name != 'mmpretrain-vit':  # the floor is without us
        import spvit_mm  # noqa: F401
    from mmengine.runner import load_checkpoint

    marks.append(timer())
    net = build_starter(name, side)
    net.eval()
    marks.append(timer())
    load_checkpoint(net, path, strict=True, logger='silent')
    marks.append(timer())
    with torch.inference_mode():
        net(torch.zeros(1, 3, side * PATCH, side * PATCH))
    marks.append(timer())
    steps = ('import', 'build', 'load', 'first forward')
    return {s: b - a for s, a, b in zip(steps, marks, marks[1:], strict=False)}


def measure_start(case: Case, args) -> list[dict]:
    """Rows of the table of starts, one of all steps and one of each step."""
    import spvit_mm  # noqa: F401

    times = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in START:
            torch.manual_seed(0)
            net = build_starter(name, case.grid)
            torch.save({'state_dict': net.state_dict()}, f'{folder}/{name}.pth')
        for repeat in range(args.repeats + 1):
            for name in START:
                job = [name, case.grid, f'{folder}/{name}.pth', args.cpu_time]
                steps = in_own_process('--start-of', job, args)
                if repeat:  # the first round fills the caches of the disk
                    for step in (*steps, 'all'):
                        value = steps.get(step, sum(steps.values()))
                        times.setdefault((name, step), []).append(value)
    floor = PARTS['start'].floor
    return tabulate(case, times, lambda key: (floor, key[1]), {}, args)


# --- measuring


def peak_memory(name: str, case: Case) -> tuple[float, float]:
    """Megabytes at the peak of one run: in all, and above those before the run."""
    run = PARTS[case.part].build(name, case)
    if case.device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated()
        return peak / 2**20, (peak - before) / 2**20
    before = resident_peak(forget=True)
    run()
    peak = resident_peak()
    return peak, peak - before


def in_own_process(option: str, job: list, args):
    """What this script makes of a job in a process of its own."""
    return run_apart(__file__, '--threads', args.threads, option, json.dumps(job))


def measure(case: Case, args) -> list[dict]:
    """Rows of the table for one case."""
    # Here, since it imports much, and a process that is started is to be like a user's.
    from torch.utils.benchmark import Timer

    part = PARTS[case.part]
    clock = {'timer': time.process_time} if args.cpu_time else {}
    timers = {}
    for name in contestants(case, args):
        try:
            run = part.build(name, case)
            run()
        except (ImportError, ValueError) as error:
            # A missing benchmark-only package, or a kernel that cannot run here.
            print(f'  left out: {name}: {str(error).splitlines()[0]}', flush=True)
            continue
        timers[name] = Timer(
            'run()', globals={'run': run}, num_threads=args.threads, **clock
        )
    if not timers:
        return []
    times = time_in_turns(timers, args.repeats, LEAST)
    timers.clear()
    times = {n: [value / part.share(n) for value in times[n]] for n in times}
    memory = {}
    if args.memory and case.tokens >= args.memory_from:
        for name in times:
            memory[name] = in_own_process('--memory-of', [name, *case], args)
    floor_of = part.floor if callable(part.floor) else lambda _: part.floor
    return tabulate(case, times, floor_of, memory, args)


def build_shipped(name: str, case: Case) -> tuple[Case, int, dict]:
    """A shipped classifier at work on one image, on many, and in its deploy form.

    Returns:
        tuple: The case with the model's grid, the side of its images in pixels, and the
        work by (name, images at a time).
    """
    from mmpretrain import get_model

    import spvit_mm  # noqa: F401

    torch.manual_seed(0)
    model = get_model(name, device=case.device).eval()
    grid, side = model.backbone.patch_resolution, model.backbone.img_size
    case = case._replace(grid=grid[0])
    models = {name: model}
    if model.backbone.num_spsa_layers:
        deployed = copy.deepcopy(model)
        deployed.backbone.switch_to_deploy()
        models[name + DEPLOY] = deployed
    runs = {}
    for key, net in models.items():
        for batch in (1, MANY) if net is model else (1,):
            images = torch.randn(batch, 3, *side, device=case.device)
            logits = functools.partial(net, mode='tensor')
            runs[key, batch] = inference(logits, images, case)
    return case, side[0], runs


def measure_shipped(case: Case, args) -> list[dict]:
    """Rows of the shipped classifiers, of which one at a time is in memory."""
    from torch.utils.benchmark import Timer

    clock = {'timer': time.process_time} if args.cpu_time else {}
    rows = []
    print('\n'.join(shipped_table(rows)))
    for name in contestants(case, args):
        own, side, runs = build_shipped(name, case)
        timers = {
            key: Timer('run()', globals={'run': run}, num_threads=args.threads, **clock)
            for key, run in runs.items()
        }
        times = time_in_turns(timers, args.repeats, LEAST)
        for (key, batch), values in times.items():
            rounds = zip(values, times[name, batch], strict=True)
            nothing = float('nan')
            rows.append(
                {
                    **own._replace(batch=batch)._asdict(),
                    'tokens': own.tokens,
                    'px': side,
                    'name': key,
                    'ms': 1000 * statistics.median(values),
                    'ratio': statistics.median(a / b for a, b in rounds),
                    'peak_mb': nothing,
                    'peak_ratio': nothing,
                    'run_mb': nothing,
                }
            )
        print(shipped_table(rows)[-1], flush=True)
        del runs, timers  # before the next one is built
    return rows


def shipped_table(rows: list[dict]) -> list[str]:
    """A heading, and one line for each shipped classifier."""
    ms = {(row['name'], row['batch']): row['ms'] for row in rows}
    lines = [
        f'| | pixels | 1 image, ms | in its deploy form, ms | {MANY} at a time, images '
        'per second |',
        '| --- ' * 5 + '|',
    ]
    for row in rows:
        name = row['name']
        if row['batch'] == 1 and not name.endswith(DEPLOY):
            deployed = ms.get((name + DEPLOY, 1))
            deployed = '' if deployed is None else f'{deployed:.1f}'
            rate = 1000 * MANY / ms[name, MANY]
            rate = f'{rate:.1f}' if rate < 100 else f'{rate:.0f}'
            lines.append(
                f'| {name} | {row["px"]} | {row["ms"]:.1f} | {deployed} | {rate} |'
            )
    return lines


def tabulate(case: Case, times: dict, floor_of, memory: dict, args) -> list[dict]:
    """Medians of one case's times, printed as a table.

    Args:
        case (Case): The case.
        times (dict): Seconds of each round, by name or (name, step).
        floor_of (Callable): From a key of ``times`` to that of its floor.
        memory (dict): Megabytes by name: in all, and above those before the run.
        args (argparse.Namespace): The options.

    Returns:
        list[dict]: The rows.
    """
    print(
        f'\n{case.part} {case.mode}, {case.sides[0]} x {case.sides[1]} tokens, '
        f'batch {case.batch}, {case.dtype}, {case.device}'
    )
    print(f'  {"":30}{"ms":>10}{"ratio":>8}{"peak MB":>10}{"ratio":>8}{"run MB":>9}')
    nothing = (float('nan'), float('nan'))
    rows = []
    for key, values in times.items():
        floor = floor_of(key)
        # The ratio of each round, not of two medians: neighbours in time share load.
        rounds = zip(
            values, times.get(floor, [float('nan')] * len(values)), strict=True
        )
        peak, extra = memory.get(key, nothing)
        name = key if isinstance(key, str) else ', '.join(key)
        row = {
            **case._asdict(),
            'tokens': case.tokens,
            'px': case.grid * PATCH,
            'name': name,
            'ms': 1000 * statistics.median(values),
            'ratio': statistics.median(a / b for a, b in rounds),
            'peak_mb': peak,
            'peak_ratio': peak / memory.get(floor, nothing)[0],
            'run_mb': extra,
        }
        rows.append(row)
        print(
            f'  {name:30}{row["ms"]:10.2f}{row["ratio"]:8.2f}{peak:10.0f}'
            f'{row["peak_ratio"]:8.2f}{extra:9.0f}',
            flush=True,
        )
    return rows


def markdown(rows: list[dict], where: str) -> str:
    """All rows as tables, with what was run, when and on what."""
    lines = [f'`python {" ".join(sys.argv)}`, {date.today()}, {where}', '']
    heads = ('', 'ms', 'ratio to the floor', 'peak memory, MB', 'ratio')
    fields = (
        ('ms', '.1f'),
        ('ratio', '.2f'),
        ('peak_mb', '.0f'),
        ('peak_ratio', '.2f'),
    )
    shipped = [row for row in rows if row['part'] == 'models']
    for dtype in dict.fromkeys(row['dtype'] for row in shipped):
        mine = [row for row in shipped if row['dtype'] == dtype]
        lines += ['', f'**models, {dtype}**', '', *shipped_table(mine)]
    seen = None
    for row in rows:
        if row['part'] == 'models':
            continue
        case = Case(*(row[field] for field in Case._fields))
        if case != seen:
            seen = case
            height, width = (side * PATCH for side in case.sides)
            size = f'{height} px' if height == width else f'{height} x {width} px'
            lines += [
                '',
                f'**{case.part}, {case.mode}, {case.tokens} tokens ({size}), batch '
                f'{case.batch}, {case.dtype}, {case.device}**',
                '',
                '| ' + ' | '.join(heads) + ' |',
                '| --- ' * len(heads) + '|',
            ]
        values = [format(row[field], form) for field, form in fields]
        values = ['' if value == 'nan' else value for value in values]
        lines.append(f'| {row["name"]} | ' + ' | '.join(values) + ' |')
    return '\n'.join(lines) + '\n'


def slope(points: list[tuple[float, float]]) -> float:
    """Exponent p of the power law y = c * x^p that fits best in logarithms."""
    logs = torch.tensor(points, dtype=torch.float64).log()
    x, y = (logs - logs.mean(0)).T
    return float((x * y).sum() / (x * x).sum())


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory against tokens, on logarithmic axes, with fitted slopes."""
    from spvit_mm.utils import new_figure, save_figure

    kinds = {}
    for row in rows:
        if row['part'] == 'models':  # of other sizes, since they are other models
            continue
        kind = (row['part'], row['mode'], row['dtype'], row['batch'])
        kinds.setdefault(kind, []).append(row)
    kinds = {k: r for k, r in kinds.items() if len({x['tokens'] for x in r}) > 1}
    if not kinds:
        print('No case at two grids: no plot against tokens.')
        return
    fields = {'ms': 'time / ms', 'run_mb': 'memory of the run / MB'}
    figure = new_figure(12, 4 * len(kinds))
    axes = figure.subplots(len(kinds), 2, squeeze=False)
    for line, (kind, mine) in zip(axes, kinds.items(), strict=True):
        for axis, (field, label) in zip(line, fields.items(), strict=True):
            for name in dict.fromkeys(r['name'] for r in mine):
                points = [(r['tokens'], r[field]) for r in mine if r['name'] == name]
                points = sorted(p for p in points if p[1] > 0)  # NaN: not measured
                if len(points) > 1:
                    text = f'{name}, slope {slope(points):.2f}'
                    axis.loglog(*zip(*points, strict=True), marker='o', label=text)
            axis.set(xlabel='tokens', ylabel=label)
            axis.set_title('{} {}, {}, batch {}'.format(*kind))
            if axis.lines:
                axis.legend(fontsize=8)
    save_figure(figure, str(path), dpi=120)
    print(f'Wrote {path}')


# --- the parts


class Part(NamedTuple):
    """What ``--part`` names.

    Attributes:
        names (tuple): The contestants of each of its cases.
        floor (str | Callable): The one that the others' ratios are to, or a function
            from a contestant to its own.
        cases (Callable): From the options to its cases, small ones first.
        build (Callable, optional): From a contestant and a case to a function that does
            the work once, for ``measure``. Defaults to None.
        measure (Callable): From a case and the options to rows of the table.
        share (Callable): From a contestant to what its time is divided by.
    """

    names: tuple
    floor: str | Callable
    cases: Callable
    build: Callable | None
    measure: Callable = measure
    share: Callable = lambda name: 1


def layer_cases(args) -> list[Case]:
    return [
        Case('layer', mode, grid, 1, dtype, args.device)
        for dtype in args.dtypes
        for grid in args.grids
        for mode in ('infer', 'train')
    ]


def cases_of(part: str) -> Callable:
    """From the options to the cases that ``--cases`` names, of one part."""

    def cases(args) -> list[Case]:
        found = []
        for dtype in args.dtypes:
            for text in args.cases or CASES[part]:
                mode, grid, batch = text.split(':')
                case = Case(part, mode, int(grid), int(batch), dtype, args.device)
                found.append(case)
        return found

    return cases


def one_case(part: str, grid: int, device: str | None = None) -> Callable:
    """From the options to the only case of a part."""
    return lambda args: [Case(part, 'infer', grid, 1, 'fp32', device or args.device)]


def position_floor(name: str) -> str:
    return 'DeiT-S, mmpretrain ViT' if name.startswith('DeiT-S') else 'none'


def sparse_floor(name: str) -> str:
    return SPARSE_LAYERS[0] if name in SPARSE_LAYERS else 'none'


def measure_segment(case: Case, args) -> list[dict]:
    """Rows of the table of pictures, of which one takes long enough to be timed alone."""
    from timeit import Timer

    runs = {}
    for name in contestants(case, args):
        try:
            runs[name] = build_segment(name, case)
        except ImportError as error:
            print(f'  left out: {name}: {str(error).splitlines()[0]}', flush=True)
            return []
        runs[name]()  # the first is slower
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(Timer(run, timer=clock).timeit(1))
    runs.clear()
    memory = {}
    if args.memory:
        for name in times:
            memory[name] = in_own_process('--memory-of', [name, *case], args)
    return tabulate(case, times, lambda _: SEGMENT[0], memory, args)


def shipped_cases(args) -> list[Case]:
    # The grid is each model's own.
    return [Case('models', 'infer', 0, 1, dtype, args.device) for dtype in args.dtypes]


# As mode:side of the grid:batch.
CASES = {
    'model': ['infer:14:8', 'infer:32:1', 'train:14:4', 'infer:64:1'],
    'positions': ['infer:14:8', 'train:14:4', 'infer:32:1', 'train:32:1'],
    'sparse': ['infer:32:1', 'infer:64:1', 'train:32:1'],
}
PARTS = {
    'layer': Part(LAYERS, 'sdpa', layer_cases, build_layer),
    'model': Part(MODELS, 'spvit-0spsa', cases_of('model'), at_work(build_network)),
    'start': Part(
        tuple(START),
        'mmpretrain-vit',
        one_case('start', 14, 'cpu'),
        None,
        measure_start,
    ),
    'positions': Part(
        (*POSITIONS, *(f'DeiT-S, {name}' for name in (*OTHERS, *DEIT))),
        position_floor,
        cases_of('positions'),
        at_work(build_positions),
    ),
    'sparse': Part(
        (*SPARSE, *SPARSE_LAYERS), sparse_floor, cases_of('sparse'), build_sparse
    ),
    'models': Part(SHIPPED, lambda name: name, shipped_cases, None, measure_shipped),
    'growth': Part(
        tuple(GROWTH),
        next(iter(GROWTH)),
        one_case('growth', 32),
        build_growth,
        share=lambda name: GROWTH[name] ** 2 / 1024,
    ),
    'segment': Part(
        SEGMENT, SEGMENT[0], one_case('segment', 64), build_segment, measure_segment
    ),
}


# --- command line


def contestants(case: Case, args) -> list[str]:
    """Names of the case's part that are wanted and affordable."""
    names = PARTS[case.part].names
    # Flex is slower than eager on the CPU and takes minutes to compile.
    on_request = case.device == 'cpu' and not args.names
    skip = {
        'naive': case.tokens > args.max_naive,
        'eager': case.tokens > args.max_eager,
        'spvit-eager': case.tokens > args.max_eager or (args.short and not args.names),
        'flex': on_request,
        'spvit-flex': on_request,
        # The same kernel as auto there.
        'spvit-chunked': on_request,
    }
    return [n for n in names if n in (args.names or names) and not skip.get(n)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(name, text=None, **kwargs):
        parser.add_argument(name, help=text, **kwargs)

    usual = ['layer', 'model', 'start']
    add('--part', 'default: layer model start', nargs='+', choices=PARTS, default=usual)
    grids = [14, 24, 32, 48, 64]
    add('--grids', 'sides of the layer part', nargs='+', type=int, default=grids)
    text = 'of the parts model, positions and sparse, as mode:side of the grid:batch'
    add('--cases', text, nargs='+', default=[])
    add('--dtypes', nargs='+', choices=list(DTYPES), default=['fp32'])
    text = 'contestants; by default all that serve on the device'
    # The part `start` starts all of its contestants.
    names = [n for name, part in PARTS.items() if name != 'start' for n in part.names]
    add('--names', text, nargs='+', choices=list(dict.fromkeys(names)))
    add('--device', choices=['cpu', 'cuda'], default='cpu')
    add('--threads', type=int, default=torch.get_num_threads())
    add('--repeats', 'rounds (default: 7, or 4 of --short)', type=int)
    text = 'count CPU time with one thread, for a machine that others use as well'
    add('--cpu-time', text, action='store_true')
    text = 'most tokens for the naive formula, which takes a few kB a pair'
    add('--max-naive', text, type=int, default=1024)
    add('--max-eager', 'most tokens for eager', type=int, default=2304)
    add('--no-memory', dest='memory', action='store_false')
    add('--short', 'a run of under five minutes', action='store_true')
    add('--out-dir', type=Path, default=Path('work_dirs/speed'))
    add('--memory-of', argparse.SUPPRESS)
    add('--start-of', argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cpu_time:
        if args.device != 'cpu':
            parser.error('--cpu-time is for --device cpu')
        args.threads = 1
    if args.repeats is None:
        args.repeats = 4 if args.short else 7
    if 'sparse' in args.part and 'growth' not in args.part and not args.cases:
        args.part.append('growth')
    args.memory_from = 0
    if args.short:
        args.grids, args.memory_from = [14, 24, 32], 32**2
        args.cases = args.cases or CASES['model'][:3]
    for text in args.cases:
        mode, *numbers = text.split(':')
        whole = len(numbers) == 2 and all(x.isdigit() and int(x) for x in numbers)
        if mode not in ('infer', 'train') or not whole:
            parser.error(
                f'--cases takes mode:side:batch, such as infer:14:8, not {text!r}'
            )
    if args.repeats < 1 or args.threads < 1 or min(args.grids) < 1:
        parser.error('--repeats, --threads and --grids take numbers from 1 on')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no CUDA device; use --device cpu')
    if not args.memory_of and not args.start_of:
        check_folder(parser, args.out_dir)
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory_of:
        name, *case = json.loads(args.memory_of)
        print(json.dumps(peak_memory(name, Case(*case))))
        return
    if args.start_of:
        print(json.dumps(start(*json.loads(args.start_of))))
        return
    where = f'{args.threads} threads of {platform.machine()}'
    if args.device == 'cuda':
        where = torch.cuda.get_device_name()
    elif args.cpu_time:
        where += ', CPU time'
    where = f'torch {torch.__version__}, {where}'
    print(where)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.part:
        for case in PARTS[name].cases(args):
            rows += PARTS[name].measure(case, args)
            if rows:
                write_csv(args.out_dir / 'speed.csv', rows)
    text = markdown(rows, where)
    write_text(args.out_dir / 'speed.md', text)
    print(f'\n{text}\nWrote speed.csv and speed.md in {args.out_dir}')
    plot(rows, args.out_dir / 'speed.png')


if __name__ == '__main__':
    main()

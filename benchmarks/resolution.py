#!/usr/bin/env python
"""Train at one size, evaluate at others, with no fine-tuning.

Six ways for a small ViT to know position are trained at one size and evaluated at
0.5 to 4 times the tokens and at other aspect ratios:

    absolute       learned absolute embedding, resized
    none           no position at all
    peg            PEG after every layer
    prior-raw      SP-SA on patch offsets, as released
    prior-scaled   SP-SA on offsets scaled to the training grid
    prior-clamped  SP-SA on offsets clamped to those of the training grid

The three rules of SP-SA agree on the training grid, so one training serves them all;
they have no absolute embedding, and the four trainings start from one seed. Images are
resized; the scenes are also drawn on larger canvases, with digits of the same size.

    python benchmarks/resolution.py digits
    python benchmarks/resolution.py scenes --iters 1500
    python benchmarks/resolution.py cifar10 --data-root data/cifar10 --iters 1500

It prints a table, and writes it as CSV and PNG. A training that was evaluated before
is not repeated: the same command goes on where it was stopped.
"""

import argparse
import csv
import hashlib
import json
import time
from copy import deepcopy
from pathlib import Path
from statistics import mean, stdev

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, TestLoop

from spvit_mm.apis import ArgumentParser, run_cli
from spvit_mm.utils import UserError, new_figure

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
TASKS = {
    'digits': ('classification/spvit-mini_1xb64-50e_digits.py', 'accuracy/top1'),
    'scenes': (
        'segmentation/spvit-mini_upernet_1xb16-700i_digit-scenes-64x96.py',
        'mIoU',
    ),
    'cifar10': (
        'classification/spvit-mini_1xb64-10e_cifar10-5k.py',
        'accuracy/top1',
    ),
}
# Factors of height and width; tokens grow with their product.
SCALES = [(0.67, 0.67), (1, 1), (1.5, 1.5), (2, 2)]
ASPECTS = [(1, 2), (2, 1), (1, 3)]
TRAININGS = {
    'absolute': dict(num_spsa_layers=0, pos_embed='learned', with_peg=False),
    'none': dict(num_spsa_layers=0, pos_embed=None, with_peg=False),
    'peg': dict(num_spsa_layers=0, pos_embed=None, with_peg=True),
    'prior': dict(pos_embed=None, with_peg=False),
}
VARIANTS = {
    'absolute': ('absolute', None),
    'none': ('none', None),
    'peg': ('peg', None),
    'prior-raw': ('prior', 'raw'),
    'prior-scaled': ('prior', 'scaled'),
    'prior-clamped': ('prior', 'clamped'),
}


def sizes_of(base, patch):
    """The image sizes (h, w) to evaluate, in whole patches."""
    sizes = []
    for factors in SCALES + ASPECTS:
        grid = [
            max(1, round(side * f / patch))
            for side, f in zip(base, factors, strict=True)
        ]
        sizes.append((grid[0] * patch, grid[1] * patch))
    return sizes


def read_config(task, args):
    """The task's config with the length of training and the paths asked for."""
    name, metric = TASKS[task]
    cfg = Config.fromfile(str(CONFIGS / name))
    if cfg.train_cfg.get('by_epoch'):
        # Counted in iterations, so that all tasks are cut short alike.
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
        cfg.log_processor = dict(by_epoch=False)
        optimizer = cfg.optim_wrapper.optimizer
        cfg.param_scheduler = [
            dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=50),
            dict(
                type='CosineAnnealingLR',
                eta_min=optimizer.lr / 100,
                by_epoch=False,
                begin=50,
            ),
        ]
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=args.iters)
    cfg.param_scheduler[-1].end = args.iters
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=args.iters
    )
    cfg.log_level = 'WARNING'
    if args.data_root:
        for split in ('train', 'test'):
            cfg[f'{split}_dataloader'].dataset.data_root = str(args.data_root)
    # Without SP-SA layers, too, the class token joins where it does with them.
    backbone = cfg.model.backbone
    backbone.cls_token_layer = backbone.num_spsa_layers
    cfg.merge_from_dict(args.cfg_options or {})
    return cfg, metric


def test_config(cfg, task, kind, size):
    """The test loader's config at ``size`` (h, w): images resized, or a canvas."""
    loader = deepcopy(cfg.test_dataloader)
    pipeline = loader.dataset.pipeline
    resize = dict(type='Resize', scale=(size[1], size[0]))
    if kind == 'canvas':
        loader.dataset.sizes = size
    elif task == 'scenes':
        # Before the mask is loaded: the metric compares at the mask's own size.
        pipeline.insert(1, dict(**resize, keep_ratio=False))
    else:
        pipeline[:] = [p for p in pipeline if p.type != 'Resize']
        packing = len(pipeline) - 1
        pipeline.insert(packing, dict(**resize, interpolation='bicubic'))
        loader.batch_size = min(loader.batch_size, 64)
    return loader


def training_config(cfg, task, name, seed, args):
    """The config of one of TRAININGS."""
    cfg = deepcopy(cfg)
    overrides = dict(TRAININGS[name])
    if task == 'scenes' and not overrides['with_peg']:
        # PEG is position, and so is the padding of the convolution stem.
        overrides['stem'] = 'patch'
    cfg.model.backbone.update(overrides)
    cfg.randomness = dict(seed=seed)
    cfg.work_dir = str(args.work_dir / f'{task}-{name}-seed{seed}')
    cfg.experiment_name = f'{task}-{name}-{seed}-{args.iters}'
    return cfg


def evaluated(cfg, task, name, cases, metric):
    """Train one of TRAININGS and evaluate its VARIANTS, unless that was done before.

    Returns:
        dict: ``{variant: [value of each case]}``.

    Raises:
        UserError: If the folder holds the results of another config.
    """
    stamp = Path(cfg.work_dir) / 'results.json'
    text = cfg.pretty_text + repr(cases)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if stamp.exists():
        found = json.loads(stamp.read_text())
        if found['config'] != digest:
            raise UserError(
                f'{stamp} holds the results of other settings. Give another --work-dir, '
                'or remove that folder to run it anew.'
            )
        return found['values']
    runner = Runner.from_cfg(deepcopy(cfg))
    runner.train()
    trained, values = runner.model, {}
    for variant, (source, coords) in VARIANTS.items():
        if source != name:
            continue
        runner.model = with_rule(cfg, trained, coords) if coords else trained
        values[variant] = []
        for kind, size in cases:
            loader = test_config(cfg, task, kind, size)
            loop = TestLoop(runner, loader, deepcopy(cfg.test_evaluator))
            with torch.no_grad():
                values[variant].append(float(loop.run()[metric]))
    stamp.write_text(json.dumps(dict(config=digest, values=values)))
    return values


def with_rule(cfg, trained, coords):
    """The trained model, whose priors follow another rule on other grids."""
    from mmengine.registry import MODELS

    model = deepcopy(cfg.model)
    prior = model.backbone.get('prior') or dict(type='MLPSpatialPrior')
    model.backbone.prior = {**prior, 'coords': coords}
    if cfg.get('data_preprocessor'):
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(model)
    # Only the training grid is new, and it is the same.
    model.load_state_dict(trained.state_dict(), strict=coords == 'raw')
    return model.to(next(trained.parameters()).device).eval()


def main(argv):
    parser = ArgumentParser(
        prog='resolution.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('task', choices=TASKS)
    parser.add_argument('--iters', type=int, default=600, help='of each training')
    parser.add_argument('--seeds', type=int, default=1, help='trainings of each kind')
    parser.add_argument('--data-root', type=Path, help='folder of the data')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/resolution'))
    parser.add_argument('--out', type=Path, help='stem of the CSV and PNG')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='changes of the config'
    )
    args = parser.parse_args(argv)
    if args.iters < 51:
        raise UserError(f'--iters must be above 50, the warm-up, got {args.iters}.')
    if args.seeds < 1:
        raise UserError(f'--seeds must be at least 1, got {args.seeds}.')
    if args.task == 'cifar10':
        root = args.data_root
        if root is None or not all((root / x).is_dir() for x in ('train', 'test')):
            raise UserError(
                'cifar10 needs --data-root, a folder with train/CLASS/*.jpg and '
                f'test/CLASS/*.jpg, got {root}.'
            )
    out = args.out or Path(f'outputs/resolution-{args.task}')

    cfg, metric = read_config(args.task, args)
    init_default_scope(cfg.default_scope)
    base = cfg.model.backbone.img_size
    base = (base, base) if isinstance(base, int) else tuple(base)
    patch = cfg.model.backbone.patch_size
    sizes = sizes_of(base, patch)
    cases = [('resized', size) for size in sizes]
    if args.task == 'scenes':
        cases += [('canvas', size) for size in sizes if size != base]

    values = {name: [] for name in VARIANTS}
    todo = [(seed, name) for seed in range(args.seeds) for name in TRAININGS]
    start = time.time()
    for done, (seed, training) in enumerate(todo, 1):
        used = training_config(cfg, args.task, training, seed, args)
        found = evaluated(used, args.task, training, cases, metric)
        for name, row in found.items():
            values[name].append(row)
        left = (time.time() - start) / done * (len(todo) - done) / 60
        print(
            f'[{done}/{len(todo)}] seed {seed}: {", ".join(found)} done, '
            f'about {left:.0f} min left',
            flush=True,
        )
    report(args, out, metric, base, patch, cases, values)


def report(args, out, metric, base, patch, cases, values):
    """Print a table for each kind of case; write them as one CSV and PNG."""

    def cell(found):
        spread = f' ± {stdev(found):.1f}' if len(found) > 1 else ''
        return f'{mean(found):.1f}{spread}'

    kinds = list(dict.fromkeys(kind for kind, _ in cases))
    figure = new_figure(9 * len(kinds), 4.5)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    tokens = base[0] * base[1] / patch**2
    for kind, axis in zip(kinds, axes, strict=True):
        own = [i for i, case in enumerate(cases) if case[0] == kind]
        sizes = [cases[i][1] for i in own]
        print(
            f'\n{args.task}, {kind}: {metric}, trained at {base[0]} x {base[1]} for '
            f'{args.iters} iterations, {args.seeds} seed(s)\n'
        )
        heads = [f'{h}x{w} ({h * w / patch**2 / tokens:.2g}x)' for h, w in sizes]
        print('| position | ' + ' | '.join(heads) + ' |')
        print('| --- ' * (len(sizes) + 1) + '|')
        for name, rows in values.items():
            cells = [[row[i] for row in rows] for i in own]
            print(f'| {name} | ' + ' | '.join(map(cell, cells)) + ' |')
            axis.plot(
                range(len(own)), [mean(found) for found in cells], 'o-', label=name
            )
        axis.set_xticks(range(len(own)), heads, fontsize=8)
        axis.set_ylabel(metric)
        axis.set_xlabel('image at test (tokens relative to training)')
        axis.set_title(f'{args.task}, {kind}')
        axis.legend(fontsize=8)

    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix('.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['task', 'kind', 'position', 'height', 'width', 'seed', metric])
        for name, rows in values.items():
            for seed, row in enumerate(rows):
                for (kind, size), value in zip(cases, row, strict=True):
                    writer.writerow([args.task, kind, name, *size, seed, value])
    figure.savefig(out.with_suffix('.png'), dpi=110)
    print(f'\nWrote {out}.csv and {out}.png')


if __name__ == '__main__':
    run_cli(main, 'resolution.py')

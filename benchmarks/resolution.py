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

It prints a table, and writes it as CSV and PNG. What was trained or evaluated before is
not repeated: the same command goes on where it was stopped.
"""

import argparse
from pathlib import Path

import experiments
import numpy as np
from comparison import draw_values, values_table
from measuring import write_csv
from mmengine.config import DictAction

from spvit_mm.utils import check_new_file, new_figure, save_figure

CONFIGS = experiments.ROOT / 'configs'
TASKS = {
    'digits': ('classification/spvit-mini_1xb64-50e_digits.py', experiments.ACCURACY),
    'scenes': (
        'segmentation/spvit-mini_upernet_1xb16-700i_digit-scenes-64x96.py',
        'mIoU',
    ),
    'cifar10': (
        'classification/spvit-mini_1xb64-10e_cifar10-5k.py',
        experiments.ACCURACY,
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
    cfg = experiments.load_config(str(CONFIGS / TASKS[task][0]))
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
    cfg.default_hooks.checkpoint.update(
        by_epoch=False, interval=max(1, args.iters // 4), max_keep_ckpts=1
    )
    if args.data_root:
        for split in ('train', 'test'):
            cfg[f'{split}_dataloader'].dataset.data_root = str(args.data_root)
    # Without SP-SA layers, too, the class token joins where it does with them.
    backbone = cfg.model.backbone
    backbone.cls_token_layer = backbone.num_spsa_layers
    cfg.merge_from_dict(args.cfg_options or {})
    return cfg


def training_options(task, training):
    """What one of TRAININGS changes of the config."""
    options = dict(TRAININGS[training])
    if task == 'scenes' and not options['with_peg']:
        # PEG is position, and so is the padding of the convolution stem.
        options['stem'] = 'patch'
    return {f'model.backbone.{name}': value for name, value in options.items()}


def test_options(cfg, task, kind, size, coords):
    """The test at ``size`` (h, w): images resized, or a canvas; a rule for priors."""
    if kind == 'canvas':
        options = {'test_dataloader.dataset.sizes': size}
    elif task == 'scenes':
        # Before the mask is loaded: the metric compares at the mask's own size.
        resize = dict(type='Resize', scale=size[::-1], keep_ratio=False)
        load, *others = cfg.test_dataloader.dataset.pipeline
        options = {'test_dataloader.dataset.pipeline': [load, resize, *others]}
    else:
        options = experiments.resized(cfg, size)
    if coords:
        prior = cfg.model.backbone.get('prior') or dict(type='MLPSpatialPrior')
        options['model.backbone.prior'] = {**prior, 'coords': coords}
    return options


def plan(cfg, task, cases, seeds):
    """All runs, each with the tests of its variants; seeds outermost."""
    return [
        experiments.make_run(
            training,
            seed,
            cfg,
            training_options(task, training),
            {
                test_name(variant, case): test_options(cfg, task, *case, coords)
                for variant, (source, coords) in VARIANTS.items()
                if source == training
                for case in cases
            },
            metric=TASKS[task][1],
        )
        for seed in range(seeds)
        for training in TRAININGS
    ]


def test_name(variant, case):
    kind, (height, width) = case
    return f'{variant}, {kind} {height}x{width}'


def main(argv):
    parser = experiments.ArgumentParser(
        prog='resolution.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('task', choices=TASKS)
    parser.add_argument(
        '--iters',
        type=experiments.number(51),
        default=600,
        help='of each training, 50 of them warm-up',
    )
    parser.add_argument('--data-root', type=Path, help='folder of the data')
    parser.add_argument('--out', help='stem of the CSV and PNG')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='changes of the config'
    )
    experiments.add_run_options(parser, work_dir='work_dirs/resolution', seeds=1)
    args = parser.parse_args(argv)
    experiments.check_run_options(args)
    if args.out is None:
        args.out = f'outputs/resolution-{args.task}'
    out = Path(check_new_file(args.out, force=True))
    if args.task == 'cifar10':
        experiments.check_image_folders('--data-root', args.data_root, 'train', 'test')

    cfg = read_config(args.task, args)
    base = cfg.model.backbone.img_size
    base = (base, base) if isinstance(base, int) else tuple(base)
    patch = cfg.model.backbone.patch_size
    sizes = sizes_of(base, patch)
    cases = [('resized', size) for size in sizes]
    if args.task == 'scenes':
        cases += [('canvas', size) for size in sizes if size != base]

    runs = plan(cfg, args.task, cases, args.seeds)
    record = experiments.open_record(args, cfg)
    values = {}
    results = experiments.run_all(runs, args.work_dir, args.jobs, record)
    for run, result in zip(runs, results, strict=True):
        for name, metrics in experiments.tested(result, run).items():
            values.setdefault(name, []).append(metrics[run.metric])
    report(args, out, base, cases, values)


def report(args, out, base, cases, values):
    """Print a table for each kind of case; write them as one CSV and PNG."""
    metric = TASKS[args.task][1]
    kinds = list(dict.fromkeys(kind for kind, _ in cases))
    figure = new_figure(9 * len(kinds), 4.5)
    axes = figure.subplots(1, len(kinds), squeeze=False)[0]
    for kind, axis in zip(kinds, axes, strict=True):
        own = [case for case in cases if case[0] == kind]
        heads = [f'{h}x{w} ({h * w / np.prod(base):.2g}x)' for _, (h, w) in own]
        found = {v: [values[test_name(v, case)] for case in own] for v in VARIANTS}
        print(
            f'\n{args.task}, {kind}: {metric}, trained at {base[0]} x {base[1]} for '
            f'{args.iters} iterations, {args.seeds} seed(s)\n'
        )
        print(values_table(heads, found, 'position'))
        draw_values(axis, heads, found)
        axis.set_ylabel(metric)
        axis.set_xlabel('image at test (tokens relative to training)')
        axis.set_title(f'{args.task}, {kind}')
    rows = [
        dict(task=args.task, kind=kind, position=variant, height=h, width=w, seed=seed)
        | {metric: values[test_name(variant, (kind, (h, w)))][seed]}
        for variant in VARIANTS
        for seed in range(args.seeds)
        for kind, (h, w) in cases
    ]
    write_csv(Path(f'{out}.csv'), rows)
    save_figure(figure, f'{out}.png', dpi=110)
    print(f'\nWrote {out}.csv and {out}.png')


if __name__ == '__main__':
    experiments.run_cli(main, 'resolution.py')

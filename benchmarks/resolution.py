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
they have no absolute embedding, and the first four trainings start from one seed.

    python benchmarks/resolution.py digits
    python benchmarks/resolution.py scenes --iters 1500
    python benchmarks/resolution.py cifar10 --data-root data/cifar10 --iters 1500

It prints a table, and writes it as CSV and PNG.
"""

import argparse
import csv
from copy import deepcopy
from pathlib import Path
from statistics import mean, stdev

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner, TestLoop

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs'
TASKS = {
    'digits': ('classification/spvit-mini_1xb64-50e_digits.py', 'accuracy/top1'),
    'scenes': (
        'segmentation/spvit-mini_upernet_1xb16-700i_digit-scenes-64x96.py',
        'mIoU',
    ),
    'cifar10': (
        'classification/sp-deit-tiny_1xb128-200e_cifar10.py',
        'accuracy/top1',
    ),
}
NUM_CIFAR_TEST = 10_000
# Factors of height and width; tokens grow with their product.
SCALES = [(0.67, 0.67), (1, 1), (1.5, 1.5), (2, 2)]
ASPECTS = [(1, 2), (2, 1), (1, 3)]
VANILLA = dict(num_spsa_layers=0, cls_token_layer=None)
TRAININGS = {
    'absolute': dict(**VANILLA, pos_embed='learned', with_peg=False),
    'none': dict(**VANILLA, pos_embed=None, with_peg=False),
    'peg': dict(**VANILLA, pos_embed=None, with_peg=True),
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
    if task == 'cifar10':
        # Under 1 M parameters and every fifth test image: hours become minutes.
        cfg.model.backbone.arch = dict(
            embed_dims=96, num_layers=6, num_heads=3, feedforward_channels=192
        )
        cfg.model.backbone.num_spsa_layers = 4
        cfg.model.backbone.drop_path_rate = 0.0
        cfg.model.head.in_channels = 96
    for split in ('train', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        if task == 'cifar10':
            pipeline = [dict(type='LoadImageFromFile'), *dataset.pipeline]
            cfg[f'{split}_dataloader'].dataset = dict(
                type='CustomDataset', data_prefix=split, pipeline=pipeline
            )
            cfg.data_preprocessor.to_rgb = True
            if split == 'test':
                dataset = cfg.test_dataloader.dataset
                dataset.indices = list(range(0, NUM_CIFAR_TEST, 5))
        if args.data_root:
            cfg[f'{split}_dataloader'].dataset.data_root = str(args.data_root)
    return cfg, metric


def test_config(cfg, task, size):
    """The test loader's config with its images resized to ``size`` (h, w)."""
    loader = deepcopy(cfg.test_dataloader)
    pipeline = loader.dataset.pipeline
    resize = dict(type='Resize', scale=(size[1], size[0]))
    if task == 'scenes':
        # Before the mask is loaded: the metric compares at the mask's own size.
        pipeline.insert(1, dict(**resize, keep_ratio=False))
    else:
        pipeline[:] = [p for p in pipeline if p.type != 'Resize']
        packing = len(pipeline) - 1
        pipeline.insert(packing, dict(**resize, interpolation='bicubic'))
        if task == 'cifar10' and size[0] * size[1] > 1600:
            loader.batch_size = min(loader.batch_size, 64)
    return loader


def train(cfg, task, name, seed, args):
    """Train one of TRAININGS; the runner, with the trained model."""
    cfg = deepcopy(cfg)
    overrides = dict(TRAININGS[name])
    if task == 'scenes' and not overrides['with_peg']:
        # PEG is position, and so is the padding of the convolution stem.
        overrides['stem'] = 'patch'
    cfg.model.backbone.update(overrides)
    cfg.randomness = dict(seed=seed)
    cfg.work_dir = str(args.work_dir / f'{task}-{name}-seed{seed}')
    cfg.experiment_name = f'{task}-{name}-{seed}-{args.iters}'
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner, cfg


def with_rule(cfg, trained, coords):
    """The trained model, whose priors follow another rule on other grids."""
    from mmengine.registry import MODELS

    model = deepcopy(cfg.model)
    prior = model.backbone.get('prior') or dict(type='MLPSpatialPrior')
    model.backbone.prior = {**prior, 'coords': coords}
    if cfg.get('data_preprocessor'):
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(model)
    model.load_state_dict(trained.state_dict(), strict=coords == 'raw')
    return model.to(next(trained.parameters()).device).eval()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('task', choices=TASKS)
    parser.add_argument('--iters', type=int, default=600, help='of each training')
    parser.add_argument('--seeds', type=int, default=1, help='trainings of each kind')
    parser.add_argument('--data-root', type=Path, help='folder of the data')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/resolution'))
    parser.add_argument('--out', type=Path, help='stem of the CSV and PNG')
    args = parser.parse_args()
    if args.iters < 51:
        parser.error(f'--iters must be above 50, the warm-up, got {args.iters}')
    if args.seeds < 1:
        parser.error(f'--seeds must be at least 1, got {args.seeds}')
    if args.task == 'cifar10' and args.data_root is None:
        parser.error(
            'cifar10 needs --data-root, a folder with train/CLASS/*.jpg and test/CLASS/*.jpg'
        )
    out = args.out or Path(f'outputs/resolution-{args.task}')

    import spvit_mm  # noqa: F401

    cfg, metric = read_config(args.task, args)
    init_default_scope(cfg.default_scope)
    base = cfg.model.backbone.img_size
    base = (base, base) if isinstance(base, int) else tuple(base)
    patch = cfg.model.backbone.patch_size
    sizes = sizes_of(base, patch)

    values = {name: {size: [] for size in sizes} for name in VARIANTS}
    for seed in range(args.seeds):
        for training in TRAININGS:
            runner, used = train(cfg, args.task, training, seed, args)
            trained = runner.model
            for name, (source, coords) in VARIANTS.items():
                if source != training:
                    continue
                model = with_rule(used, trained, coords) if coords else trained
                runner.model = model
                for size in sizes:
                    loader = test_config(used, args.task, size)
                    loop = TestLoop(runner, loader, deepcopy(used.test_evaluator))
                    with torch.no_grad():
                        values[name][size].append(loop.run()[metric])
                print(f'seed {seed}: {name} done', flush=True)

    report(args, out, metric, base, patch, values)


def report(args, out, metric, base, patch, values):
    """Print the table; write it as CSV and PNG."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    def cell(found):
        spread = f' ± {stdev(found):.1f}' if len(found) > 1 else ''
        return f'{mean(found):.1f}{spread}'

    sizes = list(next(iter(values.values())))
    print(
        f'\n{args.task}: {metric}, trained at {base[0]} x {base[1]} for {args.iters} '
        f'iterations, {args.seeds} seed(s)\n'
    )
    tokens = base[0] * base[1] / patch**2
    heads = [f'{h}x{w} ({h * w / patch**2 / tokens:.2g}x)' for h, w in sizes]
    print('| position | ' + ' | '.join(heads) + ' |')
    print('| --- ' * (len(sizes) + 1) + '|')
    for name, row in values.items():
        print(f'| {name} | ' + ' | '.join(cell(row[s]) for s in sizes) + ' |')

    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix('.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['task', 'position', 'height', 'width', 'seed', metric])
        for name, row in values.items():
            for (height, width), found in row.items():
                for seed, value in enumerate(found):
                    writer.writerow([args.task, name, height, width, seed, value])
    figure, axis = plt.subplots(figsize=(9, 4.5), layout='constrained')
    for name, row in values.items():
        axis.plot(range(len(sizes)), [mean(row[s]) for s in sizes], 'o-', label=name)
    axis.set_xticks(range(len(sizes)), heads, fontsize=8)
    axis.axvline(len(SCALES) - 0.5, color='grey', linewidth=0.5)
    axis.set_ylabel(metric)
    axis.set_xlabel('image at test (tokens relative to training)')
    axis.legend(fontsize=8)
    figure.savefig(out.with_suffix('.png'), dpi=130)
    print(f'\nWrote {out}.csv and {out}.png')


if __name__ == '__main__':
    main()

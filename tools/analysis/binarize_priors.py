#!/usr/bin/env python
"""Keep for every head the offsets with the largest prior, or those of the most attention
(--by), mask the others, and measure the accuracy against what is kept; with --finetune also
after some epochs. Where a layer multiplies by one prior and adds another, the one that
multiplies ranks. tools/model_converters/sparsify_priors.py writes one such model."""

import argparse
import os.path as osp
from copy import deepcopy
from itertools import islice

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='binarize_priors.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument(
        '--keep',
        type=number(0, 1, float, above=True),
        nargs='+',
        default=[1.0, 0.8, 0.6, 0.4, 0.2, 0.1],
        help='shares to keep, each in (0, 1] (default: 1 0.8 0.6 0.4 0.2 0.1)',
    )
    parser.add_argument(
        '--by',
        choices=['offsets', 'mass', 'fewest', 'window'],
        default='offsets',
        help='offsets, mass: of the largest prior, until they are that share of the '
        'offsets or of the attention; fewest, window: of the attention, by the fewest '
        'offsets or the smallest rectangle that hold it (default: offsets)',
    )
    parser.add_argument(
        '--ones',
        action='store_true',
        help='prior 1 at the kept offsets (default: the learned one)',
    )
    parser.add_argument(
        '--finetune',
        type=number(0),
        default=0,
        metavar='EPOCHS',
        help='also fine-tune each for these epochs of the training data (default: 0)',
    )
    parser.add_argument(
        '--lr-factor',
        type=number(0, kind=float, above=True),
        default=0.1,
        help='learning rate of the fine-tuning over that of the config (default: 0.1)',
    )
    parser.add_argument(
        '--mass-batches',
        type=number(1),
        default=4,
        help='batches of the training data to measure the attention on (default: 4)',
    )
    parser.add_argument(
        '--time',
        action='store_true',
        help='also the kept share of all pairs, what near keys cost on the CPU as a share '
        'of them, and the time of a forward of one image over that of the model as it is',
    )
    parser.add_argument(
        '--out', help='the PNG (default: binarized.png beside the checkpoint)'
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    parser.check_paths([args.config], [args.checkpoint])
    return args


def main(argv: list) -> None:
    from mmengine.device import get_device
    from mmengine.runner import Runner

    from spvit_mm.apis import (
        beside,
        building,
        check_entries,
        load_config,
        load_trained_model,
    )
    from spvit_mm.apis import sparsify as api
    from spvit_mm.apis.train import set_precision
    from spvit_mm.explain import offset_mass, sparsify, why_no_priors
    from spvit_mm.explain.binarize import mean_kept
    from spvit_mm.utils import (
        UserError,
        check_new_file,
        first_not_finite,
        save_figure,
        write_csv,
    )

    args = parse_args(argv)
    if args.out is None:
        args.out = beside(args.checkpoint, 'binarized.png')
    out = check_new_file(args.out, ('.png',), force=True)
    cfg = load_config(args.config, args.cfg_options)
    model, _ = load_trained_model(cfg, args.checkpoint)
    missing = why_no_priors(model)
    if missing:
        raise UserError(missing)
    needed = ('test_dataloader', 'train_dataloader')
    check_entries(cfg, (*needed, 'optim_wrapper') if args.finetune else needed)
    if args.finetune:
        tuning = api.finetune_config(cfg, args.finetune, args.lr_factor).optim_wrapper
        set_precision(tuning)
    model.to(get_device())
    cfg.test_evaluator = cfg.get('test_evaluator') or dict(type='Accuracy', topk=(1,))
    test = api.evaluation_data(cfg)
    if args.finetune:
        with building(f'The training data of {args.config}'):
            train = Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=0)
    images = list(api.training_images(cfg, model, args.mass_batches))
    masses, _ = offset_mass(model, images)
    example = images[0][:1]
    wrong = first_not_finite((name, m.mass) for name, m in masses.items())
    if wrong:
        raise UserError(
            f'The attention of {wrong} is nan or infinite for images of the training '
            'data. Check them, and mean and std of data_preprocessor.'
        )

    rows = []
    for share in sorted(args.keep, reverse=True):
        one = deepcopy(model)
        kept = sparsify(one, masses, share, args.by, args.ones)
        offsets, pairs, mass = mean_kept(kept)
        metric, value = api.evaluate(one, *test)
        row = [share, offsets, mass, value / 100]
        if args.finetune:
            finetune(one, train, tuning, args)
            row.append(api.evaluate(one, *test)[1] / 100)
        if args.time:
            old, new = api.time_forwards([model, one], example)
            computed = sum(layer.computed for layer in kept) / len(kept)
            row += [pairs, computed, new / old]
        if not rows:
            header = ['keep', 'offsets', 'mass']
            header += ['accuracy' if metric == 'accuracy/top1' else metric]
            header += ['finetuned'] if args.finetune else []
            header += ['pairs', 'computed', 'time'] if args.time else []
            print('  '.join(f'{name:>9}' for name in header))
        rows.append(row)
        print('  '.join(f'{value:9.4f}' for value in row), flush=True)
    save_figure(draw(header, rows, args.by), out, dpi=120)
    table = osp.splitext(out)[0] + '.csv'
    write_csv(table, [header, *([f'{value:.6g}' for value in row] for row in rows)])
    print(f'Written: {out} and {table}')


def finetune(model, loader, settings, args):
    """Train for a few epochs at a constant learning rate."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.runner import set_random_seed

    from spvit_mm.apis import sparsify as api
    from spvit_mm.utils import with_progress

    set_random_seed(0)
    with api.quiet():  # it names every parameter that is not decayed
        wrapper = build_optim_wrapper(model, settings)
    model.train()
    for epoch in range(args.finetune):
        if hasattr(loader.sampler, 'set_epoch'):  # the order of the next epoch
            loader.sampler.set_epoch(epoch)
        # An InfiniteSampler has no end.
        for batch in with_progress(islice(loader, len(loader)), len(loader)):
            model.train_step(batch, wrapper)


def draw(header, rows, by):
    """Accuracy, or what else the test measures, against the kept share."""
    from spvit_mm.utils import new_figure

    figure = new_figure(5, 3.6)
    ax = figure.subplots()
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    x = columns['offsets' if by == 'offsets' else 'mass']
    ax.plot(x, columns[header[3]], 'o-', label='as it is')
    if 'finetuned' in columns:
        ax.plot(x, columns['finetuned'], 's--', label='fine-tuned')
        ax.legend()
    what = 'offsets' if by == 'offsets' else 'attention mass'
    ax.set_xlabel(f'share of the {what} that is kept')
    ax.set_ylabel(header[3])
    ax.grid(alpha=0.3)
    return figure


if __name__ == '__main__':
    start(parse_args, main, 'binarize_priors.py')

#!/usr/bin/env python
"""Keep for every head the offsets with the largest prior, mask the others, and
measure the accuracy against what is kept; with --finetune also after some epochs. Where
a layer multiplies by one prior and adds another, the one that multiplies ranks."""

import os.path as osp
from copy import deepcopy

import torch
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner, set_random_seed

from spvit_mm.apis import (
    ArgumentParser,
    beside,
    building,
    check_entries,
    load_classifier,
    number,
    run_cli,
)
from spvit_mm.explain import binarize, offset_mass, why_no_priors
from spvit_mm.explain.binarize import CRITERIA
from spvit_mm.utils import (
    UserError,
    check_new_picture,
    first_not_finite,
    new_figure,
    save_figure,
    with_progress,
    write_csv,
)


def main(argv: list) -> None:
    parser = ArgumentParser(prog='binarize_priors.py', description=__doc__)
    parser.add_argument('config', help='path of the config of a classifier')
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
        choices=CRITERIA,
        default='offsets',
        help='share of the offsets, or of the attention mass (default: offsets)',
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
        '--out', help='the PNG (default: binarized.png beside the checkpoint)'
    )
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = beside(args.checkpoint, 'binarized.png')
    out = check_new_picture(args.out)
    cfg, model = load_classifier(args.config, args.checkpoint)
    missing = why_no_priors(model)
    if missing:
        raise UserError(missing)
    needed = ('test_dataloader', 'train_dataloader')
    check_entries(cfg, (*needed, 'optim_wrapper') if args.finetune else needed)
    model.to(get_device())
    with building(f'The data of {args.config}'):
        test = Runner.build_dataloader(deepcopy(cfg.test_dataloader), seed=0)
        train = Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=0)
    set_random_seed(0)  # for the augmentation of the images below
    images = (
        model.data_preprocessor(batch, False)['inputs']
        for batch, _ in zip(train, range(args.mass_batches), strict=False)
    )
    masses, grid = offset_mass(model, images)
    wrong = first_not_finite((name, m.mass) for name, m in masses.items())
    if wrong:
        raise UserError(
            f'The attention of {wrong} is nan or infinite for images of the training '
            'data. Check them, and mean and std of data_preprocessor.'
        )

    header = ['keep', 'offsets', 'mass', 'accuracy']
    header += ['finetuned'] if args.finetune else []
    print('  '.join(f'{name:>9}' for name in header))
    rows = []
    for share in sorted(args.keep, reverse=True):
        one = deepcopy(model)
        kept = binarize(one, masses, grid, share, args.by, args.ones)
        row = [share, *kept, accuracy(one, test)]
        if args.finetune:
            finetune(one, train, cfg.optim_wrapper, args)
            row.append(accuracy(one, test))
        rows.append(row)
        print('  '.join(f'{value:9.4f}' for value in row), flush=True)
    save_figure(draw(header, rows, args.by), out, dpi=120)
    table = osp.splitext(out)[0] + '.csv'
    write_csv(table, [header, *([f'{value:.6g}' for value in row] for row in rows)])
    print(f'Written: {out} and {table}')


@torch.no_grad()
def accuracy(model, loader):
    """Top-1 accuracy of a classifier, in eval mode."""
    model.eval()
    right = [
        bool((sample.pred_label == sample.gt_label).all())
        for batch in with_progress(loader)
        for sample in model.test_step(batch)
    ]
    return sum(right) / len(right)


def finetune(model, loader, settings, args):
    """Train for a few epochs at a constant, lower learning rate."""
    settings = deepcopy(settings)
    settings.optimizer.lr *= args.lr_factor
    set_random_seed(0)
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')  # it names every parameter that is not decayed
    wrapper = build_optim_wrapper(model, settings)
    logger.setLevel(level)
    model.train()
    for _ in range(args.finetune):
        for batch in with_progress(loader):
            model.train_step(batch, wrapper)


def draw(header, rows, by):
    """Accuracy against the kept share."""
    figure = new_figure(5, 3.6)
    ax = figure.subplots()
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    ax.plot(columns[by], columns['accuracy'], 'o-', label='as it is')
    if 'finetuned' in columns:
        ax.plot(columns[by], columns['finetuned'], 's--', label='fine-tuned')
        ax.legend()
    what = 'offsets' if by == 'offsets' else 'attention mass'
    ax.set_xlabel(f'share of the {what} that is kept')
    ax.set_ylabel('accuracy')
    ax.grid(alpha=0.3)
    return figure


if __name__ == '__main__':
    run_cli(main, 'binarize_priors.py')

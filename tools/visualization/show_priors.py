#!/usr/bin/env python
"""Draw the spatial priors of every SP-SA layer and head into one PNG, and say in
numbers what each head looks for. Several checkpoints of one training make a strip, or
an animation where --out ends in .gif."""

import argparse
import os.path as osp

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='show_priors.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        'checkpoint',
        nargs='+',
        help='path of the checkpoint, or of several in order: a column or a frame '
        'for each',
    )
    parser.add_argument(
        '--compare',
        nargs=2,
        metavar=('CONFIG', 'CHECKPOINT'),
        help='a second model, side by side with the first; --cfg-options changes both '
        'configs',
    )
    parser.add_argument(
        '--out',
        help='the .png to write, or the .gif: a frame for each checkpoint (default: '
        'priors.png beside the last checkpoint); the numbers of the last checkpoint go '
        'into a CSV of the same name',
    )
    parser.add_argument(
        '--grid',
        type=number(1),
        nargs=2,
        metavar=('H', 'W'),
        help='rows and columns of patches (default: those of the training)',
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    parser.check_paths([args.config], args.checkpoint, args.compare)
    return args


def main(argv: list) -> None:
    from spvit_mm.apis import beside
    from spvit_mm.explain import (
        animate_priors,
        draw_comparison,
        draw_priors,
        draw_strip,
        format_focus,
        head_focus,
        write_focus,
        write_gif,
    )
    from spvit_mm.utils import UserError, check_new_file, save_figure

    args = parse_args(argv)
    if args.compare and len(args.checkpoint) > 1:
        raise UserError('--compare takes one checkpoint of each model, not a strip.')
    if args.out is None:
        args.out = beside(args.checkpoint[-1], 'priors.png')
    out = check_new_file(args.out, ('.png', '.gif'), force=True)
    animated = osp.splitext(out)[1] == '.gif'
    if animated and len(args.checkpoint) < 2:
        raise UserError(
            'A .gif shows several checkpoints of one training, got a single one: give '
            'two or more, in order, or let --out end in .png.'
        )

    name = osp.splitext(osp.basename(args.config))[0]
    title = f'Spatial priors of {name}'
    steps = {}
    for path in args.checkpoint:
        maps = load_maps(args.config, path, args)
        steps[unique(steps, osp.splitext(osp.basename(path))[0])] = maps
    if args.compare:
        other = load_maps(*args.compare, args)
        if other[0].table.shape[1:] != maps[0].table.shape[1:]:
            raise UserError(
                'The two models were trained on different grids. Give the one to show '
                'with --grid H W.'
            )
        names = [
            osp.splitext(osp.basename(c))[0] for c in (args.config, args.compare[0])
        ]
        if names[0] == names[1]:
            names = [osp.basename(c) for c in (path, args.compare[1])]
        if names[0] == names[1]:
            names = ['first', 'second']
        figure = draw_comparison(dict(zip(names, (maps, other), strict=True)))
    elif animated:
        frames = animate_priors(steps, title)
    elif len(steps) > 1:
        figure = draw_strip(steps, title)
    else:
        figure = draw_priors(maps, f'{title}\n{osp.basename(path)}')
    if animated:
        write_gif(frames, out)
    else:
        save_figure(figure, out, dpi=120)
    focus = head_focus(maps)
    print(format_focus(focus))
    write_focus(osp.splitext(out)[0] + '.csv', focus)
    layers = {m.name.partition(',')[0] for m in maps}
    print(f'The priors of {len(layers)} SP-SA layers are drawn in {out}')


def load_maps(config, checkpoint, args):
    """The priors of a checkpoint."""
    from spvit_mm.apis import load_model
    from spvit_mm.explain import collect_priors

    _, model = load_model(config, checkpoint, args.cfg_options)
    return collect_priors(model, args.grid)


def unique(names, name):
    """The name, numbered if there is one of that name."""
    return name if name not in names else f'{name} ({len(names) + 1})'


if __name__ == '__main__':
    start(parse_args, main, 'show_priors.py')

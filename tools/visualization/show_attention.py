#!/usr/bin/env python
"""Show where one patch of an image looks: content score, prior, their product or sum,
and attention of every head, one PNG per layer. Without --query, where all patches look on
average: one PNG, and how far away that is, in patches. Models without priors, too."""

import argparse
import os.path as osp

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='show_attention.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument(
        '--query',
        type=number(0),
        nargs=2,
        metavar=('ROW', 'COLUMN'),
        help='the patch, counted from 0 at the upper left (default: all)',
    )
    parser.add_argument(
        '--image',
        help='an image file (default: the first of the test data set, or --count of it)',
    )
    parser.add_argument(
        '--count',
        type=number(1),
        help='images of the test data set for the average, evenly spread (default: 64)',
    )
    parser.add_argument(
        '--layers',
        type=number(1),
        nargs='+',
        help='layers to show, from 1 (default: all)',
    )
    parser.add_argument(
        '--out-dir',
        help='folder for the PNGs (default: attention/ beside the checkpoint)',
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.count and not (args.query is args.image is None):
        parser.error(
            '--count is for the average over the data set: no --query, --image'
        )
    parser.check_paths([args.config], [args.checkpoint])
    return args


def check_layers(wanted: list | None, depth: int) -> None:
    """Raise a UserError for a layer that is not there."""
    from spvit_mm.utils import UserError

    if wanted and max(wanted) > depth:
        raise UserError(f'--layers takes numbers in 1..{depth}, got {wanted}.')


def main(argv: list) -> None:
    from spvit_mm.apis import beside, load_model, load_samples
    from spvit_mm.explain import (
        draw_mean_attention,
        draw_query_attention,
        find_attentions,
        format_distances,
        mean_attention,
        query_attention,
        write_distances,
    )
    from spvit_mm.utils import check_new_folder, save_figure

    args = parse_args(argv)
    if args.out_dir is None:
        args.out_dir = beside(args.checkpoint, 'attention')
    folder = check_new_folder(args.out_dir)
    cfg, model = load_model(args.config, args.checkpoint, args.cfg_options)
    check_layers(args.layers, len(find_attentions(model)))
    count = (args.count or 64) if args.query is None else 1
    samples = load_samples(
        cfg, model, None if args.image is None else [args.image], count
    )
    if args.query is None:
        layers = mean_attention(model, (s.inputs[None] for s in samples))
        check_layers(args.layers, len(layers))
        layers = [layers[i - 1] for i in args.layers or range(1, len(layers) + 1)]
        name = osp.splitext(osp.basename(args.config))[0]
        title = f'Where the patches of {name} look\n{osp.basename(args.checkpoint)}'
        figure = draw_mean_attention(layers, title)
        path = osp.join(folder, 'mean.png')
        save_figure(figure, path, dpi=120)
        write_distances(osp.join(folder, 'mean.csv'), layers)
        print(format_distances(layers))
        print(path)
        return
    (sample,) = samples
    layers = query_attention(model, sample.inputs[None], tuple(args.query))
    # Those that are run: none after the last of `out_indices`.
    check_layers(args.layers, len(layers))
    row, column = args.query
    for i in args.layers or range(1, len(layers) + 1):
        layer = layers[i - 1]
        title = f'{layer.layer} ({layer.kind}), {sample.name}, patch ({row}, {column})'
        figure = draw_query_attention(layer, args.query, sample.picture, title)
        path = osp.join(folder, f'layer{i}_row{row}_column{column}.png')
        save_figure(figure, path, dpi=120)
        print(path)


if __name__ == '__main__':
    start(parse_args, main, 'show_attention.py')

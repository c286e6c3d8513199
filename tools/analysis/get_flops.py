#!/usr/bin/env python
"""Count the parameters and FLOPs of a config's whole model, for one image.

As in mmengine's analysis, one multiply-add is one FLOP. The two products of attention
count whatever operator computes them.
"""

import argparse

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='get_flops.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        '--shape',
        type=number(1),
        nargs='+',
        metavar='SIDE',
        help='height and width of the image, or one number for both (default: '
        'img_size of the backbone, else 224)',
    )
    parser.add_argument(
        '--detail', action='store_true', help='print the figures of every module too'
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    parser.check_paths([args.config])
    return args


def main(argv: list) -> None:
    from mmengine.analysis import get_model_complexity_info

    from spvit_mm.apis import (
        build_model,
        check_size,
        image_channels,
        image_shape,
        load_config,
    )

    args = parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    shape = (image_channels(cfg), *image_shape(cfg, args.shape))
    model = build_model(cfg).eval()
    check_size(model, shape[1:], '--shape')
    info = get_model_complexity_info(
        model, shape, show_table=args.detail, show_arch=False
    )
    if args.detail:
        print(info['out_table'])
    print(f'Input shape: {shape}')
    print(f'FLOPs: {info["flops_str"]} ({info["flops"]:,})')
    print(f'Params: {info["params_str"]} ({info["params"]:,})')
    print(f'Activations: {info["activations_str"]} ({info["activations"]:,})')


if __name__ == '__main__':
    start(parse_args, main, 'get_flops.py')

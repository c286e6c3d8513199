#!/usr/bin/env python
"""Convert a checkpoint of SP-ViT, LV-ViT, DeiT or timm's ViT to ours, with its
config, or (--to spvit) ours to the names of the released code."""

import argparse

from spvit_mm_cli import ArgumentParser, start


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='convert.py', description=__doc__)
    parser.add_argument('src', help='the checkpoint to read')
    parser.add_argument('out', help='the .pth to write; its config is OUT with .py')
    parser.add_argument(
        '--from',
        dest='source',
        default='auto',
        choices=['auto', 'spvit', 'lvvit', 'deit', 'timm'],
    )
    parser.add_argument('--to', dest='target', default='mm', choices=['mm', 'spvit'])
    parser.add_argument(
        '--weights',
        default='auto',
        choices=['auto', 'ema', 'plain'],
        help='auto: EMA if there is one',
    )
    parser.add_argument(
        '--classifier',
        default='auto',
        choices=['auto', 'tokenlabel', 'plain'],
        help='plain leaves out an auxiliary head, auto keeps it',
    )
    parser.add_argument(
        '--num-spsa-layers', type=int, help='deit, timm: layers to make SP-SA'
    )
    parser.add_argument(
        '--cls-token-layer', type=int, help='the class token joins before this layer'
    )
    parser.add_argument(
        '--hidden-dims', type=int, default=32, help='deit, timm: width of new priors'
    )
    parser.add_argument('--num-heads', type=int, help='where no weight shows it')
    parser.add_argument('--skip-scale', type=float, help='divisor of the branches')
    parser.add_argument('--norm-eps', type=float, help='eps of the layer norms')
    parser.add_argument('--img-size', type=int, nargs=2, metavar=('H', 'W'))
    parser.add_argument('--distilled', default='refuse', choices=['refuse', 'drop'])
    parser.add_argument(
        '--normalization', choices=['imagenet', 'half'], help='of the config'
    )
    parser.add_argument('--test-crop', type=float, help='of the config')
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    args = parser.parse_args(argv)
    parser.check_paths(checkpoints=[args.src])
    return args


def main(argv: list) -> None:
    from spvit_mm.convert import Options, convert_file
    from spvit_mm.utils import UserError

    args = vars(parse_args(argv))
    files = {
        name: args.pop(name) for name in ('src', 'out', 'source', 'target', 'force')
    }
    trust = args.pop('trust_checkpoint')
    try:
        convert_file(**files, options=Options(**args), trust=trust)
    except OSError as error:
        raise UserError(str(error)) from error


if __name__ == '__main__':
    start(parse_args, main, 'convert.py')

#!/usr/bin/env python
"""Convert a checkpoint of SP-ViT, LV-ViT, DeiT or timm's ViT (also DINOv2, MAE, CLIP) to
ours, with its config; or ours (--to) to the names of the released code or of timm."""

import argparse
from pathlib import Path

from spvit_mm_cli import ArgumentParser, add_cfg_options, start


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='convert.py', description=__doc__)
    parser.add_argument('src', help='the checkpoint to read: .pth, .safetensors, ...')
    parser.add_argument(
        'out',
        help='the .pth or .safetensors to write; its config is OUT with .py',
    )
    parser.add_argument(
        '--from',
        dest='source',
        default='auto',
        choices=['auto', 'spvit', 'lvvit', 'deit', 'timm'],
        help='the codebase that wrote SRC. Its names are read in one way; the codebase '
        'decides the normalization and the test crop of the config (default: auto, by '
        'the names; deit if they lie under `model`, as in its releases, else timm)',
    )
    parser.add_argument(
        '--to',
        dest='target',
        default='mm',
        choices=['mm', 'spvit', 'timm'],
        help='mm: a checkpoint of ours and its config. spvit: SRC is ours, OUT is for '
        "the authors' code. timm: SRC is ours with priors that change nothing, OUT is "
        "for timm's VisionTransformer (default: mm)",
    )
    parser.add_argument(
        '--config',
        help='--to timm, spvit: the config of SRC, which says what no weight shows '
        '(default: SRC with .py; spvit warns without any)',
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--weights',
        default='auto',
        choices=['auto', 'ema', 'plain'],
        help='auto: EMA if there is one',
    )
    parser.add_argument(
        '--classifier',
        default='auto',
        choices=['auto', 'tokenlabel', 'plain', 'none'],
        help='plain leaves out an auxiliary head, none all heads; auto keeps them',
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
    parser.add_argument(
        '--act',
        default='gelu',
        choices=['gelu', 'quick_gelu'],
        help="activation of the FFNs; quick_gelu: of OpenAI's CLIP (default: gelu)",
    )
    parser.add_argument(
        '--img-size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='height and width of the images that SRC was trained with, in pixels '
        '(default: of a square grid of patches, by the length of pos_embed)',
    )
    parser.add_argument(
        '--distilled',
        default='refuse',
        choices=['refuse', 'drop'],
        help='what to do about a distilled DeiT, whose second token SPViT has not: '
        'refuse, or drop that token and its head; the outputs then differ until it is '
        'trained (default: refuse)',
    )
    parser.add_argument(
        '--normalization',
        choices=['imagenet', 'half', 'clip'],
        help='mean and standard deviation of the images, for the config (default: the '
        'habit of the source: clip for CLIP, half for timm, imagenet for others and '
        'for models without a head)',
    )
    parser.add_argument(
        '--test-crop',
        type=float,
        help='share of the image that is tested, in (0, 1], for the config (default: '
        'the habit of the source)',
    )
    parser.add_argument('--force', action='store_true', help='overwrite OUT')
    args = parser.parse_args(argv)
    parser.check_paths(checkpoints=[args.src])
    return args


def main(argv: list) -> None:
    from spvit_mm.apis import build_model, load_config, load_trained_model
    from spvit_mm.convert import Options, convert_file
    from spvit_mm.utils import UserError

    args = vars(parse_args(argv))
    files = {
        name: args.pop(name) for name in ('src', 'out', 'source', 'target', 'force')
    }
    trust = args.pop('trust_checkpoint')
    config, cfg_options = args.pop('config'), args.pop('cfg_options')
    to, src = files['target'], files['src']
    if to == 'mm' and (config or cfg_options):
        raise UserError('--config and --cfg-options are for --to timm and spvit.')
    if to != 'mm' and (config := find_config(config, src, needed=to == 'timm')):
        cfg = load_config(config, cfg_options)
        if to == 'spvit':
            files['model'] = build_model(cfg)
        else:
            files['model'], loaded = load_trained_model(cfg, src)
            if args['weights'] == 'plain' and 'ema_state_dict' in loaded:
                raise UserError(
                    '--to timm converts the EMA weights; --weights plain does not.'
                )
    elif cfg_options:
        raise UserError('--cfg-options change a config: name it with --config.')
    convert_file(**files, options=Options(**args), trust=trust)


def find_config(config: str | None, src: str, needed: bool) -> str | None:
    """The config of a checkpoint of ours: the one that is named, or beside it."""
    from spvit_mm.utils import UserError

    named, config = config, config or str(Path(src).with_suffix('.py'))
    if not Path(config).is_file():
        if not (named or needed):
            return None
        raise UserError(
            f'The config {config} does not exist: name it with --config. No weight shows '
            'how a prior is used, which layers are scaled, or where the class token joins.'
        )
    return config


if __name__ == '__main__':
    start(parse_args, main, 'convert.py')

#!/usr/bin/env python
"""Fold the spatial priors of a trained model into constants, for one grid.

Gives the same outputs and computes no prior any more.
"""

import argparse

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='reparameterize_model.py', description=__doc__)
    parser.add_argument('config', help='path of the config of the training')
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument('out', help='the checkpoint to write (.pth or .safetensors)')
    parser.add_argument(
        '--grid',
        type=number(1),
        nargs=2,
        metavar=('H', 'W'),
        help='rows and columns of patches that will be served (default: those of the '
        'training)',
    )
    parser.add_argument(
        '--force', action='store_true', help='replace the file that is there'
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    parser.check_paths([args.config], [args.checkpoint])
    return args


def main(argv: list) -> None:
    from spvit_mm.apis import load_config, load_trained_model
    from spvit_mm.models import SPViT
    from spvit_mm.models.priors import ConstantSpatialPrior
    from spvit_mm.utils import (
        UserError,
        check_new_file,
        check_not_source,
        write_checkpoint,
    )

    args = parse_args(argv)
    out = check_new_file(args.out, ('.pth', '.safetensors'), args.force)
    check_not_source(out, args.checkpoint)
    cfg = load_config(args.config, args.cfg_options)
    model, checkpoint = load_trained_model(cfg, args.checkpoint)
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, SPViT):
        raise UserError(
            f'The model of {args.config} has no backbone with a deploy form, such as '
            f'SPViT; its backbone is {type(backbone).__name__}.'
        )
    backbone.switch_to_deploy(tuple(args.grid) if args.grid else None)
    grids = [m.grid for m in model.modules() if isinstance(m, ConstantSpatialPrior)]
    grid = grids[0] if grids else backbone.patch_resolution
    meta = {**(checkpoint.get('meta') or {}), 'deploy_grid': tuple(grid)}
    write_checkpoint({'meta': meta, 'state_dict': model.state_dict()}, out)
    print(
        f'Wrote {out}, for a grid of {grid[0]} x {grid[1]} patches. To load it, build '
        f'the model with model.backbone.deploy=True:\n'
        f'  python tools/test.py {args.config} {out} '
        '--cfg-options model.backbone.deploy=True'
    )


if __name__ == '__main__':
    start(parse_args, main, 'reparameterize_model.py')

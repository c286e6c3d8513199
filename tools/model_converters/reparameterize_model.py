#!/usr/bin/env python
"""Fold the spatial priors of a trained model into constants, for one grid.

Gives the same outputs and computes no prior any more.
"""

import torch

from spvit_mm.apis import (
    ArgumentParser,
    load_config,
    load_trained_model,
    number,
    run_cli,
)
from spvit_mm.utils import UserError, check_new_file, whole_file


def main(argv: list) -> None:
    parser = ArgumentParser(prog='reparameterize_model.py', description=__doc__)
    parser.add_argument('config', help='path of the config of the training')
    parser.add_argument('checkpoint', help='path of the trained checkpoint')
    parser.add_argument('out', help='the checkpoint to write (.pth)')
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
    args = parser.parse_args(argv)
    out = check_new_file(args.out, ('.pth',), args.force)
    cfg = load_config(args.config)
    model, checkpoint = load_trained_model(cfg, args.checkpoint)
    backbone = getattr(model, 'backbone', None)
    if not hasattr(backbone, 'switch_to_deploy'):
        raise UserError(
            f'The model of {args.config} has no backbone with a deploy form, such as '
            f'SPViT; its backbone is {type(backbone).__name__}.'
        )
    try:
        backbone.switch_to_deploy(tuple(args.grid) if args.grid else None)
    except ValueError as error:  # for what cannot be a grid, or not that of this model
        raise UserError(f'{args.checkpoint} cannot be deployed: {error}') from error
    grid = tuple(args.grid or backbone.patch_resolution)
    meta = {**checkpoint.get('meta', {}), 'deploy_grid': grid}
    with whole_file(out) as partial:
        torch.save({'meta': meta, 'state_dict': model.state_dict()}, partial)
    print(
        f'Wrote {out}, for a grid of {grid[0]} x {grid[1]} patches. To load it, build '
        f'the model with model.backbone.deploy=True:\n'
        f'  python tools/test.py {args.config} {out} '
        '--cfg-options model.backbone.deploy=True'
    )


if __name__ == '__main__':
    run_cli(main, 'reparameterize_model.py')

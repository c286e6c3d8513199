#!/usr/bin/env python
"""Draw the spatial priors of every SP-SA layer and head into one PNG."""

import os.path as osp

from mmengine.registry import MODELS, init_default_scope

from spvit_mm.engine import UserError, launch, load_whole_checkpoint
from spvit_mm.explain import collect_priors, draw_priors


def main(argv: list) -> None:
    parser = launch.ArgumentParser(prog='show_priors.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument(
        '--out', help='the PNG to write (default: priors.png beside the checkpoint)'
    )
    parser.add_argument(
        '--grid',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help='rows and columns of patches (default: those of the training)',
    )
    args = parser.parse_args(argv)
    cfg = launch.load_config(args.config)
    launch.check_checkpoint(args.checkpoint)
    if args.grid and min(args.grid) < 1:
        raise UserError(f'--grid takes two positive numbers, got {args.grid}.')

    init_default_scope(launch.scope_of(cfg))
    with launch.building(f'The model of {args.config} cannot be built'):
        model = MODELS.build(cfg.model)
    with launch.building(f'{args.checkpoint} cannot be loaded'):
        load_whole_checkpoint(model, args.checkpoint)
    with launch.building('No picture'):
        maps = collect_priors(model, args.grid)
    out = args.out or osp.join(osp.dirname(args.checkpoint), 'priors.png')
    name = osp.splitext(osp.basename(args.config))[0]
    title = f'Spatial priors of {name}\n{osp.basename(args.checkpoint)}'
    draw_priors(maps, title).savefig(out, dpi=120)
    print(f'The priors of {len(maps)} SP-SA layers are drawn in {out}')


if __name__ == '__main__':
    launch.run_cli(main, 'show_priors.py')

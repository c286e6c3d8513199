#!/usr/bin/env python
"""Count the parameters and FLOPs of a config's whole model, for one image.

As in mmengine's analysis, one multiply-add is one FLOP. The two products of attention
count whatever operator computes them.
"""

from mmengine.analysis import get_model_complexity_info
from mmengine.registry import MODELS, init_default_scope

from spvit_mm.engine import UserError, launch


def main(argv: list) -> None:
    parser = launch.ArgumentParser(prog='get_flops.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='SIDE',
        help='height and width of the image, or one number for both (default: '
        'img_size of the backbone, else 224)',
    )
    parser.add_argument(
        '--detail', action='store_true', help='print the figures of every module too'
    )
    args = parser.parse_args(argv)
    cfg = launch.load_config(args.config)
    if cfg.get('model') is None:
        raise UserError(f'The config {args.config} has no model.')
    shape = args.shape or cfg.model.get('backbone', {}).get('img_size') or 224
    shape = [shape] if isinstance(shape, int) else list(shape)
    if len(shape) > 2 or min(shape) < 1:
        raise UserError(f'--shape takes one or two positive numbers, got {shape}.')
    shape = (3, shape[0], shape[-1])

    init_default_scope(launch.scope_of(cfg))
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with launch.building(f'The model of {args.config} cannot be built'):
        model = MODELS.build(cfg.model).eval()
    with launch.building(f'The model cannot take an image of shape {shape}'):
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
    launch.run_cli(main, 'get_flops.py')

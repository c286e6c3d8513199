"""Make the label maps of token labeling with a teacher of one's choice."""

import argparse
import os.path as osp

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start


def is_path(config: str) -> bool:
    """Whether a config is given by its path; a name of mmpretrain has no ending."""
    return not config or osp.exists(config) or osp.splitext(config)[1] == '.py'


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(
        prog='generate_token_labels.py',
        description='Writes <out>/<class folder>/<image stem>.pt, the label map of '
        'every image under a folder, in the format of the published ones. Run again, '
        'it goes on where it stopped.',
    )
    parser.add_argument('config', help="the teacher's config, or a name of mmpretrain")
    parser.add_argument('checkpoint', help="the teacher's weights")
    parser.add_argument('images', help='folder of images, one folder a class')
    parser.add_argument('out', help='folder for the label maps')
    parser.add_argument(
        '--size',
        type=number(1),
        default=224,
        help='side in pixels that the teacher sees; 576 gives 18 x 18 places for a '
        'stride of 32 (default: %(default)s)',
    )
    parser.add_argument(
        '--top-k', type=number(1), default=5, help='scores kept a place (default: 5)'
    )
    parser.add_argument('--batch-size', type=number(1), default=16)
    parser.add_argument('--num-workers', type=number(0), default=2)
    parser.add_argument('--device', default='cpu', help='cpu, cuda, cuda:1, ...')
    parser.add_argument(
        '--preview',
        type=number(0, 250),
        default=0,
        metavar='N',
        help='draw N images beside their label maps to <out>/preview.png',
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    configs = [args.config] if is_path(args.config) else []
    parser.check_paths(configs, [args.checkpoint])
    return args


def read_config(name, options):
    """The config of a path, or of a model that mmpretrain knows by name."""
    from mmpretrain.apis.model import ModelHub

    from spvit_mm.apis import change_config, check_entries, load_config, scope_of
    from spvit_mm.utils import UserError

    if is_path(name):
        cfg = load_config(name, options)
        check_entries(cfg, ('model',))
    else:
        try:
            cfg = change_config(ModelHub.get(name).config, options)
        except ValueError as error:
            raise UserError(str(error)) from error
    if scope_of(cfg) == 'mmseg':
        raise UserError(
            f'{name} is a config of mmseg; a teacher is a classifier of mmpretrain.'
        )
    return cfg


def main(argv: list) -> None:
    from mmpretrain import get_model

    from spvit_mm.apis import building, check_checkpoint, check_device, load_whole
    from spvit_mm.datasets.teacher import generate_token_labels
    from spvit_mm.utils import check_new_folder

    args = parse_args(argv)
    check_device(args.device)
    args.out = check_new_folder(args.out)
    check_checkpoint(args.checkpoint)
    config = read_config(args.config, args.cfg_options)
    with building(f'The teacher {args.config}'):
        model = get_model(config)
    load_whole(model, args.checkpoint)
    counts = generate_token_labels(
        model,
        args.images,
        args.out,
        size=args.size,
        top_k=args.top_k,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=args.device,
        teacher_name=args.config,
        preview=args.preview,
    )
    print(
        f'{counts["written"]} label maps written, {counts["kept"]} kept: {args.out}'
        + (f'\nPreview: {args.out}/preview.png' if args.preview else '')
    )


if __name__ == '__main__':
    start(parse_args, main, 'generate_token_labels.py')

"""Make the label maps of token labeling with a teacher of one's choice."""

import os.path as osp

from mmpretrain import get_model

from spvit_mm.apis import (
    ArgumentParser,
    building,
    check_checkpoint,
    check_entries,
    check_finite,
    load_config,
    number,
    run_cli,
    scope_of,
)
from spvit_mm.datasets.teacher import generate_token_labels
from spvit_mm.utils import UserError, check_new_folder


def parse_args(argv):
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
    return parser.parse_args(argv)


def main(argv):
    args = parse_args(argv)
    args.out = check_new_folder(args.out)
    check_checkpoint(args.checkpoint)
    # A name of mmpretrain has no ending.
    if osp.exists(args.config) or osp.splitext(args.config)[1] == '.py':
        cfg = load_config(args.config)
        check_entries(cfg, ('model',))
        if scope_of(cfg) == 'mmseg':
            raise UserError(
                f'{args.config} is a config of mmseg; a teacher is a classifier of '
                'mmpretrain.'
            )
    with building(f'The teacher {args.config}'):
        model = get_model(args.config, pretrained=args.checkpoint, device=args.device)
    check_finite(model, args.checkpoint)
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
    run_cli(main, 'generate_token_labels.py')

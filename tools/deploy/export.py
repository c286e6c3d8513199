#!/usr/bin/env python
"""Write a trained model as ONNX (.onnx) or with torch.export (.pt2).

The file takes normalised images and gives logits. It is compared with the model before
it gets its name.
"""

import argparse
from itertools import product

from spvit_mm_cli import ArgumentParser, add_cfg_options, start

TOLERANCE = 1e-4


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='export.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        'checkpoint',
        help='path of the checkpoint; for one in deploy form give --cfg-options '
        'model.backbone.deploy=True',
    )
    parser.add_argument('out', help='the file to write, .onnx or .pt2')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='SIDE',
        help='height and width of the images, or one number for both (default: '
        'img_size of the backbone, else 224)',
    )
    parser.add_argument(
        '--batch', type=int, default=1, help='images that the file takes (default: 1)'
    )
    parser.add_argument(
        '--dynamic-batch', action='store_true', help='any number of images'
    )
    parser.add_argument(
        '--dynamic-size',
        action='store_true',
        help='images of any height and width, of at least 2 x 2 patches; as in training, '
        'they are padded on the right and at the bottom to whole patches. The priors and '
        'the position embedding are computed from the size, not folded into constants '
        '(default: images of one size)',
    )
    parser.add_argument(
        '--opset', type=int, help='of ONNX (default: 18, and 17 for torch < 2.5)'
    )
    parser.add_argument(
        '--force', action='store_true', help='replace the file that is there'
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    parser.check_paths([args.config], [args.checkpoint])
    return args


def main(argv: list) -> None:
    import torch

    from spvit_mm.apis import (
        export,
        image_channels,
        image_shape,
        load_config,
        load_trained_model,
        reverses_channels,
    )
    from spvit_mm.utils import UserError, check_new_file, whole_file

    args = parse_args(argv)
    out = check_new_file(args.out, ('.onnx', '.pt2'), args.force)
    cfg = load_config(args.config, args.cfg_options)
    shape, channels = image_shape(cfg, args.shape), image_channels(cfg)
    opset = export.OPSET if args.opset is None else args.opset
    if args.batch < 1 or opset < 17:
        raise UserError('--batch takes numbers from 1 on, --opset from 17 on.')
    if args.dynamic_batch and args.batch != 1:
        raise UserError('Give --batch or --dynamic-batch, not both.')
    model, _ = load_trained_model(cfg, args.checkpoint)
    ready = export.prepare(model, shape, args.dynamic_size)
    sizes = export.sizes_to_compare(shape) if args.dynamic_size else [shape]

    # With one image as its example, torch.export takes 1 for a constant.
    images = torch.randn(2 if args.dynamic_batch else args.batch, channels, *sizes[-1])
    export.check_finite(ready, images)
    free = dict(dynamic_batch=args.dynamic_batch, dynamic_size=args.dynamic_size)
    batches = (1, 3) if args.dynamic_batch else (args.batch,)
    differences = []
    with whole_file(out) as partial:
        if out.endswith('.onnx'):
            export.save_onnx(ready, partial, images, opset=opset, **free)
        else:
            export.save_program(ready, partial, images, **free)
        run = export.open_file(partial)
        if run is None:
            print('Not compared with the model: onnxruntime is not installed.')
        for batch, size in product(batches, sizes) if run else ():
            images = torch.randn(batch, channels, *size)
            with torch.no_grad():
                difference = export.Difference(ready(images), run(images))
            print(
                f'Batch {batch}, {size[0]} x {size[1]}: logits differ by at most '
                f'{difference.largest:.1e}, '
                f'top-1 {"the same" if difference.same_top1 else "differs"}.'
            )
            differences.append(difference.largest)
            # Not "above", which nan is not.
            if not difference.same_top1 or not difference.largest <= TOLERANCE:
                raise UserError(
                    f'The file differs from the model by more than {TOLERANCE}; it was '
                    'not kept. Try another --opset, or the other format.'
                )
    batch = 'any number of' if args.dynamic_batch else args.batch
    side = 'any height x any width' if args.dynamic_size else f'{shape[0]} x {shape[1]}'
    print(f'Wrote {out}: {batch} images of {channels} x {side} to logits.')
    if differences:
        print(f'The largest difference from the model is {max(differences):.1e}.')
    preprocessor = getattr(model, 'data_preprocessor', None)
    if getattr(preprocessor, '_enable_normalize', False):
        mean, std = (
            [round(float(x), 3) for x in getattr(preprocessor, name).flatten()]
            for name in ('mean', 'std')
        )
        swap = reverses_channels(preprocessor)
        print(
            f'Its images: pixels of 0 to 255, as the config loads them'
            f'{" with the channels reversed" if swap else ""}, minus {mean}, over {std}.'
        )


if __name__ == '__main__':
    start(parse_args, main, 'export.py')

#!/usr/bin/env python
"""Draw images, ground truth and prediction of a segmentor side by side."""

import argparse

from spvit_mm_cli import ArgumentParser, add_cfg_options, number, start

# Of which a PNG can be drawn, 242 pixels a row.
MOST_PICTURES = 250


def colour(mask, palette):
    """Turn classes (h, w) into colours (h, w, 3); the ignored become grey."""
    import numpy as np

    table = np.full((256, 3), 128, np.uint8)
    table[: len(palette)] = palette
    return table[mask.astype(np.uint8)]


def parse_args(argv: list) -> argparse.Namespace:
    parser = ArgumentParser(prog='show_segmentation.py', description=__doc__)
    parser.add_argument('config', help='path of the config')
    parser.add_argument('checkpoint', help='path of the checkpoint')
    parser.add_argument('--out', default='segmentation.png', help='the PNG to write')
    parser.add_argument(
        '--number',
        type=number(1, MOST_PICTURES),
        default=6,
        help='how many images (default: 6)',
    )
    add_cfg_options(parser)
    args = parser.parse_args(argv)
    parser.check_paths([args.config], [args.checkpoint])
    return args


def main(argv: list) -> None:
    import mmcv
    import numpy as np
    import torch
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS

    from spvit_mm.apis import (
        building,
        check_entries,
        load_config,
        load_trained_model,
        scope_of,
    )
    from spvit_mm.datasets import checks
    from spvit_mm.utils import (
        UserError,
        check_new_file,
        first_not_finite,
        new_figure,
        save_figure,
        with_progress,
    )

    args = parse_args(argv)
    out = check_new_file(args.out, ('.png',), force=True)
    cfg = load_config(args.config, args.cfg_options)
    if scope_of(cfg) != 'mmseg':
        raise UserError(
            f'{args.config} is a config of {scope_of(cfg)}; this command takes a '
            'segmentor, whose default_scope is mmseg.'
        )
    check_entries(cfg, ('model', 'test_dataloader'))
    model, _ = load_trained_model(cfg, args.checkpoint)
    settings = cfg.test_dataloader.dataset
    with building('The test data set'), checks.naming_empty_data(settings, 'test'):
        dataset = DATASETS.build(settings)
    checks.check_dataset(dataset, 'test')
    checks.guard_files(dataset, model.num_classes)

    count = min(args.number, len(dataset))
    palette = dataset.metainfo['palette']
    figure = new_figure(9, 2.2 * count)
    axes = figure.subplots(count, 3, squeeze=False)
    chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
    for row, i in with_progress([*zip(axes, chosen.tolist(), strict=True)]):
        data = dataset[i]
        with torch.no_grad():
            sample = model.test_step(pseudo_collate([data]))[0]
        if first_not_finite([('logits', sample.seg_logits.data)]):
            raise UserError(
                f'The prediction for {sample.img_path} holds nan or infinity. Check '
                'the file, and mean and std of data_preprocessor.'
            )
        predicted = sample.pred_sem_seg.data[0].cpu().numpy()
        row[0].imshow(mmcv.imread(sample.img_path, channel_order='rgb'))
        if 'gt_sem_seg' in sample:
            truth = sample.gt_sem_seg.data[0].cpu().numpy()
            row[1].imshow(colour(truth, palette), interpolation='nearest')
        row[2].imshow(colour(predicted, palette), interpolation='nearest')
        for axis in row:
            axis.axis('off')
    for axis, title in zip(
        axes[0], ('image', 'ground truth', 'prediction'), strict=True
    ):
        axis.set_title(title)
    save_figure(figure, out, dpi=110)
    print(f'Wrote {out}')


if __name__ == '__main__':
    start(parse_args, main, 'show_segmentation.py')

"""What label maps cost the data pipeline, in images a second.

Makes JPEG images of ImageNet's size and label maps of the published one
(2, 5, 18, 18) in a temporary folder and reads both with the pipelines of the
ImageNet configs; then builds the targets of a batch from them.
"""

import argparse
import os.path as osp
import tempfile
from pathlib import Path

import numpy as np
import torch
from measuring import time_in_turns
from mmengine.config import Config
from mmengine.dataset import pseudo_collate, worker_init_fn
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS
from PIL import Image, ImageFilter
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader

from spvit_mm.apis import number
from spvit_mm.datasets.token_labels import write_label_map
from spvit_mm.models.heads import token_label_targets

CONFIGS = osp.join(osp.dirname(osp.dirname(osp.abspath(__file__))), 'configs')
NUM_CLASSES = 1000


def make_data(root, num_images):
    """Smoothed noise, 500 x 375, and label maps of random scores."""
    rng = np.random.default_rng(0)
    for i in range(num_images):
        name = f'class{i % 2}/{i:05d}'
        path = Path(root, 'images', f'{name}.jpg')
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 255, (375, 500, 3), dtype=np.uint8)
        image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
        image.save(path, quality=90)
        scores = torch.rand(NUM_CLASSES, 18, 18).mul(10).topk(5, dim=0)
        label_map = torch.stack((scores[0], scores[1].float()))
        write_label_map(f'{root}/labels/{name}.pt', label_map, NUM_CLASSES)


def build_dataset(config, root):
    """The config's training data, of the folder under ``root``."""
    cfg = Config.fromfile(osp.join(CONFIGS, config)).train_dataloader.dataset
    folder = dict(type='CustomDataset', data_prefix=f'{root}/images')
    if cfg.type != 'TokenLabelDataset':
        return DATASETS.build(dict(**folder, pipeline=cfg.pipeline))
    cfg = {**cfg, 'dataset': folder, 'label_root': f'{root}/labels'}
    return DATASETS.build(dict(**cfg, num_classes=NUM_CLASSES))


def make_loader(dataset, num_workers, batch_size):
    """A loader whose workers stay from one pass to the next."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=pseudo_collate,
        worker_init_fn=lambda i: worker_init_fn(i, num_workers, 0, 0, True),
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--num-images', type=number(1), default=512)
    parser.add_argument('--num-workers', type=number(0), nargs='+', default=[0, 2])
    parser.add_argument('--batch-size', type=number(1), default=64)
    parser.add_argument('--passes', type=number(1), default=5)
    parser.add_argument('--device', default='cpu', help='where targets are built')
    args = parser.parse_args(argv)
    if args.batch_size > args.num_images:
        parser.error('--batch-size takes no more than --num-images')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no CUDA device; use --device cpu')
    init_default_scope('mmpretrain')
    configs = {
        'without': 'classification/spvit-small_8xb128-300e_in1k.py',
        'with': 'token_labeling/spvit-small_8xb128-tokenlabel-300e_in1k.py',
    }
    with tempfile.TemporaryDirectory() as root:
        make_data(root, args.num_images)
        datasets = {key: build_dataset(config, root) for key, config in configs.items()}
        print('| workers | label maps | images/s, median (min .. max) | ratio |')
        print('| --- | --- | --- | --- |')
        for num_workers in args.num_workers:
            timers = {
                key: Timer(
                    'for _ in loader: pass',
                    globals={'loader': make_loader(data, num_workers, args.batch_size)},
                )
                for key, data in datasets.items()
            }
            times = time_in_turns(timers, args.passes, least=0)
            for key, seconds in times.items():
                rates = [args.num_images / x for x in seconds]
                ratio = np.median(np.divide(times['without'], seconds))
                print(
                    f'| {num_workers} | {key} | {np.median(rates):.0f} '
                    f'({min(rates):.0f} .. {max(rates):.0f}) | {ratio:.3f} |',
                    flush=True,
                )
        batch = pseudo_collate([datasets['with'][i] for i in range(args.batch_size)])

    samples = [sample.to(args.device) for sample in batch['data_samples']]
    timer = Timer(
        'token_label_targets(label_maps, views, num_classes, (14, 14))',
        globals=dict(
            token_label_targets=token_label_targets,
            label_maps=[sample.token_label for sample in samples],
            views=torch.stack([sample.token_label_view for sample in samples]),
            num_classes=NUM_CLASSES,
        ),
        num_threads=torch.get_num_threads(),
    )
    milliseconds = 1000 * timer.blocked_autorange(min_run_time=2).median
    print(
        f'\nTargets of a batch of {args.batch_size}, 14 x 14 tokens, {NUM_CLASSES} '
        f'classes, on {args.device}: {milliseconds:.0f} ms'
    )


if __name__ == '__main__':
    main()

"""Token labeling in small: does it help on the digits?

A small CNN learns scikit-learn's digits and makes their label maps; SP-ViT learns
the digits with these maps and MixToken, and without. Prints top-1 of both over
several seeds and writes the table as a file.
"""

import argparse
import json
import os
import os.path as osp
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

import spvit_mm  # noqa: F401
from spvit_mm.datasets.digits import load_digits_arrays, split_indices
from spvit_mm.datasets.teacher import generate_token_labels

CONFIGS = osp.join(osp.dirname(osp.dirname(osp.abspath(__file__))), 'configs')
TEACHER = 'resnet-mini_1xb64-10e_digits'
STUDENTS = {
    'without': 'spvit-mini_1xb64-20e_digits',
    'with': 'spvit-mini_1xb64-tokenlabel-20e_digits',
}


def write_digits(root):
    """Write the digits as <root>/{train,test}/<digit>/<index>.png."""
    images, labels = load_digits_arrays()
    for split in ('train', 'test'):
        for index in split_indices(split):
            folder = osp.join(root, split, str(labels[index]))
            os.makedirs(folder, exist_ok=True)
            Image.fromarray(images[index]).save(osp.join(folder, f'{index:04d}.png'))


def train(name, data_root, work_dir, seed, epochs=None):
    """Train one of the configs; returns the model and its top-1 in percent."""
    cfg = Config.fromfile(osp.join(CONFIGS, 'token_labeling', f'{name}.py'))
    cfg.work_dir = osp.join(work_dir, f'{name}_seed{seed}')
    cfg.experiment_name = f'{name}_seed{seed}_{time.time_ns()}'
    cfg.randomness = dict(seed=seed)
    cfg.log_level = 'WARNING'
    cfg.env_cfg.mp_cfg.mp_start_method = 'spawn'
    dataset = cfg.train_dataloader.dataset
    if 'label_root' in dataset:
        dataset.label_root = osp.join(data_root, 'token_labels')
        dataset = dataset.dataset
    dataset.data_prefix = osp.join(data_root, 'train')
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        loader.dataset.data_prefix = osp.join(data_root, 'test')
    epochs = epochs or cfg.train_cfg.max_epochs
    cfg.train_cfg.max_epochs = cfg.train_cfg.val_interval = epochs
    cfg.default_hooks.checkpoint = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    top1 = runner.message_hub.get_scalar('val/accuracy/top1').current()
    return runner.model, float(top1)


def train_student(*args):
    """Top-1 of a run in a process of its own."""
    torch.set_num_threads(1)
    return train(*args)[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--work-dir', default='work_dirs/digits_token_labeling')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--epochs', type=int, help="instead of the configs'")
    parser.add_argument('--teacher-epochs', type=int, help="instead of the config's")
    parser.add_argument(
        '--jobs', type=int, default=2, help='students at a time (default: %(default)s)'
    )
    args = parser.parse_args()
    if any(n is not None and n < 4 for n in (args.epochs, args.teacher_epochs)):
        parser.error('the learning rate warms up for 3 epochs: give 4 or more')

    start = time.time()
    # One folder a run, so that nothing of an earlier run is taken or lost.
    work_dir = osp.join(args.work_dir, time.strftime('%Y%m%d_%H%M%S'))
    data_root = osp.join(work_dir, 'digits')
    write_digits(data_root)
    teacher, teacher_top1 = train(
        TEACHER, data_root, work_dir, 0, epochs=args.teacher_epochs
    )
    counts = generate_token_labels(
        teacher,
        osp.join(data_root, 'train'),
        osp.join(data_root, 'token_labels'),
        size=24,
        batch_size=64,
        num_workers=0,
        teacher_name=TEACHER,
        preview=6,
        progress=False,
    )
    print(
        f'Teacher: top-1 {teacher_top1:.2f} %, {counts["written"]} label maps after '
        f'{time.time() - start:.0f} s',
        flush=True,
    )

    jobs = [(name, seed) for seed in range(args.seeds) for name in STUDENTS]
    results = {name: [] for name in STUDENTS}
    # One thread a process: the tensors are too small to share among threads.
    with ProcessPoolExecutor(args.jobs, get_context('spawn')) as pool:
        futures = [
            pool.submit(
                train_student, STUDENTS[name], data_root, work_dir, seed, args.epochs
            )
            for name, seed in jobs
        ]
        for (name, seed), future in zip(jobs, futures, strict=True):
            results[name].append(future.result())
            print(
                f'seed {seed}, {name} token labeling: top-1 {results[name][-1]:.2f} % '
                f'({time.time() - start:.0f} s)',
                flush=True,
            )

    seeds = ' | '.join(f'seed {i}' for i in range(args.seeds))
    lines = [
        f'| token labeling | {seeds} | mean | std |',
        '| --- ' * (args.seeds + 3) + '|',
    ]
    for name, values in results.items():
        cells = ' | '.join(f'{value:.2f}' for value in values)
        spread = np.std(values, ddof=1) if len(values) > 1 else 0
        lines.append(f'| {name} | {cells} | {np.mean(values):.2f} | {spread:.2f} |')
    table = '\n'.join(lines)
    print(f'\nTop-1 in % on the 360 test digits, {time.time() - start:.0f} s in all:\n')
    print(table)
    with open(osp.join(work_dir, 'results.json'), 'w', encoding='utf-8') as file:
        json.dump(dict(teacher=teacher_top1, **results), file, indent=1)
    with open(osp.join(work_dir, 'results.md'), 'w', encoding='utf-8') as file:
        file.write(table + '\n')
    print(f'\nWritten to {work_dir}: results.md, results.json')
    print(f'Label maps to look at: {data_root}/token_labels/preview.png')


if __name__ == '__main__':
    main()

"""Token labeling in small: does it help on the digits?

A small CNN learns scikit-learn's digits and makes their label maps; SP-ViT learns
the digits with these maps and MixToken, and without. Prints top-1 of both over
several seeds and writes the table as a file.
"""

import json
from pathlib import Path

import experiments
import numpy as np
from experiments import Run
from measuring import write_text
from mmengine.config import Config
from PIL import Image

from spvit_mm.datasets.digits import load_digits_arrays, split_indices
from spvit_mm.datasets.teacher import generate_token_labels

CONFIGS = experiments.ROOT / 'configs' / 'token_labeling'
TEACHER = 'resnet-mini_1xb64-10e_digits'
STUDENTS = {
    'without': 'spvit-mini_1xb64-20e_digits',
    'with': 'spvit-mini_1xb64-tokenlabel-20e_digits',
}


def write_digits(root: Path) -> None:
    """Write the digits as <root>/{train,test}/<digit>/<index>.png."""
    images, labels = load_digits_arrays()
    for split in ('train', 'test'):
        for index in split_indices(split):
            path = root / split / str(labels[index]) / f'{index:04d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)


def read_config(name: str, data_root: Path, epochs: int | None) -> Config:
    """One of the configs, for the digits of ``data_root``, evaluated at its end."""
    cfg = experiments.load_config(str(CONFIGS / f'{name}.py'))
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset = dataset.get('dataset', dataset)  # inside that of the label maps
        dataset.data_root = str(data_root)
        dataset.data_prefix = 'train' if split == 'train' else 'test'
    epochs = epochs or cfg.train_cfg.max_epochs
    cfg.train_cfg.max_epochs = cfg.train_cfg.val_interval = epochs
    return cfg


def plan_students(data_root: Path, label_root: Path, args) -> list[Run]:
    """The runs with label maps and without, seeds outermost."""
    configs = {n: read_config(x, data_root, args.epochs) for n, x in STUDENTS.items()}
    configs['with'].train_dataloader.dataset.label_root = str(label_root)
    return [
        experiments.make_run(name, seed, cfg, {})
        for seed in range(args.seeds)
        for name, cfg in configs.items()
    ]


def main(argv: list[str]) -> None:
    parser = experiments.ArgumentParser(
        prog='digits_token_labeling.py', description=__doc__
    )
    # The learning rate warms up for 3 epochs.
    epochs = experiments.number(4)
    parser.add_argument('--epochs', type=epochs, help="instead of the configs'")
    parser.add_argument('--teacher-epochs', type=epochs, help="instead of the config's")
    experiments.add_run_options(
        parser, work_dir='work_dirs/digits_token_labeling', seeds=3
    )
    args = parser.parse_args(argv)
    experiments.check_run_options(args)

    data_root = args.work_dir / 'digits'
    write_digits(data_root)
    cfg = read_config(TEACHER, data_root, args.teacher_epochs)
    teacher = experiments.make_run('teacher', 0, cfg, {})
    (result,) = experiments.run_all([teacher], args.work_dir, 1)
    top1 = experiments.final(result)
    checkpoint = experiments.last_checkpoint(args.work_dir / 'runs' / teacher.key)
    # Named after the teacher, so that a student's key says whose maps it learned.
    label_root = args.work_dir / f'token_labels-{teacher.key}'
    counts = generate_token_labels(
        experiments.load_trained(cfg, checkpoint),
        str(data_root / 'train'),
        str(label_root),
        size=24,
        batch_size=64,
        num_workers=0,
        teacher_name=TEACHER,
        preview=6,
        progress=False,
    )
    print(
        f'Teacher: top-1 {top1:.2f} %, {counts["written"]} label maps written, '
        f'{counts["kept"]} there before',
        flush=True,
    )

    runs = plan_students(data_root, label_root, args)
    without = read_config(STUDENTS['without'], data_root, args.epochs)
    record = experiments.open_record(args, without, teacher=teacher.key)
    values = {name: [] for name in STUDENTS}
    results = experiments.run_all(runs, args.work_dir, args.jobs, record)
    for run, result in zip(runs, results, strict=True):
        values[run.setting].append(experiments.final(result))

    names = [f'seed {i}' for i in range(args.seeds)]
    heads = ['token labeling', *names, 'mean', 'std']
    lines = [f'| {" | ".join(heads)} |', '| --- ' * len(heads) + '|']
    for name, found in values.items():
        spread = np.std(found, ddof=1) if len(found) > 1 else 0
        cells = ' | '.join(f'{x:.2f}' for x in [*found, np.mean(found), spread])
        lines.append(f'| {name} | {cells} |')
    table = '\n'.join(lines)
    print(f'\nTop-1 in % on the 360 test digits:\n\n{table}')
    write_text(args.work_dir / 'results.md', table + '\n')
    summary = json.dumps(dict(teacher=top1, **values), indent=1)
    write_text(args.work_dir / 'results.json', summary)
    print(f'\nWritten to {args.work_dir}: results.md, results.json')
    print(f'Label maps to look at: {label_root}/preview.png')


if __name__ == '__main__':
    experiments.run_cli(main, 'digits_token_labeling.py')

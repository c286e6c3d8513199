"""The options of training and testing.

They are those of mmpretrain's own ``tools/train.py`` and ``tools/test.py``, for
classification and segmentation configs alike; which of the two a config is for is its
``default_scope``.
"""

import argparse

from .parser import ArgumentParser, add_cfg_options


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share."""
    parser.add_argument('config', help='path of the config')
    parser.add_argument(
        '--work-dir',
        help='where logs and checkpoints go (default: work_dir of the config, else '
        './work_dirs/<name of the config>)',
    )
    parser.add_argument(
        '--amp',
        action='store_true',
        help='automatic mixed precision; bfloat16 where there is no accelerator',
    )
    add_cfg_options(parser)
    parser.add_argument(
        '--no-pin-memory', action='store_true', help='no pinned memory for batches'
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher of a distributed run',
    )
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS
    )


def parse_train_args(argv: list) -> argparse.Namespace:
    """Parse the options of training."""
    parser = ArgumentParser(prog='train.py', description='Train a model.')
    add_common_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='resume from this checkpoint or, without a value, from the latest one '
        'in the work dir',
    )
    parser.add_argument(
        '--no-validate', action='store_true', help='do not evaluate during training'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the batch size over auto_scale_lr.'
        'base_batch_size of the config',
    )
    parser.add_argument(
        '--no-persistent-workers',
        action='store_true',
        help='start the data-loading workers again every epoch',
    )
    parser.add_argument(
        '--skip-corrupt-images',
        action='store_true',
        help='leave out training images that cannot be read, naming them in the log '
        '(default: end with the name of the first)',
    )
    args = parser.parse_args(argv)
    named = args.resume not in (None, 'auto')
    parser.check_paths([args.config], [args.resume] if named else [])
    return args


def parse_test_args(argv: list) -> argparse.Namespace:
    """Parse the options of testing."""
    parser = ArgumentParser(
        prog='test.py', description='Test (and evaluate) a checkpoint.'
    )
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='path or address of the checkpoint')
    parser.add_argument(
        '--out',
        help='file for the results: .pkl for predictions; .json, .yaml or .pkl for '
        'metrics. With a segmentation config a folder, for the label maps',
    )
    parser.add_argument(
        '--out-item',
        choices=['metrics', 'pred'],
        help='what --out receives (default: pred)',
    )
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument(
        '--show', action='store_true', help='show the predictions in a window'
    )
    parser.add_argument(
        '--interval', type=int, default=1, help='draw every n-th prediction'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds that a window stays'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: tta_pipeline and tta_model of the config or, for '
        'classification, the mean over an image and its mirror image, if the training '
        'mirrors images too',
    )
    parser.add_argument(
        '--allow-partial',
        action='store_true',
        help='test a checkpoint that fits the model only in part',
    )
    args = parser.parse_args(argv)
    parser.check_paths([args.config], [args.checkpoint])
    return args

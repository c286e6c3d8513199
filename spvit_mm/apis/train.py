"""Training by command line, with the options of mmpretrain's ``tools/train.py``."""

import argparse
import os.path as osp
from glob import escape, glob

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

from ..engine.data_checks import building_data
from ..utils import UserError
from .cli import add_common_arguments, building
from .configs import (
    add_hook,
    apply_common,
    build_runner,
    check_checkpoint,
    set_dataloader_defaults,
    show_progress,
)

# Where mmengine's AmpOptimWrapper runs.
SCALING_DEVICES = ('cuda', 'npu', 'mlu', 'musa')


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of training."""
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


def _set_precision(wrapper: dict, amp: bool) -> None:
    """Choose the optimizer wrapper of mixed precision that the machine has."""
    kind = wrapper.get('type', 'OptimWrapper')
    if amp and kind == 'OptimWrapper':
        kind = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    elif amp and kind not in ('AmpOptimWrapper', 'mmpretrain.BFloat16OptimWrapper'):
        raise UserError(
            f'--amp works with OptimWrapper and AmpOptimWrapper, and the config has '
            f'{kind}. Set optim_wrapper.type in the config.'
        )
    if kind == 'AmpOptimWrapper' and get_device() not in SCALING_DEVICES:
        print(
            f'Mixed precision on {get_device()}: bfloat16 autocast without loss '
            'scaling (BFloat16OptimWrapper).'
        )
        kind = 'mmpretrain.BFloat16OptimWrapper'
        wrapper.pop('loss_scale', None)
        wrapper.pop('dtype', None)
    wrapper['type'] = kind


def find_resume_checkpoint(work_dir: str) -> str:
    """The latest checkpoint of a work dir.

    Args:
        work_dir (str): A folder in which a training ran.

    Returns:
        str: The path of the checkpoint. Where the folder has been moved since, the
        file of the same name in it.

    Raises:
        UserError: If there is none; it says where was looked and what to do.
    """
    pointer = osp.join(work_dir, 'last_checkpoint')
    there = sorted(glob(osp.join(escape(work_dir), '*.pth')))
    choices = (
        f' Checkpoints in that folder: {", ".join(map(osp.basename, there[-5:]))}; '
        'name one with --resume PATH.'
        if there
        else ''
    )
    if not osp.isfile(pointer):
        raise UserError(
            f'There is nothing to resume: {pointer} does not exist.{choices} Leave out '
            '--resume to start a new training, or give the --work-dir of the one to '
            'resume.'
        )
    with open(pointer) as file:
        path = file.read().strip()
    if not path:
        raise UserError(
            f'{pointer}, which names the latest checkpoint, is empty.{choices}'
        )
    moved = osp.join(work_dir, osp.basename(path))
    if '://' not in path and not osp.exists(path) and osp.isfile(moved):
        return moved
    if '://' not in path and not osp.isfile(path):
        raise UserError(
            f'{pointer} names {path}, which does not exist.{choices} Leave out --resume '
            'to start a new training.'
        )
    return path


def apply_train_options(cfg: Config, args) -> Config:
    """Apply the parsed options of training to a config, in place.

    Raises:
        UserError: For options that do not fit the config or the machine.
    """
    needed = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    apply_common(cfg, args, needed)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    _set_precision(cfg.optim_wrapper, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UserError(
                '--auto-scale-lr needs the batch size that the learning rate of the '
                'config is for: set auto_scale_lr=dict(base_batch_size=...) there.'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        if args.resume == 'auto':
            cfg.load_from = find_resume_checkpoint(cfg.work_dir)
        else:
            cfg.load_from = args.resume
    if cfg.get('load_from'):
        check_checkpoint(cfg.load_from)
    set_dataloader_defaults(cfg, args, ('train_dataloader', 'val_dataloader'))
    add_hook(cfg, 'LoadReportHook')
    corrupt = {'corrupt_images': 'skip'} if args.skip_corrupt_images else {}
    add_hook(cfg, 'DataCheckHook', **corrupt)
    return cfg


def warn_of_checkpoints(runner) -> None:
    """Warn of an earlier training's checkpoints, which a new one overwrites.

    Running again into the same folder is usual, so it is no error.
    """
    paths = sorted(glob(osp.join(escape(runner.work_dir), '*.pth')), key=osp.getmtime)
    if paths and not runner.cfg.get('resume'):
        shown = ['...'] * (len(paths) > 3) + [osp.basename(path) for path in paths[-3:]]
        runner.logger.warning(
            f'{runner.work_dir} holds checkpoints of an earlier training '
            f'({", ".join(shown)}). This one starts anew and overwrites those of the '
            'same name. To keep them, stop it and continue with --resume or choose '
            'another --work-dir.'
        )


def run_training(cfg: Config) -> Runner:
    """Train what a config describes, its data sets checked first.

    Returns:
        Runner: The runner, after training.
    """
    runner = build_runner(cfg)
    with building_data(cfg.train_dataloader, 'training'):
        loop = runner.train_loop
    if runner._val_loop is not None:
        with building_data(cfg.val_dataloader, 'validation'):
            runner.val_loop  # noqa: B018 (a property that builds)
    show_progress(runner, loop.dataloader)
    if loop.max_iters == 0:
        raise UserError(
            'There is nothing to train: the training data makes no batch of '
            f'{cfg.train_dataloader.get("batch_size")}. Lower the batch size or set '
            'drop_last=False.'
        )
    # Built inside runner.train(), where a mistake would end in its stack.
    hints = {
        'optim_wrapper': '',
        'param_scheduler': ' (its warm-up must end before train_cfg does)',
    }
    for part, hint in hints.items():
        build = building(f'{part} of {cfg.filename} cannot be built{hint}')
        setattr(runner, f'build_{part}', build(getattr(runner, f'build_{part}')))
    warn_of_checkpoints(runner)
    runner.train()
    return runner

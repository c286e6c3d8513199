"""Training by command line: what lies between its options and ``runner.train()``."""

import argparse
import os.path as osp
import re
from glob import escape, glob
from math import inf
from typing import Optional

from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.device import get_device
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import CheckpointLoader, EpochBasedTrainLoop, Runner
from torch import nn

from ..engine.hooks import DataCheckHook, FiniteHook, LoadReportHook, ResumeReportHook
from ..utils import UserError, unwrap_model
from .cli import building
from .config_checks import check_config
from .configs import check_checkpoint
from .runner import (
    add_hook,
    build_loop,
    build_runner,
    merge_common_args,
    set_dataloader_defaults,
    show_progress,
)
from .schedule import LENGTHS, shorten_schedulers

# What training reads of a config.
ENTRIES = (
    *('model', 'data_preprocessor', 'train_cfg', 'train_dataloader', 'optim_wrapper'),
    *('param_scheduler', 'val_cfg', 'val_dataloader', 'val_evaluator'),
    *('default_hooks', 'custom_hooks'),
)
# Where mmengine's AmpOptimWrapper runs.
SCALING_DEVICES = ('cuda', 'npu', 'mlu', 'musa')


def merge_train_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Apply the parsed options of training to a config, in place.

    Raises:
        UserError: For options that do not fit the config or the machine.
    """
    needed = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    merge_common_args(cfg, args, needed)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    check_config(cfg, *ENTRIES)
    if (cfg.model.get('backbone') or {}).get('deploy'):
        raise UserError(
            'model.backbone.deploy=True is for testing: its priors are constants, '
            'which do not learn. Leave it out, and fold the priors of what was trained '
            'with tools/model_converters/reparameterize_model.py.'
        )
    set_precision(cfg.optim_wrapper, args.amp)
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise UserError(
                '--auto-scale-lr needs the batch size that the learning rate of the '
                'config is for: set auto_scale_lr=dict(base_batch_size=...) there.'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        found = args.resume
        if found == 'auto':
            found = find_resume_checkpoint(cfg.work_dir)
        # A new training starts from the weights of the config, if it names any.
        cfg.resume = found is not None
        cfg.load_from = found or cfg.get('load_from')
    if cfg.get('load_from'):
        check_checkpoint(cfg.load_from)
    set_dataloader_defaults(cfg, args, ('train_dataloader', 'val_dataloader'))
    add_hook(cfg, LoadReportHook)
    add_hook(cfg, FiniteHook)
    add_hook(cfg, ResumeReportHook)
    corrupt = {'corrupt_images': 'skip'} if args.skip_corrupt_images else {}
    add_hook(cfg, DataCheckHook, **corrupt)
    return cfg


def set_precision(wrapper: dict, amp: bool = False) -> None:
    """Choose the optimizer wrapper of mixed precision that the machine has."""
    kind = wrapper.get('type', 'OptimWrapper')
    name = kind.split('.')[-1] if isinstance(kind, str) else kind.__name__
    if amp and name not in ('OptimWrapper', 'AmpOptimWrapper', 'BFloat16OptimWrapper'):
        raise UserError(
            '--amp works with OptimWrapper and AmpOptimWrapper, and the config has '
            f'{name}. Set optim_wrapper.type in the config.'
        )
    if amp and name == 'OptimWrapper':
        name = wrapper['type'] = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    if name == 'AmpOptimWrapper' and get_device() not in SCALING_DEVICES:
        print(
            f'Mixed precision on {get_device()}: bfloat16 autocast without loss '
            'scaling (BFloat16OptimWrapper).'
        )
        wrapper['type'] = 'mmpretrain.BFloat16OptimWrapper'
        wrapper.pop('loss_scale', None)
        wrapper.pop('dtype', None)


def find_resume_checkpoint(work_dir: str) -> Optional[str]:
    """The latest checkpoint of a work dir.

    A job that is started again and again with ``--resume`` finds none at first, and
    so starts a new training. Where there are checkpoints, or was one, and the latest
    cannot be told, a new training would lose them: that is an error.

    Args:
        work_dir (str): A folder in which a training ran, or will.

    Returns:
        str | None: The path of the checkpoint. Where the folder has been moved since,
        the file of the same name in it. None where no training has left a checkpoint
        to resume; the best one (``best_*.pth``) has no optimizer state.

    Raises:
        UserError: If ``last_checkpoint`` is absent beside several checkpoints, is
            empty, or names a file that does not exist.
    """
    pointer = osp.join(work_dir, 'last_checkpoint')
    names = sorted(map(osp.basename, glob(osp.join(escape(work_dir), '*.pth'))))
    names = [name for name in names if not name.startswith('best_')]
    if not osp.isfile(pointer):
        if not names:
            return None
        # A kill after the first checkpoint and before the pointer to it.
        if len(names) == 1 and re.fullmatch(r'(epoch|iter)_\d+\.pth', names[0]):
            return osp.join(work_dir, names[0])
        problem = f'{pointer}, which names the latest checkpoint, does not exist'
    else:
        with open(pointer) as file:
            path = file.read().strip()
        moved = osp.join(work_dir, osp.basename(path))
        if '://' in path or osp.isfile(path):
            return path
        if path and osp.isfile(moved):
            return moved
        named = f'names {path}, which does not exist' if path else 'is empty'
        problem = f'{pointer}, which names the latest checkpoint, {named}'
    there = f'that folder holds {", ".join(names[-5:])}; ' if names else ''
    raise UserError(
        f'{problem}: {there}name a checkpoint with --resume PATH, or choose another '
        '--work-dir or leave out --resume to start a new training.'
    )


def build_trainer(cfg: Config, args: argparse.Namespace) -> Runner:
    """Build the runner of a config and all that it trains with.

    mmengine builds data, optimizer and schedulers within ``runner.train()``, where a
    mistake in the config would end in its stack. It leaves alone what is built.

    Args:
        cfg (Config): The config, the options applied to it.
        args (argparse.Namespace): The parsed options.

    Returns:
        Runner: The runner, ready for ``train()``.

    Raises:
        UserError: For a mistake in the config, and for data that makes no batch.
    """
    runner = build_runner(cfg)
    plain = isinstance(runner, Runner)  # FlexibleRunner and others have other parts
    if plain:
        _check_starts(unwrap_model(runner.model))
    loop = build_loop(runner, 'train', 'training')
    endless = isinstance(loop.dataloader.sampler, InfiniteSampler)
    if loop.max_iters == 0 or (len(loop.dataloader) == 0 and not endless):
        raise UserError(
            'There is nothing to train: the training data makes no batch of '
            f'{cfg.train_dataloader.get("batch_size")}. Lower the batch size or set '
            'drop_last=False.'
        )
    show_progress(runner, loop)
    if cfg.get('val_cfg') is not None:
        build_loop(runner, 'val', 'validation')
    if plain:
        if any(name in (args.cfg_options or {}) for name in LENGTHS):
            _shorten_schedule(runner)
        _build_optimizer(runner)
    _warn_of_start(runner, args)
    return runner


def _check_starts(model: nn.Module) -> None:
    """Raise a UserError where an ``init_cfg`` loads next to nothing, or cannot load.

    mmengine asserts where no name has the prefix, and else warns with a list of names.
    """
    for where, module in model.named_modules():
        init_cfgs = getattr(module, 'init_cfg', None) or []
        for init_cfg in [init_cfgs] if isinstance(init_cfgs, dict) else init_cfgs:
            if init_cfg['type'] not in ('Pretrained', PretrainedInit):
                continue
            path, prefix = init_cfg['checkpoint'], init_cfg.get('prefix')
            check_checkpoint(path)
            loaded = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
            names = loaded.get('state_dict', loaded)
            start = 'module.' if prefix is None else prefix.rstrip('.') + '.'
            found = {
                name.removeprefix(start)
                for name in names
                if prefix is None or name.startswith(start)
            }
            own = set(module.state_dict())
            if 10 * len(own & found) < len(own):
                raise UserError(
                    f'The init_cfg of {where or "the model"} would load '
                    f'{len(own & found)} of its {len(own)} parameters and buffers: '
                    f'it looks for names such as {_some(own, prefix)}, and {path} has '
                    f'{_some(names)}. Choose a part of the file with `prefix` (as '
                    "prefix='backbone' for the backbone of a classifier), and convert "
                    'one of another codebase with tools/model_converters/convert.py.'
                )


def _some(names, prefix: Optional[str] = None) -> str:
    start = '' if prefix is None else prefix.rstrip('.') + '.'
    return ', '.join(start + name for name in sorted(names)[:: len(names) // 4 + 1])


def _shorten_schedule(runner: Runner) -> None:
    """Let the schedulers of a runner end with its training, and say what that drops."""
    loop, schedulers = runner.train_loop, runner.param_schedulers
    counts_epochs = isinstance(loop, EpochBasedTrainLoop)
    lengths = {True: loop.max_epochs if counts_epochs else inf, False: loop.max_iters}

    def fit(group):
        kept, left_out = shorten_schedulers(group, lengths)
        if left_out:
            runner.logger.warning(
                'This training is shorter than the schedule of its config. Left out: '
                f'{"; ".join(left_out)}.'
            )
        return kept

    if isinstance(schedulers, dict) and 'type' not in schedulers:
        # Several optimizers, each with its own.
        runner.param_schedulers = {name: fit(x) for name, x in schedulers.items()}
    elif schedulers:
        runner.param_schedulers = fit(schedulers)


def _build_optimizer(runner: Runner) -> None:
    """Build the optimizer and the schedulers of a runner, in the order of train()."""
    name = runner.cfg.filename
    with building(f'optim_wrapper of {name}'):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    # Before the schedulers, which keep the first learning rate; and only once.
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    runner.auto_scale_lr = None
    if runner.param_schedulers is not None:
        with building(
            f'param_scheduler of {name} (its warm-up must end before train_cfg does)'
        ):
            runner.param_schedulers = runner.build_param_scheduler(
                runner.param_schedulers
            )


def _warn_of_start(runner: Runner, args: argparse.Namespace) -> None:
    """Warn of a new training where the work dir or the options speak of another.

    Running again into the same folder is usual, so it is no error.
    """
    if runner.cfg.get('resume'):
        return
    paths = sorted(glob(osp.join(escape(runner.work_dir), '*.pth')), key=osp.getmtime)
    if args.resume is not None:
        runner.logger.warning(
            f'There is nothing to resume in {runner.work_dir}: a new training starts.'
        )
    elif paths:
        shown = ['...'] * (len(paths) > 3) + [osp.basename(path) for path in paths[-3:]]
        runner.logger.warning(
            f'{runner.work_dir} holds checkpoints of an earlier training '
            f'({", ".join(shown)}). This one starts anew and overwrites those of the '
            'same name. To keep them, stop it and continue with --resume or choose '
            'another --work-dir.'
        )

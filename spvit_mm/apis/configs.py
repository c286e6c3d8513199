"""From a config to what it describes, for classification and segmentation alike.

Which of the two a config is for is its ``default_scope``.
"""

import os
import os.path as osp
import zipfile
from glob import escape, glob
from typing import Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.hooks import LoggerHook
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner

from ..engine.hooks.load_report import load_whole_checkpoint
from ..utils import UserError
from .cli import building


def load_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config and change entries of it.

    Args:
        path (str): The config's path.
        options (dict, optional): Dotted names and their new values.

    Returns:
        Config: The config.

    Raises:
        UserError: For a path that is no config, a config that cannot be read, or an
            option that does not fit it.
    """
    if osp.isdir(path):
        inside = sorted(glob(osp.join(escape(path), '*.py')))[:5]
        raise UserError(
            f'The config {path} is a folder. Give a config file'
            + (f', such as {", ".join(inside)}.' if inside else '.')
        )
    if not osp.isfile(path):
        raise UserError(f'The config {path} does not exist (seen from {os.getcwd()}).')
    if osp.splitext(path)[1] not in ('.py', '.json', '.yaml', '.yml'):
        raise UserError(f'The config {path} must end in .py, .json, .yaml or .yml.')
    try:
        cfg = Config.fromfile(path)
    except UserError:
        raise
    except Exception as error:  # a config is code: it can raise anything
        raise UserError(
            f'The config {path} cannot be read: {type(error).__name__}: {error}'
        ) from error
    if options:
        with building('--cfg-options does not fit the config'):
            cfg.merge_from_dict(options)
    return cfg


def scope_of(cfg: Config) -> str:
    return cfg.get('default_scope') or 'mmengine'


def image_shape(cfg: Config, given: Optional[list] = None) -> tuple[int, int]:
    """Height and width of the images of a config's model.

    Args:
        cfg (Config): The config.
        given (list[int], optional): What the user asks for: both, or one number for
            both. Defaults to None: ``img_size`` of the backbone, else 224.

    Raises:
        UserError: For anything but one or two positive numbers, or without a model.
    """
    if cfg.get('model') is None:
        raise UserError(f'The config {cfg.filename} has no model.')
    shape = given or cfg.model.get('backbone', {}).get('img_size') or 224
    shape = [shape] if isinstance(shape, int) else list(shape)
    if len(shape) > 2 or min(shape) < 1:
        raise UserError(f'--shape takes one or two positive numbers, got {shape}.')
    return shape[0], shape[-1]


def check_checkpoint(path: str) -> None:
    """Raise a UserError for a path that is not a whole checkpoint file.

    Addresses (``https://...``) are left to mmengine.
    """
    if '://' in path:
        return
    path = osp.expanduser(path)
    if osp.isdir(path):
        inside = sorted(glob(osp.join(escape(path), '*.pth')))
        raise UserError(
            f'The checkpoint {path} is a folder. Give a file'
            + (f': {", ".join(inside[:5])}.' if inside else '; it holds no .pth file.')
        )
    if not osp.isfile(path):
        raise UserError(
            f'The checkpoint {path} does not exist (seen from {os.getcwd()}).'
        )
    if not zipfile.is_zipfile(path):
        with open(path, 'rb') as file:
            start = file.read(1)
        if start != b'\x80':  # a pickle, as torch < 1.6 wrote them
            raise UserError(
                f'{path} ({osp.getsize(path)} bytes) is not a checkpoint, or only a '
                'part of one.'
            )


def build_model(cfg: Config) -> torch.nn.Module:
    """Build the model of a config, in the config's scope.

    Raises:
        UserError: If there is none, or it cannot be built.
    """
    if cfg.get('model') is None:
        raise UserError(f'The config {cfg.filename} has no model.')
    init_default_scope(scope_of(cfg))
    settings = cfg.model.copy()
    if cfg.get('data_preprocessor'):
        settings.setdefault('data_preprocessor', cfg.data_preprocessor)
    with building(f'The model of {cfg.filename} cannot be built'):
        return MODELS.build(settings)


def load_trained_model(cfg: Config, checkpoint: str) -> tuple[torch.nn.Module, dict]:
    """Build the model of a config and load a checkpoint that must fit it wholly.

    Returns:
        tuple: The model, in evaluation mode, and the checkpoint.

    Raises:
        UserError: For a config or checkpoint that cannot be used.
    """
    check_checkpoint(checkpoint)
    model = build_model(cfg)
    with building(f'{checkpoint} cannot be loaded'):
        return model.eval(), load_whole_checkpoint(model, checkpoint)


def apply_common(cfg: Config, args, needed: tuple) -> None:
    """Apply what training and testing share: work_dir, launcher, needed entries."""
    absent = [key for key in needed if cfg.get(key) is None]
    if absent:
        raise UserError(
            f'The config {args.config} lacks {", ".join(absent)}. It needs '
            f'{", ".join(needed)}.'
        )
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(args.config))[0]
        cfg.work_dir = osp.join('./work_dirs', name)
    if osp.exists(cfg.work_dir) and not osp.isdir(cfg.work_dir):
        raise UserError(f'The work dir {cfg.work_dir} is a file, not a folder.')

    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise UserError(
            '--launcher pytorch needs processes that torch.distributed.run has '
            'started. Use tools/dist_train.sh or tools/dist_test.sh.'
        )


def distribute_on_cpu(cfg: Config) -> None:
    """Let the processes of ``--launcher pytorch`` meet on a machine without GPUs.

    mmengine's launcher takes a CUDA device for every process.
    """
    if cfg.get('launcher') != 'pytorch' or get_device() != 'cpu':
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or ConfigDict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper.device_ids = None
    cfg.model_wrapper_cfg = wrapper


def set_dataloader_defaults(cfg: Config, args, names: tuple) -> None:
    """Give the data loaders of a config the defaults of mmpretrain's tools.

    Raises:
        UserError: For a batch size or a number of workers that cannot be.
    """
    for name in names:
        loader = cfg.get(name)
        if not isinstance(loader, dict):
            continue
        for key, least in (('batch_size', 1), ('num_workers', 0)):
            value = loader.get(key, least)
            if key == 'batch_size' and value is None:
                continue  # the data set makes the batches
            if not isinstance(value, int) or value < least:
                raise UserError(
                    f'{name}.{key} must be an integer of {least} or more, got '
                    f'{value!r}.'
                )
        loader.setdefault('pin_memory', torch.cuda.is_available())
        if args.no_pin_memory:
            loader.pin_memory = False
        workers = loader.get('num_workers', 0) > 0
        loader.setdefault('persistent_workers', workers)
        if not workers or getattr(args, 'no_persistent_workers', False):
            loader.persistent_workers = False
        # Segmentation batches hold images of several sizes and are not stacked.
        if scope_of(cfg) == 'mmpretrain':
            loader.setdefault('collate_fn', {'type': 'default_collate'})


def add_hook(cfg: Config, hook_type: str, **arguments) -> None:
    """Add a hook of ours to a config that has none of this type; set arguments."""
    hooks = list((cfg.get('default_hooks') or {}).values())
    hooks += list(cfg.get('custom_hooks') or [])
    for hook in hooks:
        if hook is not None and str(hook.get('type')).split('.')[-1] == hook_type:
            hook.update(arguments)
            return
    cfg.custom_hooks = [
        *(cfg.get('custom_hooks') or []),
        dict(type=f'mmpretrain.{hook_type}', **arguments),
    ]


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config; mistakes in it are UserErrors."""
    distribute_on_cpu(cfg)
    with building(f'The config {cfg.filename} cannot be built'):
        if 'runner_type' in cfg:
            return RUNNERS.build(cfg)
        return Runner.from_cfg(cfg)


def show_progress(runner, dataloader) -> None:
    """Let short loops log too: at least four lines, each with the remaining time."""
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook):
            hook.interval = min(hook.interval, max(1, len(dataloader) // 4))

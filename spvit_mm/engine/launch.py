"""What the command lines share: configs, their options, and errors told in words.

The options are those of mmpretrain's own ``tools/train.py`` and ``tools/test.py``,
for classification and segmentation configs alike; which of the two a config is for
is its ``default_scope``.
"""

import argparse
import atexit
import inspect
import os
import os.path as osp
import sys
import traceback
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from copy import deepcopy
from glob import escape, glob
from typing import Optional

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS, MODELS, RUNNERS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.engine import VisualizationHook

from ..utils import CorruptImageError, UserError, describe_error
from .data_checks import building_data
from .hooks.load_report import load_whole_checkpoint

TRACEBACK = 'SPVIT_MM_TRACEBACK'
# Where mmengine's AmpOptimWrapper runs.
SCALING_DEVICES = ('cuda', 'npu', 'mlu', 'musa')


# Errors


def run_cli(main: Callable, prog: str, argv: Optional[list] = None) -> None:
    """Run a command line; a user's mistake is one message and exit code 2.

    Args:
        main (callable): Takes the list of arguments.
        prog (str): Name of the command, put before the message.
        argv (list, optional): The arguments. Defaults to those of the process.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        # One that a data-loading worker raised comes with the worker's traceback.
        message = str(error).rsplit(f'{CorruptImageError.__name__}: ', 1)[-1]
        print(f'{prog}: error: {message.strip()}', file=sys.stderr)
        raise SystemExit(2) from None
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == 'gloo':
        # Threads of gloo outlive the interpreter's end, which now and then makes it
        # "terminate called" with all work done; destroying the group does not help.
        # Loggers, trackers and data workers still get their own end.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


@contextmanager
def building(what: str):
    """Turn errors of building from a config into a UserError.

    Set the environment variable SPVIT_MM_TRACEBACK to see where they were raised.
    """
    try:
        yield
    except UserError:
        raise
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        KeyError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        reason = describe_error(error)
        raise UserError(
            f'{what}: {type(error).__name__}: {reason} (set {TRACEBACK}=1 to see '
            'where this was raised)'
        ) from error


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose ``key=value`` options end in a usage error as well."""

    def parse_args(self, args=None, namespace=None):
        try:
            return super().parse_args(args, namespace)
        except ValueError as error:
            self.error(f'--cfg-options takes key=value pairs ({error})')


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that changes entries of the config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='change entries of the config before all other options act on it: '
        'model.backbone.depth=12, key="[a,b]", key="[(a,b),(c,d)]" (quoted, without '
        'spaces)',
    )


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


# Configs


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


# Training


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


# Testing


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of testing."""
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
        'classification, the mean over an image and its mirror image',
    )
    parser.add_argument(
        '--allow-partial',
        action='store_true',
        help='test a checkpoint that fits the model only in part',
    )


def _set_visualization(cfg: Config, args) -> None:
    """Switch on the visualization hook, mmsegmentation's or ours for mmpretrain's."""
    if args.interval < 1:
        raise UserError(f'--interval must be 1 or more, got {args.interval}.')
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise UserError(
            '--show and --show-dir need a visualization hook in the config: '
            "default_hooks=dict(visualization=dict(type='VisualizationHook')), or "
            "'SegVisualizationHook' for segmentation."
        )
    hook_class = hook.type
    if isinstance(hook_class, str):
        with HOOKS.switch_scope_and_registry(scope_of(cfg)) as registry:
            hook_class = registry.get(hook_class)
    if hook_class is None:
        raise UserError(f'The visualization hook {hook.type} is not registered.')
    if hook_class is VisualizationHook:
        hook.type = 'mmpretrain.ClsVisualizationHook'
    known = inspect.signature(hook_class).parameters
    hook['enable' if 'enable' in known else 'draw'] = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    hook.interval = args.interval
    if args.show_dir is None:
        return
    if 'out_dir' in known:
        hook.out_dir = args.show_dir
    else:
        cfg.visualizer.save_dir = args.show_dir


def _set_tta(cfg: Config) -> None:
    """Wrap the model for test-time augmentation and set its pipeline."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        if scope_of(cfg) != 'mmpretrain':
            raise UserError('--tta needs tta_model and tta_pipeline in the config.')
        *load, pack = cfg.test_dataloader.dataset.pipeline
        flips = [{'type': 'RandomFlip', 'prob': p} for p in (1.0, 0.0)]
        cfg.setdefault('tta_model', {'type': 'AverageClsScoreTTA'})
        cfg.setdefault(
            'tta_pipeline',
            [*load, {'type': 'TestTimeAug', 'transforms': [flips, [pack]]}],
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = deepcopy(cfg.tta_pipeline)


def apply_test_options(cfg: Config, args) -> Config:
    """Apply the parsed options of testing to a config, in place.

    Raises:
        UserError: For options that do not fit the config or each other.
    """
    needed = ('model', 'test_dataloader', 'test_cfg', 'test_evaluator')
    apply_common(cfg, args, needed)
    init_default_scope(scope_of(cfg))
    check_checkpoint(args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.out_item is not None and args.out is None:
        raise UserError('--out-item says what --out receives: give --out too.')
    suffix = osp.splitext(args.out or '')[1]
    segmentation = scope_of(cfg) == 'mmseg'
    if args.out is not None and args.out_item == 'metrics':
        if suffix not in ('.json', '.yaml', '.yml', '.pkl', '.pickle'):
            raise UserError(f'--out must end in .json, .yaml or .pkl, got {args.out}.')
    elif args.out is not None and suffix not in ('.pkl', '.pickle'):
        if not segmentation or suffix:
            raise UserError(f'--out must end in .pkl, got {args.out}.')
        if not isinstance(cfg.test_evaluator, dict):
            raise UserError('--out with a folder needs a single test_evaluator.')
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
        args.out = None
    if args.out is not None and osp.isdir(args.out):
        raise UserError(f'--out must be a file, and {args.out} is a folder.')
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show or args.show_dir is not None:
        if args.tta and not segmentation:
            # mmpretrain's hook draws on the input, here a list of images.
            raise UserError(
                '--show and --show-dir cannot be combined with --tta: test twice, '
                'once with each.'
            )
        _set_visualization(cfg, args)
    if args.tta:
        _set_tta(cfg)
    set_dataloader_defaults(cfg, args, ('test_dataloader',))
    add_hook(cfg, 'LoadReportHook', partial='warn' if args.allow_partial else 'error')
    add_hook(cfg, 'DataCheckHook')
    return cfg


# Running


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


def run_test(cfg: Config, metrics: tuple = ()) -> dict:
    """Test what a config describes, its data set checked first.

    Args:
        cfg (Config): The config, its ``load_from`` the checkpoint.
        metrics (tuple): Metrics to put beside those of the config.

    Returns:
        dict: The values of the metrics.
    """
    runner = build_runner(cfg)
    with building_data(cfg.test_dataloader, 'test'):
        loop = runner.test_loop
    show_progress(runner, loop.dataloader)
    loop.evaluator.metrics.extend(metrics)
    return runner.test()

"""What training and testing by command line have in common."""

import os
import os.path as osp
from typing import Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import master_only
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import BaseLoop, Runner
from mmengine.utils import mkdir_or_exist

from ..datasets.checks import naming_empty_data
from ..utils import UserError, check_new_folder
from .cli import building
from .configs import check_entries, scope_of

# What each launcher tells its processes, and what starts them.
LAUNCHERS = {
    'pytorch': ('RANK', 'tools/dist_train.sh or tools/dist_test.sh'),
    'slurm': ('SLURM_PROCID', 'tools/slurm_train.sh or tools/slurm_test.sh'),
    'mpi': ('OMPI_COMM_WORLD_LOCAL_RANK', 'mpirun'),
}


def merge_common_args(cfg: Config, args, needed: tuple) -> None:
    """Apply the options that training and testing share to a config, in place.

    Args:
        cfg (Config): The config.
        args (argparse.Namespace): The parsed options.
        needed (tuple[str]): Entries that the config must have.

    Raises:
        UserError: For options that do not fit the config or the machine.
    """
    check_entries(cfg, needed)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(args.config))[0]
        cfg.work_dir = osp.join('./work_dirs', name)
    if not isinstance(cfg.work_dir, str) or not cfg.work_dir.strip():
        raise UserError(
            f'--work-dir (work_dir of the config) must name a folder, got '
            f'{cfg.work_dir!r}.'
        )
    # Before what looks for checkpoints there: `~` is expanded.
    cfg.work_dir = check_new_folder(cfg.work_dir)

    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    check_launcher(args.launcher)


def check_launcher(launcher: str) -> None:
    """Raise a UserError for a launcher that has not started this process.

    And for one of more processes than there are GPUs on this machine. The processes of
    ``pytorch`` may do without any.
    """
    if launcher == 'none':
        return
    variable, starter = LAUNCHERS[launcher]
    if variable not in os.environ:
        raise UserError(
            f'--launcher {launcher} is for processes that it has started: {variable} '
            f'is not set. Use {starter}.'
        )
    if get_device() == 'cpu' and launcher != 'pytorch':
        raise UserError(
            f'--launcher {launcher} needs GPUs, and torch sees none here. '
            'tools/dist_train.sh runs several processes without GPUs.'
        )
    rank = int(os.environ['LOCAL_RANK'])
    if get_device() == 'cuda' and rank >= torch.cuda.device_count():
        raise UserError(
            f'There are more processes than the {torch.cuda.device_count()} GPUs that '
            f'torch sees here: this is number {rank}, counted from 0.'
        )


def set_dataloader_defaults(cfg: Config, args, names: tuple) -> None:
    """Give the data loaders of a config the defaults of mmpretrain's tools."""
    for name in names:
        loader = cfg.get(name)
        if not isinstance(loader, dict):
            continue
        loader.setdefault('pin_memory', torch.cuda.is_available())
        if args.no_pin_memory:
            loader.pin_memory = False
        workers = bool(loader.get('num_workers'))
        loader.setdefault('persistent_workers', workers)
        if not workers or getattr(args, 'no_persistent_workers', False):
            loader.persistent_workers = False
        # Segmentation batches hold images of several sizes and are not stacked.
        if scope_of(cfg) == 'mmpretrain':
            loader.setdefault('collate_fn', {'type': 'default_collate'})


def hook_class(cfg: Config, hook: dict) -> Optional[type]:
    """The class of a hook's config, None for a name that is not registered."""
    kind = hook.get('type')
    if not isinstance(kind, str):
        return kind
    with HOOKS.switch_scope_and_registry(scope_of(cfg)) as registry:
        return registry.get(kind)


def add_hook(cfg: Config, kind: type[Hook], **arguments) -> None:
    """Add a hook of ours to a config that has none of this class; set arguments."""
    custom_hooks = list(cfg.get('custom_hooks') or [])
    for hook in [*(cfg.get('default_hooks') or {}).values(), *custom_hooks]:
        if isinstance(hook, dict) and hook_class(cfg, hook) is kind:
            hook.update(arguments)
            return
    name = f'mmpretrain.{kind.__name__}'
    cfg.custom_hooks = [*custom_hooks, dict(type=name, **arguments)]


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


class DumpsBesideLog:
    """Lets a runner write its config beside its log, and not into the work dir.

    There lies the config of the training, under the same name.
    """

    @master_only
    def dump_config(self) -> None:
        folder = osp.join(self.work_dir, self.timestamp)
        mkdir_or_exist(folder)
        self.cfg.dump(osp.join(folder, osp.basename(self.cfg.filename or 'config.py')))


def build_runner(cfg: Config, *mixins: type) -> Runner:
    """Build the runner of a config, of its class and the mixins before it.

    Raises:
        UserError: For a mistake in the config.
    """
    cfg.work_dir = check_new_folder(cfg.work_dir)
    distribute_on_cpu(cfg)
    kind = cfg.get('runner_type', 'Runner')
    if isinstance(kind, str):
        kind = RUNNERS.get(kind)
        if kind is None:
            raise UserError(f'runner_type {cfg.runner_type!r} is not registered.')
    if mixins:
        kind = type(kind.__name__, (*mixins, kind), {})
    with building(f'What {cfg.filename} describes'):
        return kind.from_cfg(cfg)


def build_loop(runner: Runner, name: str, split: str) -> BaseLoop:
    """Build a loop of a runner with its data, which mmengine does when it is used.

    Args:
        runner (Runner): The runner.
        name (str): The loop: 'train', 'val' or 'test'.
        split (str): What to call its data: 'training', 'validation' or 'test'.

    Returns:
        BaseLoop: The loop.

    Raises:
        UserError: For a mistake in the config, and for data without images.
    """
    loader = runner.cfg[f'{name}_dataloader']
    dataset = loader.get('dataset') if isinstance(loader, dict) else None
    what = f'{name}_cfg with {name}_dataloader of {runner.cfg.filename}'
    with building(what), naming_empty_data(dataset or {}, split):
        return getattr(runner, f'{name}_loop')


def show_progress(runner: Runner, loop: BaseLoop) -> None:
    """Let short loops log too: at least four lines, each with the remaining time."""
    for hook in runner.hooks:
        if isinstance(hook, LoggerHook):
            hook.interval = min(hook.interval, max(1, len(loop.dataloader) // 4))

"""From a trained model to one whose heads attend to the offsets that they need."""

import os.path as osp
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from glob import escape, glob
from itertools import islice
from typing import Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

from spvit_mm_cli import parse_train_args

from ..datasets.subset import EXTENSIONS
from ..models import SpatialPriorAttention
from ..utils import UserError, unwrap_model, with_progress, write_checkpoint
from .cli import building
from .configs import build_model, scope_of
from .samples import read_samples
from .train import build_trainer, merge_train_args

# What a config's evaluator says in one number, if it says one of these.
METRICS = ('accuracy/top1', 'mIoU')


@contextmanager
def quiet() -> Iterator[None]:
    """Let mmengine's logger report warnings alone."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('WARNING')
    try:
        yield
    finally:
        logger.setLevel(level)


def training_images(cfg: Config, model: nn.Module, number: int) -> Iterator[Tensor]:
    """Batches of a config's training data as the model takes them, (B, 3, h, w).

    The data set is built at once, the batches one after another.

    Args:
        cfg (Config): With a ``train_dataloader``.
        model (nn.Module): For its ``data_preprocessor``.
        number (int): How many batches.

    Raises:
        UserError: For data that cannot be built.
    """
    with building(f'The training data of {cfg.filename}'):
        loader = Runner.build_dataloader(deepcopy(cfg.train_dataloader), seed=0)
    set_random_seed(0)  # for the augmentation
    # mmsegmentation's preprocessor pads crops in training alone; mmpretrain's would mix
    # images.
    training = scope_of(cfg) == 'mmseg'
    return (
        model.data_preprocessor(batch, training)['inputs']
        for batch in islice(loader, number)
    )


def picture_images(cfg: Config, model: nn.Module, paths: list) -> Iterator[Tensor]:
    """Pictures through the test pipeline, one by one, (1, 3, h, w).

    Args:
        cfg (Config): With a ``test_dataloader``.
        model (nn.Module): For its ``data_preprocessor``.
        paths (list[str]): Image files, and folders of them.

    Raises:
        UserError: For what is no picture, or a folder without any.
    """
    files = []
    for path in paths:
        inside = [path]
        if osp.isdir(path):
            found = glob(osp.join(escape(path), '**'), recursive=True)
            inside = sorted(f for f in found if f.lower().endswith(EXTENSIONS))
        elif not osp.exists(path):
            raise UserError(f'--data: the picture {path} does not exist.')
        if not inside:
            raise UserError(
                f'--data: the folder {path} holds no picture ({", ".join(EXTENSIONS)}).'
            )
        files += inside
    return (sample.inputs[None] for sample in read_samples(cfg, model, files))


def evaluation_data(cfg: Config) -> Optional[tuple[DataLoader, dict]]:
    """The test data of a config and what evaluates it; None if it has none."""
    evaluator = cfg.get('test_evaluator')
    if not cfg.get('test_dataloader') or not evaluator:
        return None
    with building(f'The test data of {cfg.filename}'):
        loader = Runner.build_dataloader(deepcopy(cfg.test_dataloader), seed=0)
    return loader, evaluator


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, evaluator) -> tuple[str, float]:
    """Test a model by its config's evaluator.

    Returns:
        tuple[str, float]: The metric's name, one of ``METRICS`` or the first that the
        evaluator has, and its value.
    """
    evaluator = Evaluator(deepcopy(evaluator))
    evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)
    model.eval()
    with quiet():
        for batch in with_progress(loader):
            evaluator.process(data_samples=model.test_step(batch), data_batch=batch)
        found = evaluator.evaluate(len(loader.dataset))
    name = next((name for name in METRICS if name in found), next(iter(found)))
    return name, float(found[name])


def time_forwards(models: list, images: Tensor, rounds: int = 5) -> list[float]:
    """Seconds of a forward of each model, median of rounds in which they take turns."""
    from torch.utils.benchmark import Timer  # imports much

    def timer(model):
        def run():
            with torch.inference_mode():
                model(images, mode='tensor')

        threads = torch.get_num_threads()
        return Timer('run()', globals={'run': run}, num_threads=threads)

    timers = [timer(model.eval()) for model in models]
    times = [[each.timeit(1).median for each in timers] for _ in range(rounds)]
    return [statistics.median(values) for values in zip(*times, strict=True)]


def masked_config(cfg: Config) -> Config:
    """The config of the same model with masks in its SP-SA layers.

    Raises:
        UserError: If it has no backbone.
    """
    cfg = deepcopy(cfg)
    backbone = cfg.model.get('backbone')
    if not isinstance(backbone, dict):
        raise UserError(f'The model of {cfg.filename} has no `backbone` to mask.')
    backbone.attn_cfg = {**(backbone.get('attn_cfg') or {}), 'masked': True}
    return cfg


def build_masked(cfg: Config, model: nn.Module) -> nn.Module:
    """Build a model with masks, that keep all offsets yet, with another's weights.

    Args:
        cfg (Config): What :func:`masked_config` returned.
        model (nn.Module): The model without masks, or with masks of its own.

    Returns:
        nn.Module: The model, in evaluation mode, where ``model`` is.

    Raises:
        UserError: If the config does not reach all of its SP-SA layers.
    """
    masked = build_model(cfg)
    missing, unknown = masked.load_state_dict(model.state_dict(), strict=False)
    bare = [
        name
        for name, module in masked.named_modules()
        if isinstance(module, SpatialPriorAttention) and module.kept is None
    ]
    if bare or unknown or any(not name.endswith('.attn.kept') for name in missing):
        raise UserError(
            f'`model.backbone.attn_cfg` of {cfg.filename} does not reach all SP-SA '
            f'layers ({", ".join(bare)}): is there another in `layer_cfgs`?'
        )
    device = next(model.parameters()).device
    return masked.to(device).eval()


def finetune_config(cfg: Config, epochs: int, lr_factor: float) -> Config:
    """The config of a short training at a low, constant learning rate.

    Epochs are counted over the training data, also where the config counts iterations.

    Args:
        cfg (Config): The config of the model, with the data and optimizer of its
            training.
        epochs (int): How many.
        lr_factor (float): Learning rate over that of the config.

    Raises:
        UserError: If the config has no ``optim_wrapper.optimizer.lr``.
    """
    cfg = deepcopy(cfg)
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if 'lr' not in optimizer:
        raise UserError(
            f'--finetune needs `optim_wrapper.optimizer.lr` in {cfg.filename}.'
        )
    optimizer.lr *= lr_factor
    cfg.param_scheduler = None
    cfg.train_cfg = ConfigDict(by_epoch=True, max_epochs=epochs)
    sampler = cfg.train_dataloader.get('sampler')
    if isinstance(sampler, dict) and 'InfiniteSampler' in str(sampler.get('type')):
        cfg.train_dataloader.sampler = ConfigDict(type='DefaultSampler', shuffle=True)
    cfg.log_processor = ConfigDict(by_epoch=True)
    hooks = cfg.get('default_hooks') or {}
    if hooks.get('checkpoint'):
        # The command writes the result itself.
        hooks.checkpoint.update(by_epoch=True, interval=-1, save_last=False)
        hooks.checkpoint.pop('save_best', None)
    cfg.resume = False
    return cfg


def finetune(
    cfg: Config, model: nn.Module, epochs: int, lr_factor: float, work_dir: str
) -> nn.Module:
    """Train a model for some more epochs of its config's data, with mmengine's Runner.

    Args:
        cfg (Config): The config of ``model``.
        model (nn.Module): Its weights and masks are where the training starts.
        epochs (int): How many.
        lr_factor (float): See :func:`finetune_config`.
        work_dir (str): For the log, and the weights that it started from.

    Returns:
        nn.Module: The trained model, in evaluation mode. It has the weights of the last
        step, also where the config averages them: a few epochs hardly move an average.

    Raises:
        UserError: For a config that cannot train.
    """
    cfg = finetune_config(cfg, epochs, lr_factor)
    cfg.load_from = osp.join(work_dir, 'start.pth')
    write_checkpoint({'state_dict': model.state_dict()}, cfg.load_from)
    options = [str(cfg.filename), '--work-dir', work_dir, '--no-validate']
    args = parse_train_args(options)
    runner = build_trainer(merge_train_args(cfg, args), args)
    runner.train()
    return unwrap_model(runner.model).eval()

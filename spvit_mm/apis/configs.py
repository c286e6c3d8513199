"""From a config and a checkpoint to a model."""

import os
import os.path as osp
import sys
from typing import Optional

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict

from spvit_mm_cli import checkpoint_problem, config_problem

from ..datasets.checks import patch_size
from ..engine.hooks.load_report import reporting_loads
from ..utils import (
    CheckpointError,
    UserError,
    check_checkpoint_file,
    describe_error,
    first_not_finite,
    safe_loader,
)
from .cli import building


def load_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config and change entries of it.

    What it imports (``custom_imports``) may be a file in the working folder.

    Args:
        path (str): The config's path.
        options (dict, optional): Dotted names and their new values.

    Returns:
        Config: The config.

    Raises:
        UserError: For a path that is no config, a config that cannot be read, or an
            option that does not fit it.
    """
    problem = config_problem(path)
    if problem:
        raise UserError(problem)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # the last place to look, so that it hides nothing
    try:
        cfg = Config.fromfile(os.path.expanduser(path))
    except Exception as error:  # a config is code: it can raise anything
        hint = ''
        if 'to load spvit_mm config' in str(error):
            hint = (
                ' Write _base_ = f\'{__import__("spvit_mm").__path__[0]}/.mim/configs'
                "/...' in place of 'spvit_mm::...'."
            )
        raise UserError(
            f'The config {path} cannot be read: {type(error).__name__}: {error}{hint}'
        ) from error
    return change_config(cfg, options)


def change_config(cfg: Config, options: Optional[dict]) -> Config:
    """Change entries of a config, in place: dotted names and their new values.

    Raises:
        UserError: For an option that does not fit the config.
    """
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError) as error:
        reason = describe_error(error)
        raise UserError(f'--cfg-options does not fit the config: {reason}') from error
    return cfg


def check_entries(cfg: Config, needed: tuple) -> None:
    """Raise a UserError, which names them, for entries that a config lacks."""
    absent = [key for key in needed if cfg.get(key) is None]
    if absent:
        raise UserError(
            f'The config {cfg.filename} lacks {", ".join(absent)}. It needs '
            f'{", ".join(needed)}.'
        )


def scope_of(cfg: Config) -> str:
    """The registry that a config is for: 'mmpretrain', 'mmseg', ...."""
    return cfg.get('default_scope') or 'mmengine'


def image_shape(cfg: Config, given: Optional[list] = None) -> tuple[int, int]:
    """Height and width of the images of a config's model.

    Args:
        cfg (Config): The config.
        given (list[int], optional): What the user asks for: both, or one number for
            both. Defaults to None: ``img_size`` of the backbone, else 224.

    Raises:
        UserError: For anything but one or two positive numbers.
    """
    model = cfg.get('model') or {}
    shape = given or model.get('backbone', {}).get('img_size') or 224
    shape = [shape] if isinstance(shape, int) else list(shape)
    if len(shape) > 2 or min(shape) < 1:
        raise UserError(f'--shape takes one or two positive numbers, got {shape}.')
    return shape[0], shape[-1]


def image_channels(cfg: Config) -> int:
    """Channels of the images of a config's model: ``in_channels`` of the backbone."""
    return (cfg.get('model') or {}).get('backbone', {}).get('in_channels', 3)


def check_size(model: torch.nn.Module, size: tuple, what: str) -> None:
    """Raise a UserError for an image that does not hold one patch of the model.

    Args:
        model (nn.Module): With a backbone.
        size (Tuple[int, int]): Height and width of the image.
        what (str): What to call it.
    """
    patch = patch_size(model)
    if patch is not None and (size[0] < patch[0] or size[1] < patch[1]):
        raise UserError(
            f'{what}: {size[0]} x {size[1]} pixels (h x w) are less than one patch of '
            f'the model, {patch[0]} x {patch[1]}.'
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
    with building(f'The model of {cfg.filename}'):
        return MODELS.build(settings)


def check_device(name: str) -> None:
    """Raise a UserError for the name of a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'{name!r} is no device; cpu, cuda and cuda:1 are.') from error
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f'There is no device {name!r}: torch sees {torch.cuda.device_count()} GPUs '
            'here.'
        )


def check_checkpoint(path: str) -> None:
    """Raise a UserError for a path that is not a whole checkpoint file.

    Addresses (``https://...``) are left to mmengine.
    """
    problem = checkpoint_problem(path)
    if problem:
        raise UserError(problem)
    if '://' not in path:
        check_checkpoint_file(path)


def beside(checkpoint: str, name: str) -> str:
    """Where a command writes unless told: beside the checkpoint.

    For one with an address (``https://...``) that is the working folder.
    """
    return name if '://' in checkpoint else osp.join(osp.dirname(checkpoint), name)


def load_trained_model(cfg: Config, checkpoint: str) -> tuple[torch.nn.Module, dict]:
    """Build the model of a config and load a checkpoint that must fit it wholly.

    The checkpoint is opened by :func:`~spvit_mm.utils.safe_loader`, from plain Python,
    too.

    Args:
        cfg (Config): The config.
        checkpoint (str): Path or address of the checkpoint.

    Returns:
        tuple: The model, in evaluation mode, and the checkpoint.

    Raises:
        UserError: For a config or checkpoint that cannot be used, or a checkpoint that
            fits only in part, or not at all, with what does not; for weights that are
            not finite.
    """
    check_checkpoint(checkpoint)
    model = build_model(cfg)
    loaded = load_whole(model, checkpoint)
    return model.eval(), loaded


def load_whole(model: torch.nn.Module, checkpoint: str) -> dict:
    """Load a checkpoint that must fit a model in every name and shape.

    Args:
        model (nn.Module): The model.
        checkpoint (str): Path or address of the checkpoint.

    Returns:
        dict: The checkpoint.

    Raises:
        UserError: For a checkpoint that cannot be used, fits only in part or not at
            all, or whose weights are not finite; with what is wrong.
    """
    check_checkpoint(checkpoint)
    with safe_loader(trust=None):
        loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    state_dict = loaded.get('state_dict', loaded)
    state_dict = {name.removeprefix('module.'): v for name, v in state_dict.items()}

    def judge(count, words):
        if words:
            raise UserError(f'{checkpoint} is not a checkpoint of this model. {words}')

    try:
        with reporting_loads(model, judge):
            load_state_dict(model, state_dict, strict=False, logger='silent')
    except UserError:
        raise
    except ValueError as error:  # a model refuses what it knows, such as a deploy form
        raise UserError(f'{checkpoint} does not fit this model: {error}') from error
    check_finite(model, checkpoint)
    return loaded


def check_finite(model: torch.nn.Module, checkpoint: str) -> None:
    """Raise a CheckpointError, which names the first, for weights that are no numbers.

    Args:
        model (nn.Module): A model that ``checkpoint`` was loaded into.
        checkpoint (str): Its path, for the message.
    """
    name = first_not_finite(model.state_dict().items())
    if name:
        raise CheckpointError(
            f'{checkpoint} holds nan or infinity, first in {name}: the training that '
            'wrote it diverged. Take an earlier checkpoint.'
        )

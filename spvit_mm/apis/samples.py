"""Models and images for the tools that show something."""

import os
import os.path as osp
from collections.abc import Callable, Iterator
from typing import NamedTuple, Optional

import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS

from ..datasets.checks import guard_files
from ..utils import UserError, first_not_finite, reverses_channels, with_progress
from .cli import building
from .configs import check_entries, check_size, load_config, load_trained_model


def load_model(config: str, checkpoint: str, options: Optional[dict] = None):
    """Build the model of a config and load a checkpoint that fits it entirely.

    Args:
        config (str): Path of the config.
        checkpoint (str): Path of the checkpoint.
        options (dict, optional): What ``--cfg-options`` changes in the config.

    Returns:
        Tuple[Config, nn.Module]: The config and the model, in eval mode.

    Raises:
        UserError: For a config or checkpoint that cannot be taken.
    """
    cfg = load_config(config, options)
    model, _ = load_trained_model(cfg, checkpoint)
    return cfg, model


def load_classifier(config: str, checkpoint: str, options: Optional[dict] = None):
    """:func:`load_model` of an image classifier; any other model is a UserError."""
    cfg, model = load_model(config, checkpoint, options)
    if not hasattr(model, 'head'):
        raise UserError(
            f'The {type(model).__name__} of {config} is no image classifier, which this '
            'command takes: it has no head.'
        )
    return cfg, model


class Sample(NamedTuple):
    """An image as the model takes it.

    Attributes:
        name (str): File name, or its number in the data set.
        picture (np.ndarray): (h, w, 3), uint8, RGB, after the test pipeline.
        inputs (Tensor): (3, h, w), normalized.
        label (int, optional): Its class, where that is known.
    """

    name: str
    picture: np.ndarray
    inputs: torch.Tensor
    label: Optional[int]


def load_samples(cfg, model, paths=None, count=4) -> list[Sample]:
    """Images through the test pipeline and the model's preprocessor.

    Args:
        cfg (Config): With a ``test_dataloader``.
        model (nn.Module): A classifier or segmentor, for its ``data_preprocessor``.
        paths (Sequence[str], optional): Image files. Defaults to None: images
            of the test data set.
        count (int): How many of the data set, evenly spread. Defaults to 4.

    Raises:
        UserError: For a file, of the data set as well, that is no picture, a picture
            smaller than a patch, or a config without test data.
    """
    check_entries(cfg, ('test_dataloader',))
    if paths:
        return list(read_samples(cfg, model, paths))
    settings = cfg.test_dataloader.dataset
    bgr = _is_bgr(settings.get('pipeline') or [], model)
    with building('The test data set'):
        dataset = DATASETS.build(settings)
    guard_files(dataset)
    count = min(count, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    return [
        _sample(model, f'image {i}', dataset[i], bgr) for i in with_progress(chosen)
    ]


def read_samples(cfg, model, paths) -> Iterator[Sample]:
    """Image files as :func:`load_samples` gives them, one by one."""
    settings = cfg.test_dataloader.dataset.get('pipeline') or []
    bgr = _is_bgr(settings, model)
    read, pipeline = _split_pipeline(settings, bgr)
    for path in paths:
        data = pipeline(read_picture(path, read))
        yield _sample(model, osp.basename(path), data, bgr)


def _kind(transform: dict) -> str:
    kind = transform['type']
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def _is_bgr(pipeline: list, model) -> bool:
    """Whether a pipeline gives BGR: read from a file, or for a model that turns it."""
    if pipeline and _kind(pipeline[0]) == 'LoadImageFromFile':
        return True
    return reverses_channels(model.data_preprocessor)


def _split_pipeline(settings: list, bgr: bool) -> tuple[Compose, Compose]:
    """Of a test pipeline what reads a picture, and what follows, without the mask.

    Data that is in memory is read by no transform; its pictures can be files.
    """
    read, rest = dict(type='LoadImageFromFile'), list(settings)
    if rest and _kind(rest[0]) == 'LoadImageFromFile':
        read = rest.pop(0)
    rest = [transform for transform in rest if _kind(transform) != 'LoadAnnotations']
    with building('The test pipeline'):
        return Compose([read]), Compose(rest if bgr else [_to_rgb, *rest])


def _to_rgb(data: dict) -> dict:
    data['img'] = np.ascontiguousarray(data['img'][..., ::-1])
    return data


def read_picture(path: str, read: Callable) -> dict:
    """Read a picture as training and testing do.

    Args:
        path (str): The file.
        read (callable): The transform that reads: LoadImageFromFile of the config.

    Returns:
        dict: What the transform makes of it: ``img`` (h, w, 3), BGR, and more.

    Raises:
        UserError: For a path that is no file, and a file that it cannot read.
    """
    if not osp.isfile(path):
        what = 'does not exist'
        if osp.islink(path):
            what = f'is a link to {os.readlink(path)}, which does not exist'
        elif osp.isdir(path):
            what = 'is a folder. Give the files'
        raise UserError(f'The picture {path or repr(path)} {what}.')
    try:
        return read(dict(img_path=path, sample_idx=0))
    except Exception as error:  # each decoder has errors of its own
        reason = (str(error).splitlines() or [''])[0]
        reason = f'{type(error).__name__}: {reason}'
        if not osp.getsize(path):
            reason = 'it is empty'
        raise UserError(f'The picture {path} cannot be read: {reason}.') from error


def _sample(model, name, data, bgr):
    batch = model.data_preprocessor(pseudo_collate([data]), False)
    if first_not_finite([(name, batch['inputs'][0])]):
        raise UserError(
            f'{name} holds nan or infinity after the test pipeline and the '
            'data_preprocessor. Check the file, and mean and std of data_preprocessor.'
        )
    check_size(model, data['inputs'].shape[-2:], f'{name}, after the test pipeline')
    picture = data['inputs'].permute(1, 2, 0).numpy().astype(np.uint8)
    if bgr:
        picture = picture[..., ::-1]
    label = data['data_samples'].get('gt_label') if 'data_samples' in data else None
    return Sample(
        name=name,
        picture=np.ascontiguousarray(picture),
        inputs=batch['inputs'][0],
        label=None if label is None else int(label),
    )

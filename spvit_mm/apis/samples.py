"""Models and images for the tools that show something."""

import os.path as osp
from typing import NamedTuple, Optional

import mmcv
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS
from PIL import Image, UnidentifiedImageError

from ..utils import UserError, first_not_finite
from .cli import building
from .configs import load_config, load_trained_model


def load_model(config: str, checkpoint: str):
    """Build the model of a config and load a checkpoint that fits it entirely.

    Returns:
        Tuple[Config, nn.Module]: The config and the model, in eval mode.

    Raises:
        UserError: For a config or checkpoint that cannot be taken.
    """
    cfg = load_config(config)
    model, _ = load_trained_model(cfg, checkpoint)
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
        model (nn.Module): A classifier, for its ``data_preprocessor``.
        paths (Sequence[str], optional): Image files. Defaults to None: images
            of the test data set.
        count (int): How many of the data set, evenly spread. Defaults to 4.

    Raises:
        UserError: For a file that is no RGB image or a config without test data.
    """
    if not cfg.get('test_dataloader'):
        raise UserError(
            'The config has no test_dataloader, whose pipeline says how images are '
            'prepared.'
        )
    settings = cfg.test_dataloader.dataset
    samples = []
    if paths:
        with building('The test pipeline'):
            pipeline = Compose(settings.pipeline)
        loads = str(settings.pipeline[0]['type']).endswith('LoadImageFromFile')
        for path in paths:
            _check_rgb(path)
            data = dict(img_path=path, sample_idx=0)
            if not loads:
                image = mmcv.imread(path)
                shape = image.shape[:2]
                data.update(img=image, img_shape=shape, ori_shape=shape)
            samples.append(_sample(model, osp.basename(path), pipeline(data)))
        return samples
    if count < 1:
        raise UserError(f'At least 1 image must be shown, got {count}.')
    with building('The test data set'):
        dataset = DATASETS.build(settings)
    count = min(count, len(dataset))
    for i in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        samples.append(_sample(model, f'image {i}', dataset[i]))
    return samples


def _sample(model, name, data):
    batch = model.data_preprocessor(pseudo_collate([data]), False)
    if first_not_finite([(name, batch['inputs'][0])]):
        raise UserError(
            f'{name} holds nan or infinity after the test pipeline and the '
            'data_preprocessor. Check the file, and mean and std of data_preprocessor.'
        )
    picture = data['inputs'].permute(1, 2, 0).numpy().astype(np.uint8)
    if getattr(model.data_preprocessor, 'to_rgb', False):
        picture = picture[..., ::-1]  # it was loaded as BGR
    label = data['data_samples'].get('gt_label') if 'data_samples' in data else None
    return Sample(
        name=name,
        picture=np.ascontiguousarray(picture),
        inputs=batch['inputs'][0],
        label=None if label is None else int(label),
    )


def _check_rgb(path):
    if not osp.isfile(path):
        raise UserError(f'The image {path} does not exist.')
    try:
        with Image.open(path) as image:
            mode = image.mode
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f'{path} is not an image that can be read: {error}') from error
    if mode != 'RGB':
        raise UserError(
            f'The image {path} is not RGB (its mode is {mode}). Convert it first, with '
            f"Pillow: Image.open(path).convert('RGB').save(new_path)."
        )

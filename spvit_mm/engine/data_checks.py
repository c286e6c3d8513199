"""Data sets that cannot be trained on, and images that cannot be read."""

import logging
import os
import os.path as osp
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import numpy as np
import torch
import torch.nn as nn
from mmcv.transforms import LoadImageFromFile
from mmengine.logging import print_log
from mmpretrain.models.backbones import VisionTransformer

from ..utils import CorruptImageError, UserError, describe_error

MAX_LABELS = 20000
MAX_FILES = 20000


def describe_folder(folder: str) -> str:
    """One sentence on what a folder holds, for an error message."""
    if not osp.exists(folder):
        parent = folder
        while parent and not osp.exists(parent):
            parent = osp.dirname(parent)
        parent = parent or os.curdir
        return f'{folder} does not exist ({osp.abspath(parent)} does).'
    if not osp.isdir(folder):
        return f'{folder} is a file, not a folder.'
    subfolders = sorted(e.name for e in os.scandir(folder) if e.is_dir())
    suffixes: Counter = Counter()
    for _, _, names in os.walk(folder, followlinks=True):
        suffixes.update(osp.splitext(n)[1].lower() or 'no suffix' for n in names)
        if sum(suffixes.values()) > MAX_FILES:
            break
    shown = ', '.join(subfolders[:5]) + (', ...' if len(subfolders) > 5 else '')
    files = ', '.join(f'{n} {suffix}' for suffix, n in suffixes.most_common(5))
    return (
        f'{folder} holds {len(subfolders)} sub-folders{f" ({shown})" if shown else ""} '
        f'and, in all of them, {"files: " + files if files else "no files"}.'
    )


def _describe_config(cfg: dict) -> str:
    """What the folders of a data-set config hold and what should be there."""
    while 'dataset' in cfg and isinstance(cfg['dataset'], dict):
        cfg = cfg['dataset']
    root = cfg.get('data_root') or ''
    prefix = cfg.get('data_prefix') or cfg.get('split') or ''
    prefixes = prefix.values() if isinstance(prefix, dict) else [prefix]
    folders = {osp.expanduser(osp.join(root, p)) for p in prefixes}
    text = [describe_folder(f) for f in sorted(folders) if f]
    if cfg.get('ann_file'):
        ann_file = osp.expanduser(osp.join(root, cfg['ann_file']))
        if not osp.isfile(ann_file):
            text.append(f'The annotation file {ann_file} does not exist.')
    elif 'Custom' in str(cfg.get('type')) or 'ImageNet' in str(cfg.get('type')):
        suffixes = cfg.get('extensions') or '.jpg .jpeg .png .ppm .bmp .pgm .tif'
        text.append(
            'Accepted is one sub-folder a class, at least two, with images in them '
            f'({suffixes if isinstance(suffixes, str) else " ".join(suffixes)}).'
        )
    return ' '.join(text)


@contextmanager
def building_data(dataloader_cfg, split: str):
    """Turn an error of a data set's construction into one that names its folder.

    Args:
        dataloader_cfg (dict): The config whose ``dataset`` is built inside.
        split (str): What to call it: 'training', 'validation' or 'test'.

    Raises:
        UserError: In place of what the construction raised.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, AssertionError, ValueError, KeyError) as error:
        cfg = dataloader_cfg['dataset'] if isinstance(dataloader_cfg, dict) else {}
        if 'need at least one array to concatenate' in str(error):
            # mmengine's words for a data set that has found nothing.
            suffix = cfg.get('img_suffix')
            named = f' named *{suffix} (img_suffix)' if suffix else ''
            raise UserError(
                f'The {split} data ({cfg.get("type")}) holds no images{named}. '
                f'{_describe_config(cfg)}'
            ) from error
        reason = describe_error(error).rstrip('.')
        raise UserError(
            f'The {split} data ({cfg.get("type")}) cannot be read: '
            f'{type(error).__name__}: {reason}. {_describe_config(cfg)}'
        ) from error


def _leaves(dataset) -> Iterator:
    """The data sets under wrappers such as ConcatDataset and RepeatDataset."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    inner = [d for d in inner if d is not None]
    if not inner:
        yield dataset
    for child in inner:
        yield from _leaves(child)


def _where(dataset) -> str:
    prefix = getattr(dataset, 'data_prefix', None)
    prefixes = prefix.values() if isinstance(prefix, dict) else []
    folders = [describe_folder(p) for p in prefixes if isinstance(p, str) and p]
    return f'{type(dataset).__name__}: ' + ' '.join(folders)


def _labels(dataset) -> Optional[np.ndarray]:
    """Labels of a classification data set, of an even choice where it is large."""
    if not hasattr(dataset, 'get_gt_labels'):
        return None
    step = -(-len(dataset) // MAX_LABELS)
    labels = [
        dataset.get_data_info(i).get('gt_label') for i in range(0, len(dataset), step)
    ]
    if not all(isinstance(label, (int, np.integer)) for label in labels):
        return None  # several labels an image, or none
    return np.asarray(labels)


def check_dataset(dataset, split: str, num_classes: Optional[int] = None) -> None:
    """Raise a clear error for data that training or testing cannot use.

    Args:
        dataset (Dataset): A built data set, or a wrapper of several.
        split (str): What to call it: 'training', 'validation' or 'test'.
        num_classes (int, optional): Classes that the model's head tells apart.

    Raises:
        UserError: For no images; for a single class; for a label that the head does
            not have. It names the folder and says what was found in it.
    """
    for leaf in _leaves(dataset):
        if len(leaf) == 0:
            raise UserError(f'The {split} data holds no images. {_where(leaf)}')
        labels = _labels(leaf)
        if labels is None:
            continue
        classes = leaf.metainfo.get('classes')
        found = len(classes) if classes is not None else len(np.unique(labels))
        one_class = found < 2 or (split == 'training' and labels.min() == labels.max())
        if one_class and num_classes != 1:
            raise UserError(
                f'All images of the {split} data are of one class; a classifier needs '
                f'at least two. {_where(leaf)}'
            )
        if num_classes is not None and labels.max() >= num_classes:
            raise UserError(
                f'The {split} data has labels up to {labels.max()} and the head of the '
                f'model has num_classes={num_classes} (labels from 0 to '
                f'{num_classes - 1}). Set model.head.num_classes to the number of '
                f'classes. {_where(leaf)}'
            )


def check_widths(model) -> None:
    """Raise an error where a head expects another width than the backbone gives.

    Only a VisionTransformer with a head behind it directly is judged.

    Args:
        model (nn.Module): A built classifier.

    Raises:
        UserError: If ``head.in_channels`` is not the backbone's ``embed_dims``.
    """
    backbone, head = getattr(model, 'backbone', None), getattr(model, 'head', None)
    if not isinstance(backbone, VisionTransformer) or getattr(model, 'neck', None):
        return
    expected = getattr(head, 'in_channels', None)
    if isinstance(expected, int) and expected != backbone.embed_dims:
        raise UserError(
            f'model.head.in_channels is {expected} and the backbone gives '
            f'{backbone.embed_dims} channels (its embed_dims). Set '
            f'model.head.in_channels={backbone.embed_dims}.'
        )


def check_normalization(model) -> None:
    """Raise an error where the preprocessor normalizes other channels than there are.

    Only a VisionTransformer's channels are known, those of its stem.

    Args:
        model (nn.Module): A built classifier or segmentor.

    Raises:
        UserError: If ``data_preprocessor.mean`` or ``std`` has neither one value nor
            one for each channel.
    """
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, VisionTransformer):
        return
    stem = backbone.patch_embed.modules()
    convs = [module for module in stem if isinstance(module, nn.Conv2d)]
    for name in ('mean', 'std'):
        value = getattr(model.data_preprocessor, name, None)
        if not convs or not isinstance(value, torch.Tensor):
            continue
        channels = convs[0].in_channels
        if value.numel() not in (1, channels):
            raise UserError(
                f'data_preprocessor.{name} has {value.numel()} values, and the backbone '
                f'has in_channels={channels}. Give a value for each channel, or a '
                'single one for all.'
            )


def check_same_classes(training, other, split: str) -> None:
    """Raise an error where two folders number their classes differently.

    Data sets that take the classes from the names of sub-folders number them in
    sorted order: a folder more in one of them shifts all labels behind it.

    Args:
        training (Dataset): The training data.
        other (Dataset): The validation or test data.
        split (str): What to call ``other``.

    Raises:
        UserError: If both take their classes from folders and these differ.
    """
    ours = getattr(training, 'folder_to_idx', None)
    theirs = getattr(other, 'folder_to_idx', None)
    if ours and theirs and ours != theirs:
        raise UserError(
            f'The {split} data numbers its classes differently from the training data: '
            f'only in training: {sorted(set(ours) - set(theirs)) or "none"}; only in '
            f'{split}: {sorted(set(theirs) - set(ours)) or "none"}. Give both folders '
            'the same sub-folders, or write the labels in annotation files.'
        )


class GuardedLoading:
    """An image-loading transform that names the file which it cannot read.

    Args:
        transform (LoadImageFromFile): The transform of the pipeline.
        skip (bool): Whether a bad image is left out, so that the data set draws
            another in its place, rather than an error.
        skipped (torch.Tensor): Counts, in shared memory, the images left out.
    """

    def __init__(self, transform, skip: bool, skipped: torch.Tensor) -> None:
        self.transform = transform
        self.skip = skip
        self.skipped = skipped

    def __call__(self, results: dict):
        reason = 'it is not an image that the decoder knows, or it is cut off'
        try:
            loaded = self.transform(results)
        except Exception as error:  # each decoder has errors of its own
            loaded = None
            first_line = (str(error).strip() or 'no reason given').splitlines()[0]
            if 'failed to load image' not in first_line:
                reason = f'{type(error).__name__}: {first_line}'
        if loaded is not None:
            return loaded
        path = results.get('img_path')
        size = ''
        if osp.isfile(str(path)):
            size = f' ({osp.getsize(path)} bytes)'
            if osp.getsize(path) == 0:
                reason = 'the file is empty'
        message = f'The image {path}{size} cannot be read: {reason}.'
        if self.skip:
            self.skipped += 1
            print_log(f'Left out. {message}', logger='current', level=logging.WARNING)
            return None
        raise CorruptImageError(
            f'{message} Replace the file or remove it from the data; training can '
            'leave such files out with --skip-corrupt-images.'
        )

    def __repr__(self) -> str:
        return repr(self.transform)


def guard_images(dataset, skip: bool = False) -> torch.Tensor:
    """Let a data set name the image file which it cannot read.

    An image that decodes only in part (a JPEG file that is cut off) is not noticed:
    the decoder fills it with grey.

    Args:
        dataset (Dataset): A built data set or a wrapper of several; its pipelines are
            changed in place, once.
        skip (bool): Whether bad images are left out and another image is drawn in
            their place. Data sets in test mode cannot leave any out and raise.
            Defaults to False.

    Returns:
        torch.Tensor: The number of images left out, in shared memory, so that it
        counts those of the workers too.
    """
    skipped = torch.zeros(1, dtype=torch.int64).share_memory_()
    for leaf in _leaves(dataset):
        transforms = getattr(getattr(leaf, 'pipeline', None), 'transforms', [])
        for i, transform in enumerate(transforms):
            if isinstance(transform, LoadImageFromFile):
                may_skip = skip and not getattr(leaf, 'test_mode', False)
                transforms[i] = GuardedLoading(transform, may_skip, skipped)
    return skipped

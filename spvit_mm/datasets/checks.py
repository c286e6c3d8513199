"""What is silently, or only late, wrong with a user's data, told with its folder or file.

What torch, mmengine and the data sets themselves say clearly is left to them.
"""

import logging
import os.path as osp
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Optional

import numpy as np
import torch
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.logging import print_log
from mmengine.utils import to_2tuple

from ..utils import CorruptImageError, UserError

MAX_LABELS = 20000
IGNORED = 255  # in masks


@contextmanager
def naming_empty_data(dataset: dict, split: str):
    """Name the data set that finds no image where it is built.

    Args:
        dataset (dict): The config of the data set that is built inside.
        split (str): What to call it: 'training', 'validation' or 'test'.

    Raises:
        UserError: In place of numpy's error about the empty list that mmengine packs.
    """
    try:
        yield
    except ValueError as error:
        if 'need at least one array to concatenate' not in str(error):
            raise
        while isinstance(dataset.get('dataset'), dict):
            dataset = dataset['dataset']
        keys = ('type', 'data_root', 'data_prefix', 'ann_file', 'img_suffix')
        shown = ', '.join(f'{k}={dataset[k]!r}' for k in keys if dataset.get(k))
        raise UserError(f'The {split} data holds no images: {shown}.') from error


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
    return f'the {type(dataset).__name__} of {prefix}'


def _transforms(dataset) -> list:
    return getattr(getattr(dataset, 'pipeline', None), 'transforms', [])


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
    """Raise an error for data that trains or tests to no good end.

    Args:
        dataset (Dataset): A built data set, or a wrapper of several.
        split (str): What to call it: 'training', 'validation' or 'test'.
        num_classes (int, optional): Classes that the model's head tells apart.

    Raises:
        UserError: For no images; for images of a single class; for labels that the
            head does not have, of which testing says nothing and CUDA nothing clear;
            for masks that are missing. It names the folder or the files.
    """
    for leaf in _leaves(dataset):
        if len(leaf) == 0:
            raise UserError(f'The {split} data, {_where(leaf)}, holds no images.')
        if hasattr(leaf, 'seg_map_suffix') and not leaf.backend_args:
            _check_files(leaf, split)
        labels = _labels(leaf)
        if labels is None:
            continue
        classes = leaf.metainfo.get('classes')
        found = len(classes) if classes is not None else len(np.unique(labels))
        one_class = found < 2 or (split == 'training' and labels.min() == labels.max())
        if one_class and num_classes != 1:
            raise UserError(
                f'All images of the {split} data, {_where(leaf)}, are of one class; a '
                'classifier needs at least two, each in a sub-folder of its own where '
                'there is no ann_file.'
            )
        if num_classes is not None and labels.max() >= num_classes:
            raise UserError(
                f'The {split} data, {_where(leaf)}, has labels up to {labels.max()} and '
                f'the head of the model has num_classes={num_classes} (labels from 0 to '
                f'{num_classes - 1}). Set model.head.num_classes to the number of '
                'classes.'
            )


def _check_files(dataset, split: str) -> None:
    for key, what in (('img_path', 'images'), ('seg_map_path', 'masks')):
        paths = (dataset.get_data_info(i).get(key) for i in range(len(dataset)))
        absent = [path for path in paths if path and not osp.isfile(path)]
        if absent:
            raise UserError(
                f'{len(absent)} of {len(dataset)} {what} of the {split} data do not '
                f'exist: {", ".join(absent[:3])}{", ..." * (len(absent) > 3)}. An '
                f'image and its mask share their name up to img_suffix '
                f'({dataset.img_suffix}) and seg_map_suffix ({dataset.seg_map_suffix}).'
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


def patch_size(model) -> Optional[tuple]:
    """Height and width, in pixels, of one patch of the backbone, if it has patches."""
    embed = getattr(getattr(model, 'backbone', None), 'patch_embed', None)
    if getattr(embed, 'init_out_size', None) is None:
        return None
    sizes = zip(embed.init_input_size, embed.init_out_size, strict=True)
    return tuple(-(-pixels // patches) for pixels, patches in sizes)


def check_crops(model, *datasets) -> None:
    """Raise an error for a crop that does not hold one patch of the backbone.

    Args:
        model (nn.Module): A classifier or segmentor.
        *datasets (Dataset): Data sets whose pipelines may crop.

    Raises:
        UserError: It names the crop.
    """
    patch = patch_size(model)
    if patch is None:
        return
    test_cfg = getattr(model, 'test_cfg', None) or {}
    crops = {'model.test_cfg.crop_size': test_cfg.get('crop_size')}
    for dataset in datasets:
        for leaf in _leaves(dataset):
            for transform in _transforms(leaf):
                crop = getattr(transform, 'crop_size', None)
                crops[f'crop_size of {type(transform).__name__}'] = crop
    for name, crop in crops.items():
        if crop is None:
            continue
        crop = to_2tuple(crop)
        if crop[0] < patch[0] or crop[1] < patch[1]:
            raise UserError(
                f'{name} is {crop[0]} x {crop[1]} pixels, smaller than one patch of '
                f'the backbone, {patch[0]} x {patch[1]}. Crop at least one patch, '
                'better many.'
            )


def _check_mask(results: dict, num_classes: int) -> None:
    mask, path = results['gt_seg_map'], results['seg_map_path']
    if mask.ndim != 2:
        raise CorruptImageError(
            f'The mask {path} has the shape {mask.shape}. A mask has one channel, '
            'whose values are the classes; colours must be turned into them.'
        )
    # At test time the image may have been resized already, the mask never.
    shape = results.get('ori_shape')
    if shape is not None and mask.shape != tuple(shape[:2]):
        raise CorruptImageError(
            f'The mask {path} is {mask.shape[0]} x {mask.shape[1]} (h x w) and its '
            f'image {results.get("img_path")} {shape[0]} x {shape[1]}. They must be of '
            'one size.'
        )
    bad = np.setdiff1d(np.unique(mask), [*range(num_classes), IGNORED])
    if bad.size:
        raise CorruptImageError(
            f'The mask {path} holds the values {bad[:5].tolist()}, and the head has '
            f'num_classes={num_classes} (values from 0 to {num_classes - 1}, and '
            f'{IGNORED} to ignore). Set num_classes of the heads to the number of '
            'classes, or reduce_zero_label=True in the data set if 0 means "no class".'
        )


class GuardedLoading:
    """A loading transform that names the file which it cannot read, or not use.

    Args:
        transform (BaseTransform): The transform of the pipeline.
        key (str): Where the results have the path of the file.
        check (callable, optional): Is given the results, and raises an error for what
            cannot be used. Defaults to None.
        skipped (torch.Tensor, optional): Files that cannot be read are left out, so
            that the data set draws another in their place, and counted here. Defaults
            to None: they are an error.
    """

    def __init__(self, transform, key, check=None, skipped=None) -> None:
        self.transform = transform
        self.key = key
        self.check = check
        self.skipped = skipped

    def __call__(self, results: dict) -> Optional[dict]:
        path = results.get(self.key)
        try:
            results = self.transform(results)
        except Exception as error:  # each decoder has errors of its own
            size = osp.getsize(path) if osp.isfile(str(path)) else None
            lines = (str(error).strip() or 'no reason given').splitlines()
            reason = f'{type(error).__name__}: {lines[0]}'
            message = (
                f'The file {path}{"" if size is None else f" ({size} bytes)"} cannot '
                f'be read: {"it is empty" if size == 0 else reason}.'
            )
            if self.skipped is None:
                raise CorruptImageError(
                    f'{message} Replace the file or remove it from the data; training '
                    'can leave images out with --skip-corrupt-images.'
                ) from error
            self.skipped += 1
            print_log(f'Left out. {message}', logger='current', level=logging.WARNING)
            return None
        if self.check is not None:
            self.check(results)
        return results

    def __repr__(self) -> str:
        return repr(self.transform)


def guard_files(
    dataset, num_classes: Optional[int] = None, skip: bool = False
) -> torch.Tensor:
    """Let a data set name the image or mask that it cannot read, or not use.

    An image that decodes only in part (a JPEG file that is cut off) is not noticed:
    the decoder fills it with grey.

    Args:
        dataset (Dataset): A built data set or a wrapper of several; its pipelines are
            changed in place, once.
        num_classes (int, optional): Classes that the head tells apart, which the
            masks of segmentation must keep to. Defaults to None: they are not checked.
        skip (bool): Whether bad images are left out and another image is drawn in
            their place. Data sets in test mode cannot leave any out and raise.
            Defaults to False.

    Returns:
        torch.Tensor: The number of images left out, in shared memory, so that it
        counts those of the workers too.
    """
    skipped = torch.zeros(1, dtype=torch.int64).share_memory_()
    for leaf in _leaves(dataset):
        may_skip = skip and not getattr(leaf, 'test_mode', False)
        has_masks = hasattr(leaf, 'seg_map_suffix') and num_classes is not None
        transforms = _transforms(leaf)
        for i, transform in enumerate(transforms):
            if isinstance(transform, LoadImageFromFile):
                count = skipped if may_skip else None
                transforms[i] = GuardedLoading(transform, 'img_path', skipped=count)
            elif isinstance(transform, LoadAnnotations) and has_masks:
                check = partial(_check_mask, num_classes=num_classes)
                transforms[i] = GuardedLoading(transform, 'seg_map_path', check)
    return skipped

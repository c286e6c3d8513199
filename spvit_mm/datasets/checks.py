"""What is silently, or only late, wrong with a user's data, told with its folder or file.

What torch, mmengine and the data sets themselves say clearly is left to them.
"""

import logging
import os
import os.path as osp
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Optional

import numpy as np
import torch
import torch.nn as nn
from mmcv.cnn.bricks.transformer import AdaptivePadding
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine.logging import print_log
from mmengine.utils import to_2tuple
from PIL import Image, UnidentifiedImageError

from ..models import SPViT
from ..utils import CorruptImageError, UserError

MAX_LABELS = 20000
# Larger folders are not listed a second time, and not more masks looked at.
MAX_FILES = 100000
MAX_MASKS = 2000
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
            for masks that are missing; for segmentation data of another number of
            classes than the head. It names the folder or the files.
    """
    seen, told = set(), {}
    for leaf in _leaves(dataset):
        if len(leaf) == 0:
            raise UserError(f'The {split} data, {_where(leaf)}, holds no images.')
        if hasattr(leaf, 'seg_map_suffix') and not leaf.backend_args:
            _check_files(leaf, split)
        _check_class_count(leaf, split, num_classes)
        labels = _labels(leaf)
        if labels is None:
            continue
        where = _where(leaf)
        told[where] = True  # once where a folder is given twice
        classes = leaf.metainfo.get('classes')
        if classes is not None and len(classes) < 2 and num_classes != 1:
            # Alone, since the others number theirs otherwise.
            raise _one_class(split, [where])
        # Testing one class of several can be wanted.
        seen.update(labels if split == 'training' or classes is None else classes)
        if num_classes is not None and labels.max() >= num_classes:
            raise UserError(
                f'The {split} data, {_where(leaf)}, has labels up to {labels.max()} and '
                f'the head of the model has num_classes={num_classes} (labels from 0 to '
                f'{num_classes - 1}). Set model.head.num_classes to the number of '
                'classes.'
            )
    if told and len(seen) < 2 and num_classes != 1:
        raise _one_class(split, list(told))


def _one_class(split: str, where: list[str]) -> UserError:
    return UserError(
        f'All images of the {split} data, {" and ".join(where)}, are of one class; a '
        'classifier needs at least two, each in a sub-folder of its own where there is '
        'no ann_file.'
    )


def _check_class_count(dataset, split: str, num_classes: Optional[int]) -> None:
    classes = dataset.metainfo.get('classes')
    segments = hasattr(dataset, 'seg_map_suffix') and classes is not None
    # The metric of segmentation counts the classes of the data, and leaves out others.
    count = len(classes) if segments else getattr(dataset, 'num_classes', None)
    if count is None or num_classes is None:
        return
    if count > num_classes or (segments and count != num_classes):
        raise UserError(
            f'The {split} data, {_where(dataset)}, is of {count} classes and the head of '
            f'the model of num_classes={num_classes}. Set num_classes of the heads, or '
            'metainfo.classes of the data set, so that they are equal.'
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
    ours, theirs = _numbers(training), _numbers(other)
    if ours and theirs and ours != theirs:
        raise UserError(
            f'The {split} data numbers its classes differently from the training data: '
            f'only in training: {sorted(set(ours) - set(theirs)) or "none"}; only in '
            f'{split}: {sorted(set(theirs) - set(ours)) or "none"}. Give both folders '
            'the same sub-folders, or write the labels in annotation files.'
        )


def _numbers(dataset) -> dict[str, set]:
    """The numbers of each class that is a folder; several where folders disagree."""
    numbers = {}
    for leaf in _leaves(dataset):
        for name, number in (getattr(leaf, 'folder_to_idx', None) or {}).items():
            numbers.setdefault(name, set()).add(number)
    return numbers


def describe_left_out(dataset, split: str) -> str:
    """Say which files of an image folder a data set does not read.

    Those with endings that it does not take, and links to files that are gone, would be
    left out without a word. Folders of more than ``MAX_FILES`` images, annotation files
    and folders on other machines are not looked into.

    Args:
        dataset (Dataset): A built data set, or a wrapper of several.
        split (str): What to call it: 'training', 'validation' or 'test'.

    Returns:
        str: A sentence for each data set that leaves any out; '' for none.
    """
    sentences = []
    for leaf in _leaves(dataset):
        kinds, example = Counter(), None
        for path in _left_out(leaf):
            kind = osp.splitext(path)[1].lower() or 'without an ending'
            kinds['broken links' if not osp.exists(path) else kind] += 1
            example = example or path
        if kinds:
            shown = ', '.join(f'{n} {kind}' for kind, n in kinds.most_common())
            option = 'img_suffix' if hasattr(leaf, 'img_suffix') else 'extensions'
            taken = getattr(leaf, option, '')
            taken = taken if isinstance(taken, str) else ', '.join(sorted(taken))
            sentences.append(
                f'The {split} data, {_where(leaf)}, leaves out {sum(kinds.values())} '
                f'files of its folders: {shown}, such as {example}. It reads {taken}; '
                f'set `{option}` of the data set to read others, or convert them.'
            )
    return ' '.join(sentences)


def _left_out(dataset) -> Iterator[str]:
    """The files in the folders of a data set that are none of its images."""
    listed = osp.isfile(str(getattr(dataset, 'ann_file', None) or ''))
    chosen = getattr(dataset, '_indices', None) is not None
    if listed or chosen or not 0 < len(dataset) <= MAX_FILES:
        return
    prefix = getattr(dataset, 'data_prefix', None)
    root = prefix.get('img_path') if isinstance(prefix, dict) else None
    if not root or not osp.isdir(root):
        return
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    taken = {osp.normpath(info.get('img_path', '')) for info in infos}
    for folder in getattr(dataset, 'folder_to_idx', None) or ['']:
        # As mmengine lists them: links to folders are followed.
        for parent, _, names in os.walk(osp.join(root, folder), followlinks=True):
            for name in sorted(names):
                path = osp.normpath(osp.join(parent, name))
                if path not in taken and not name.startswith('.'):
                    yield path


def check_masks(dataset, split: str, num_classes: Optional[int] = None) -> None:
    """Raise an error for masks of which nothing is to be learned.

    Masks are looked at until two classes were seen, which usually is in the first.

    Args:
        dataset (Dataset): A segmentation data set, its files guarded
            (:func:`guard_files`), or a wrapper of several.
        split (str): What to call it: 'training', 'validation' or 'test'.
        num_classes (int, optional): Classes that the head tells apart. Nothing is
            checked for None, and for 1.

    Raises:
        UserError: If all masks hold one class and ignored pixels, or these alone. Of
            more than ``MAX_MASKS`` only so many are looked at, and a warning is all.
    """
    for leaf in _leaves(dataset):
        loading = [
            t
            for t in _transforms(leaf)
            if isinstance(t, GuardedLoading) and t.key == 'seg_map_path'
        ]
        if not loading or num_classes in (None, 1):
            continue
        seen = set()
        step = -(-len(leaf) // MAX_MASKS)
        for i in range(0, len(leaf), step):
            mask = loading[0](leaf.get_data_info(i))['gt_seg_map']
            seen.update(np.unique(mask).tolist())
            # Testing one class can be wanted.
            if len(seen - {IGNORED}) >= (1 if split == 'test' else 2):
                break
        else:
            shown = _values(seen)
            if getattr(leaf, 'reduce_zero_label', False):
                shown += ' after reduce_zero_label'
            which = 'All masks' if step == 1 else f'{MAX_MASKS} of the masks'
            message = (
                f'{which} of the {split} data, {_where(leaf)}, hold '
                f'{shown} alone, where {IGNORED} is ignored: there is nothing to '
                'tell apart. The value of a pixel is its class, counted from 0: a mask '
                'of 0 and 255, black and white, is to hold 0 and 1.'
            )
            if step == 1:
                raise UserError(message)
            # The others may hold what is rare.
            print_log(message, logger='current', level=logging.WARNING)


def _values(values) -> str:
    values = sorted(values)
    return f'the value{"s" * (len(values) > 1)} {" and ".join(map(str, values))}'


def check_heads(model) -> None:
    """Raise an error for heads that do not fit the backbone or each other.

    Raises:
        UserError: For the head of a classifier that takes features of another width
            than the SPViT gives; for heads of a segmentor that tell apart different
            classes. It names the numbers.
    """
    width = getattr(getattr(model, 'head', None), 'in_channels', None)
    backbone = getattr(model, 'backbone', None)
    direct = isinstance(backbone, SPViT) and getattr(model, 'neck', None) is None
    if direct and width not in (None, backbone.embed_dims):
        raise UserError(
            f'model.head.in_channels is {width}, and the backbone gives features of '
            f'embed_dims={backbone.embed_dims}. Set in_channels to that.'
        )
    found = {}
    for name in ('decode_head', 'auxiliary_head'):
        heads = getattr(model, name, None)
        heads = heads if isinstance(heads, nn.ModuleList) else [heads]
        for i, head in enumerate(heads):
            if getattr(head, 'num_classes', None) is not None:
                key = f'{name}.{i}' if len(heads) > 1 else name
                found[key] = head.num_classes
    if len(set(found.values())) > 1:
        shown = ', '.join(f'model.{name}.num_classes={n}' for name, n in found.items())
        raise UserError(
            f'The heads of the model tell apart different classes: {shown}. Give all '
            'the number of classes.'
        )


def check_batch(model, batch: dict) -> None:
    """Raise an error for an image that does not hold one patch of the backbone.

    It would be padded to one, without a word.

    Args:
        model (nn.Module): A classifier or segmentor.
        batch (dict): What the data loader gives: ``inputs``, of (C, h, w), and
            ``data_samples``.

    Raises:
        UserError: It names the image.
    """
    patch = patch_size(model)
    # Segmentation pads images to a size of its own.
    pads = getattr(getattr(model, 'data_preprocessor', None), 'size', None)
    if patch is None or pads is not None or not isinstance(batch, dict):
        return
    samples = batch.get('data_samples') or ()
    for i, image in enumerate(batch.get('inputs', ())):
        shape = tuple(getattr(image, 'shape', ()))[-2:]
        if len(shape) == 2 and (shape[0] < patch[0] or shape[1] < patch[1]):
            path = getattr(samples[i], 'img_path', None) if i < len(samples) else None
            raise UserError(
                f'The image {path or i} comes out of the pipeline with {shape[0]} x '
                f'{shape[1]} pixels (h x w), smaller than one patch of the backbone, '
                f'{patch[0]} x {patch[1]}. Look at the sizes in the pipeline.'
            )


def patch_size(model) -> Optional[tuple]:
    """Height and width, in pixels, of one patch of the backbone, if it has patches."""
    embed = getattr(getattr(model, 'backbone', None), 'patch_embed', None)
    if getattr(embed, 'init_out_size', None) is None:
        return None
    for module in embed.modules():
        if isinstance(module, AdaptivePadding):
            return tuple(module.stride)
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
    # As the values are in the file, of which mmsegmentation keeps the lowest 8 bits.
    first = 1 if results.get('reduce_zero_label') else 0
    bad = _deep_values(path)
    if not bad.size:
        bad = np.setdiff1d(np.unique(mask), [*range(num_classes), IGNORED]) + first
    if bad.size:
        raise CorruptImageError(
            f'The mask {path} holds the values {bad[:5].tolist()}, and the head has '
            f'num_classes={num_classes} (values from {first} to '
            f'{num_classes - 1 + first}, and {IGNORED} to ignore). Set num_classes of '
            'the heads to the number of classes, or reduce_zero_label=True in the data '
            'set if 0 means "no class".'
        )


def _deep_values(path: str) -> np.ndarray:
    """Values above 255 of a mask file that can hold any."""
    if not osp.isfile(path):  # on another machine
        return np.empty(0, int)
    try:
        image = Image.open(path)
    except UnidentifiedImageError:  # a format that another library has read
        return np.empty(0, int)
    with image:
        if not image.mode.startswith(('I', 'F')):
            return np.empty(0, int)
        values = np.unique(np.asarray(image))
    return values[values > 255]


def _check_image(results: dict) -> None:
    image = results['img']
    if image.dtype.kind == 'f' and not np.isfinite(image).all():
        raise CorruptImageError(
            f'The image {results.get("img_path")} holds nan or infinity. Replace it.'
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
                    'can leave out its own images with --skip-corrupt-images.'
                ) from error
            self.skipped += 1
            print_log(f'Left out. {message}', logger='current', level=logging.WARNING)
            return None
        # None, of `ignore_empty=True`, is an image that is left out.
        if self.check is not None and results is not None:
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
                transforms[i] = GuardedLoading(
                    transform, 'img_path', _check_image, skipped=count
                )
            elif isinstance(transform, LoadAnnotations) and has_masks:
                check = partial(_check_mask, num_classes=num_classes)
                transforms[i] = GuardedLoading(transform, 'seg_map_path', check)
    return skipped

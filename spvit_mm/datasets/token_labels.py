"""Label maps of token labeling: their files, and the data set that reads them.

A label map says what a teacher sees at every place of an image. It is a file
``<label_root>/<class folder>/<image stem>.pt`` with one tensor (2, K, h, w):
[0] the teacher's K highest class scores (before softmax) at each of h x w
places, [1] their class ids. So the maps that LV-ViT's authors publish work as
they are.
"""

import json
import logging
import os
import os.path as osp
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from mmcv.transforms import CenterCrop, Pad, RandomFlip
from mmengine.logging import MMLogger, print_log
from mmpretrain.datasets import BaseDataset
from mmpretrain.datasets.transforms import (
    EfficientNetCenterCrop,
    RandomCrop,
    RandomResizedCrop,
)
from mmpretrain.registry import DATASETS

from ..utils import CheckpointError, LabelMapError, read_checkpoint, whole_file
from .token_label_transforms import RecordsView

# Half precision counts exactly up to here.
MAX_HALF_CLASSES = 2048
# About its maker, beside the maps.
INFO_FILE = 'token_labels.json'
# A map that says nothing but the image's label: softmax gives it all.
CERTAIN = 1e4
MAX_LISTED = 10


def label_map_dtype(num_classes):
    """What the class ids of so many classes are stored in, exactly."""
    return torch.float16 if num_classes <= MAX_HALF_CLASSES else torch.float32


def read_label_map(path, num_classes=None):
    """Read a label map and check it.

    It is read by :func:`~spvit_mm.utils.read_checkpoint`, so nothing in it can run.

    Args:
        path (str): The file.
        num_classes (int, optional): Its class ids must be smaller.

    Returns:
        Tensor: (2, K, h, w), float16 or float32.

    Raises:
        LabelMapError: With the path, if the file is missing, truncated, no
            label map, or holds other classes.
    """
    try:
        label_map = read_checkpoint(path, plain=True)
    except CheckpointError as error:
        raise LabelMapError(str(error)) from error
    reason = _find_fault(label_map, num_classes)
    if reason:
        raise LabelMapError(f'{path}: {reason}')
    return label_map


def _find_fault(label_map, num_classes):
    """What is wrong with a label map; None if nothing is."""
    if not isinstance(label_map, torch.Tensor):
        return f'a {type(label_map).__name__}, not a tensor'
    shape = tuple(label_map.shape)
    if len(shape) != 4 or shape[0] != 2 or 0 in shape:
        return f'a tensor of shape {shape}, not (2, K, h, w)'
    if label_map.dtype not in (torch.float16, torch.float32):
        return f'a tensor of {label_map.dtype}, not of float16 or float32'
    # numpy: a tenth of the cost on such small arrays, for every image read.
    scores, ids = label_map.numpy()
    if not np.isfinite(scores).all():
        return 'scores that are not finite'
    # Written so that NaN fails, too.
    if not ids.min() >= 0 or not (ids == np.floor(ids)).all():
        return 'class ids that are not whole numbers from 0'
    if num_classes is None:
        return None
    if ids.max() >= num_classes:
        return (
            f'class id {int(ids.max())}, but the data set has {num_classes} classes '
            f'(0..{num_classes - 1})'
        )
    if num_classes > MAX_HALF_CLASSES and label_map.dtype == torch.float16:
        return (
            f'class ids in float16, which is exact for {MAX_HALF_CLASSES} classes at '
            f'most, not for {num_classes}. Generate the maps anew, in float32'
        )
    return None


def write_label_map(path, label_map, num_classes):
    """Write a label map, whole or not at all, and read it back.

    Args:
        path (str): The file; its folder is made.
        label_map (Tensor): (2, K, h, w).
        num_classes (int): Decides between float16 and float32.

    Raises:
        LabelMapError: If it is no label map of so many classes, or what was
            read back differs.
    """
    label_map = label_map.detach().to('cpu', label_map_dtype(num_classes)).clone()
    reason = _find_fault(label_map, num_classes)
    if reason:
        raise LabelMapError(f'{path} is not written: {reason}')
    with whole_file(path) as partial:
        torch.save(label_map, partial)
        if not torch.equal(read_label_map(partial, num_classes), label_map):
            raise LabelMapError(f'{path}: what was read back is not what was written')


def label_map_names(image_paths, image_root):
    """The names of the label maps, relative to their root.

    Args:
        image_paths (Sequence[str]): Paths of images.
        image_root (str): The folder that holds them all.

    Returns:
        List[str]: '<class folder>/<image stem>.pt' for each.

    Raises:
        LabelMapError: If an image lies elsewhere, or two would share a map.
    """
    names = {}
    for path in image_paths:
        name = osp.relpath(path, image_root)
        if name.startswith(os.pardir):
            raise LabelMapError(
                f'The image {path} lies outside {image_root!r}, the folder that its '
                "label map's name is relative to."
            )
        name = osp.splitext(name)[0] + '.pt'
        if name in names:
            raise LabelMapError(
                f'The images {names[name]} and {path} would share the label map '
                f'{name}. Rename one of them.'
            )
        names[name] = path
    return list(names)


def find_label_maps(label_root):
    """The names of all label maps under a folder, relative to it."""
    found = set()
    for folder, _, files in os.walk(label_root, followlinks=True):
        prefix = osp.relpath(folder, label_root)
        prefix = '' if prefix == os.curdir else prefix
        found.update(osp.join(prefix, f) for f in files if f.endswith('.pt'))
    return found


def _with_inner(transforms):
    """Transforms, and those that they apply, such as RandomApply's."""
    for transform in transforms:
        yield transform
        inner = getattr(transform, 'transforms', [])
        yield from _with_inner(inner if isinstance(inner, list) else [inner])


@DATASETS.register_module()
class TokenLabelDataset(BaseDataset):
    """A data set of image files, each with its label map.

    Any data set of mmpretrain whose samples have an ``img_path`` can be
    wrapped: ImageNet, CustomDataset, ... Its samples gain ``token_label``, the
    map (2, K, h, w), and ``num_classes``.

    Args:
        dataset (dict): Config of the data set of the images, without a pipeline.
        label_root (str): Folder of the label maps.
        pipeline (Sequence[dict]): The pipeline. Crops and flips must be
            ``TokenLabelRandomResizedCrop`` and ``TokenLabelRandomFlip``, which
            record what they did; ``PackTokenLabelInputs`` comes last.
        num_classes (int, optional): Number of classes of the maps. Defaults to
            None: the classes of ``dataset``.
        missing (str): What a missing or broken map is: ``'error'``, or
            ``'image_label'``: the image's own label takes its place, which is
            counted and logged. Defaults to 'error'.
        check (str): What is read before training: ``'all'`` maps, a ``'sample'``
            of them, or ``'auto'``: all up to ``max_check``, beyond that a
            sample. All names are compared in each case. Defaults to 'auto'.
        max_check (int): Defaults to 10000.
        num_samples (int): Size of a sample, evenly spaced. Defaults to 256.
        **kwargs: ``indices``, ``serialize_data``, ``lazy_init``, ``metainfo``
            of mmpretrain's BaseDataset.

    Raises:
        LabelMapError: Before training, with the first ten maps that are missing
            or at fault and their count.
        ValueError: For a bad argument, or a pipeline that would show the image
            at another place than its map.

    Example:
        >>> train_dataloader = dict(dataset=dict(
        ...     type='TokenLabelDataset',
        ...     dataset=dict(type='ImageNet', data_root='data/imagenet',
        ...                  split='train'),
        ...     label_root='data/label_top5_train_nfnet',
        ...     pipeline=train_pipeline))
    """

    def __init__(
        self,
        dataset,
        label_root,
        pipeline=(),
        num_classes=None,
        missing='error',
        check='auto',
        max_check=10000,
        num_samples=256,
        metainfo=None,
        lazy_init=False,
        **kwargs,
    ):
        for name, value, allowed in (
            ('missing', missing, ('error', 'image_label')),
            ('check', check, ('auto', 'all', 'sample')),
        ):
            if value not in allowed:
                raise ValueError(f'`{name}` must be one of {allowed}, got {value!r}.')
        if isinstance(dataset, dict) and dataset.get('pipeline'):
            raise ValueError(
                'Give the `pipeline` to TokenLabelDataset, not to its `dataset`: it '
                'has to see the label maps.'
            )
        label_root = osp.expanduser(label_root)
        if not osp.isdir(label_root):
            raise ValueError(
                f'`label_root` must be the folder of the label maps, got '
                f'{label_root!r}, which is '
                f'{"a file" if osp.exists(label_root) else "not there"}.'
            )
        self.label_root = label_root
        self.missing = missing
        self.check = check
        self.max_check = max_check
        self.num_samples = num_samples
        # Shared memory: the workers count, too.
        self.num_missing = torch.zeros(1, dtype=torch.int64).share_memory_()
        # Of most label maps; known once they are checked.
        self._map_shape = None

        source = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self._source = source
        self.folder_to_idx = getattr(source, 'folder_to_idx', None)
        classes = source.metainfo.get('classes')
        if num_classes is None and classes is None:
            raise ValueError(
                'The wrapped `dataset` knows no classes: set `num_classes`, or its '
                '`metainfo=dict(classes=...)`.'
            )
        self.num_classes = len(classes) if num_classes is None else num_classes
        super().__init__(
            ann_file='',
            metainfo={**source.metainfo, **(metainfo or {})},
            data_prefix=dict(source.data_prefix),
            pipeline=pipeline,
            lazy_init=True,
            **kwargs,
        )
        self._check_pipeline()
        if not lazy_init:
            self.full_init()

    def _check_pipeline(self):
        """Refuse the crops and flips that leave the label map behind."""
        for transform in _with_inner(self.pipeline.transforms):
            if isinstance(transform, RecordsView):
                continue
            if isinstance(
                transform,
                (
                    RandomCrop,
                    RandomResizedCrop,
                    CenterCrop,
                    EfficientNetCenterCrop,
                    RandomFlip,
                    Pad,
                ),
            ):
                raise ValueError(
                    f'The `pipeline` has {type(transform).__name__}, which does not '
                    'record what it did, so that the label map would show another '
                    'place. Use TokenLabelRandomResizedCrop and TokenLabelRandomFlip.'
                )

    def load_data_list(self):
        """Pair the images with their maps, and check what is cheap to check."""
        source = self._source
        infos = [source.get_data_info(i) for i in range(len(source))]
        bad = next((info for info in infos if 'img_path' not in info), None)
        if bad is not None:
            raise ValueError(
                f'{type(source).__name__} gives samples without an `img_path` (keys '
                f'{sorted(bad)}), by which a label map is named. Write the images to '
                'a folder and read them with CustomDataset.'
            )
        names = label_map_names((info['img_path'] for info in infos), source.img_prefix)
        for info, name in zip(infos, names, strict=True):
            info['token_label_path'] = name
        self._check_maker()
        self._check_maps(names)
        # The list would else be held twice.
        self._source = None
        return infos

    def _check_maker(self):
        """Compare with what the maps' maker wrote beside them, if it did."""
        path = osp.join(self.label_root, INFO_FILE)
        if not osp.isfile(path):
            return
        with open(path, encoding='utf-8') as file:
            made_for = json.load(file).get('num_classes')
        if made_for is not None and made_for != self.num_classes:
            raise LabelMapError(
                f'The label maps in {self.label_root} were made by a teacher of '
                f'{made_for} classes ({INFO_FILE}), but the data set has '
                f'{self.num_classes}.'
            )

    def _check_maps(self, names):
        found = find_label_maps(self.label_root)
        present = [name for name in names if name in found]
        absent = [name for name in names if name not in found]
        if names and not present:
            example = (
                f'the {len(found)} files there are named as {min(found)!r}'
                if found
                else 'it holds no .pt files'
            )
            raise LabelMapError(
                f'No image has its label map in {self.label_root}: looked for names '
                f'as {names[0]!r}, but {example}. Are they the maps of another data '
                'set, or is `label_root` a folder too high or too low?'
            )
        every = self.check == 'all' or (
            self.check == 'auto' and len(present) <= self.max_check
        )
        step = 1 if every else -(-len(present) // self.num_samples)
        faults = [
            f'{osp.join(self.label_root, n)}: there is no such file' for n in absent
        ]
        faults += self._find_faults(present[::step])
        if not faults:
            return
        read = 'all' if every else f'{len(present[::step])} of {len(present)}'
        listed = '\n  '.join(faults[:MAX_LISTED])
        more = len(faults) - MAX_LISTED
        message = (
            f'{len(faults)} of {len(names)} images have no usable label map '
            f'({len(absent)} missing, {len(faults) - len(absent)} at fault, {read} of '
            f'the present ones read):\n  {listed}'
            + (f'\n  ... and {more} more' if more > 0 else '')
        )
        if self.missing == 'error':
            raise LabelMapError(
                f'{message}\nMake them anew with generate_token_labels.py, or set '
                "missing='image_label' to train these images with their own label."
            )
        print_log(
            f'Their own label takes its place: {message}',
            MMLogger.get_current_instance(),
            logging.WARNING,
        )

    def _find_faults(self, names):
        """Faults of the maps, each with its path; all must have one shape."""

        def look(name):
            try:
                return None, tuple(self._read(name).shape)
            except LabelMapError as error:
                return str(error), None

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(look, names))
        shapes = [shape for _, shape in results if shape is not None]
        self._map_shape = max(set(shapes), key=shapes.count) if shapes else None
        faults = [
            fault or self._shape_fault(name, shape)
            for name, (fault, shape) in zip(names, results, strict=True)
        ]
        return [fault for fault in faults if fault is not None]

    def _shape_fault(self, name, shape):
        if self._map_shape in (None, shape):
            return None
        return (
            f'{osp.join(self.label_root, name)}: shape {shape}, where most label maps '
            f'have {self._map_shape}'
        )

    def _read(self, name):
        label_map = read_label_map(osp.join(self.label_root, name), self.num_classes)
        fault = self._shape_fault(name, tuple(label_map.shape))
        if fault is not None:
            raise LabelMapError(fault)
        return label_map

    def prepare_data(self, idx):
        """A sample with its label map, sent through the pipeline."""
        info = self.get_data_info(idx)
        info['num_classes'] = self.num_classes
        try:
            info['token_label'] = self._read(info['token_label_path'])
        except LabelMapError as error:
            if self.missing == 'error':
                raise
            info['token_label'] = self._image_label_map(info)
            self._count_missing(error)
        return self.pipeline(info)

    def _image_label_map(self, info):
        label_map = torch.empty(2, 1, 1, 1, dtype=label_map_dtype(self.num_classes))
        label_map[0], label_map[1] = CERTAIN, info['gt_label']
        return label_map

    def _count_missing(self, error):
        self.num_missing += 1
        count = int(self.num_missing)
        # Ten lines, then one for every power of ten.
        if count <= MAX_LISTED or str(count).strip('0') == '1':
            print_log(
                f'The own label of the image takes the place of a label map (time '
                f'{count}): {error}',
                MMLogger.get_current_instance(),
                logging.WARNING,
            )

    def extra_repr(self):
        """Lines that describe the dataset."""
        return [*super().extra_repr()[1:], f'Label maps: \t{self.label_root}']

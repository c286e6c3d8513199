"""Segmentation data that cannot be trained on, named by file."""

import os.path as osp
from typing import Optional

import numpy as np
from mmcv.transforms import LoadAnnotations
from mmengine.utils import to_2tuple

from ..utils import CorruptImageError, UserError
from .data_checks import _leaves, describe_folder


class GuardedAnnotations:
    """A mask-loading transform that checks what it has loaded.

    Args:
        transform (LoadAnnotations): The transform of the pipeline.
        num_classes (int): Classes that the head tells apart.
    """

    def __init__(self, transform, num_classes: int) -> None:
        self.transform = transform
        self.num_classes = num_classes

    def __call__(self, results: dict) -> dict:
        path = results.get('seg_map_path')
        try:
            results = self.transform(results)
        except (OSError, AttributeError, TypeError, ValueError) as error:
            raise CorruptImageError(
                f'The mask {path} cannot be read: {type(error).__name__}: {error}'
            ) from error
        mask = results['gt_seg_map']
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
                f'image {results.get("img_path")} {shape[0]} x {shape[1]}. They must '
                'be of one size.'
            )
        bad = np.setdiff1d(np.unique(mask), [*range(self.num_classes), 255])
        if bad.size:
            raise CorruptImageError(
                f'The mask {path} holds the values {bad[:5].tolist()}, and the head '
                f'has num_classes={self.num_classes} (values from 0 to '
                f'{self.num_classes - 1}, and 255 to ignore). Set num_classes of the '
                'heads to the number of classes, or reduce_zero_label=True in the '
                'data set if 0 means "no class".'
            )
        return results

    def __repr__(self) -> str:
        return repr(self.transform)


def check_seg_dataset(dataset, split: str, num_classes: Optional[int] = None) -> None:
    """Raise a clear error for segmentation data that cannot be used.

    Missing files are found now; masks are checked as they are loaded, for which
    the pipelines of the data set are changed in place, once.

    Args:
        dataset (Dataset): A built data set or a wrapper of several.
        split (str): What to call it: 'training', 'validation' or 'test'.
        num_classes (int, optional): Classes that the head tells apart. None leaves
            the masks unchecked.

    Raises:
        UserError: For a split without images, or an image or mask that is
            missing; it names the folder or the file.
    """
    for leaf in _leaves(dataset):
        if not hasattr(leaf, 'seg_map_suffix'):
            continue
        folders = {key: path for key, path in leaf.data_prefix.items() if path}
        if len(leaf) == 0:
            raise UserError(
                f'The {split} data holds no images named *{leaf.img_suffix} '
                f'(img_suffix). {" ".join(map(describe_folder, folders.values()))}'
            )
        if leaf.backend_args is None:
            _check_files(leaf, split)
        transforms = getattr(leaf.pipeline, 'transforms', [])
        for i, transform in enumerate(transforms):
            if isinstance(transform, LoadAnnotations) and num_classes is not None:
                transforms[i] = GuardedAnnotations(transform, num_classes)


def _check_files(dataset, split: str) -> None:
    absent = {'img_path': [], 'seg_map_path': []}
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        for key, paths in absent.items():
            path = info.get(key)
            if path is not None and not osp.isfile(path):
                paths.append(path)
    for key, what in (('img_path', 'images'), ('seg_map_path', 'masks')):
        if absent[key]:
            names = ', '.join(absent[key][:3])
            raise UserError(
                f'{len(absent[key])} of {len(dataset)} {what} of the {split} data do '
                f'not exist: {names}{", ..." if len(absent[key]) > 3 else ""}. '
                'An image and its mask share their name up to img_suffix '
                f'({dataset.img_suffix}) and seg_map_suffix ({dataset.seg_map_suffix}).'
            )


def check_crops(model, *datasets) -> None:
    """Raise a UserError for a crop that does not hold one patch of the backbone.

    Args:
        model (nn.Module): The segmentor.
        *datasets (Dataset): Data sets whose pipelines may crop.
    """
    patch = getattr(getattr(model, 'backbone', None), 'patch_size', None)
    if patch is None:
        patch = getattr(getattr(model, 'backbone', None), 'patch_embed', None)
        patch = getattr(patch, 'patch_size', None) or getattr(
            getattr(patch, 'projection', None), 'stride', None
        )
    if patch is None:
        return
    patch = to_2tuple(patch)
    crops = {'model.test_cfg.crop_size': (model.test_cfg or {}).get('crop_size')}
    for dataset in datasets:
        for leaf in _leaves(dataset):
            for transform in getattr(getattr(leaf, 'pipeline', None), 'transforms', []):
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

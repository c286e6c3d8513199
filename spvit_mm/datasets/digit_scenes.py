"""Segmentation scenes composed from scikit-learn's real handwritten digits."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import mmcv
import numpy as np

from .digits import load_digits_arrays, split_indices

try:
    from mmseg.datasets import BaseSegDataset
    from mmseg.registry import DATASETS
except ImportError:
    # mmsegmentation is optional, and cannot be imported over an mmcv without
    # compiled operators of the original stack.
    BaseSegDataset = DATASETS = None

# The digits of each split, which share none.
SOURCES = {'train': 'train', 'val': 'test'}
# Raised when the same arguments draw other scenes than before.
VERSION = 1


def draw_scene(rng, images, labels, size, digit_sizes, num_digits):
    """Draw one scene: digits on a canvas, beside one another.

    Args:
        rng (np.random.Generator): Where all choices come from.
        images (np.ndarray): (n, 8, 8) uint8 digits to choose from, ink at 255.
        labels (np.ndarray): (n,) their classes 0..9.
        size (Tuple[int, int]): The canvas (h, w) in pixels.
        digit_sizes (Tuple[int, int]): Smallest and largest side of a digit, in
            pixels.
        num_digits (Tuple[int, int]): Fewest and most digits that are tried; one
            that would overlap another is left out, but never the first.

    Returns:
        Tuple[np.ndarray, np.ndarray]: The image (h, w, 3) uint8, and the mask
        (h, w) uint8: 0 is background, c + 1 the ink of digit c.
    """
    height, width = size
    ink = np.zeros(size, np.float32)
    mask = np.zeros(size, np.uint8)
    taken = np.zeros(size, bool)
    for _ in range(rng.integers(num_digits[0], num_digits[1] + 1)):
        side = int(rng.integers(digit_sizes[0], digit_sizes[1] + 1))
        y = int(rng.integers(0, height - side + 1))
        x = int(rng.integers(0, width - side + 1))
        i = int(rng.integers(len(images)))
        box = np.s_[y : y + side, x : x + side]
        if taken[box].any():
            continue
        digit = mmcv.imresize(images[i], (side, side), interpolation='bilinear')
        taken[box] = True
        ink[box] = digit.astype(np.float32) / 255
        mask[box][digit >= 96] = labels[i] + 1
    paper = rng.uniform(0, 80)
    contrast = rng.uniform(120, 175)
    noise = rng.normal(0, 8, size)
    image = np.clip(np.rint(paper + contrast * ink + noise), 0, 255).astype(np.uint8)
    return np.repeat(image[..., None], 3, axis=-1), mask


def write_scenes(folder, split, sizes, num_scenes, digit_sizes, num_digits, seed):
    """Write scenes as ``images/*.png`` and ``masks/*.png`` in a new folder.

    The folder appears with all its files at once, so that several processes may
    ask for it together; one that is there already is left as it is.
    """
    folder = Path(folder)
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    chosen = split_indices(SOURCES[split])
    images, labels = (array[chosen] for array in load_digits_arrays())
    rng = np.random.default_rng([seed, len(split)])
    unfinished = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    try:
        for i in range(num_scenes):
            image, mask = draw_scene(
                rng, images, labels, sizes[i % len(sizes)], digit_sizes, num_digits
            )
            mmcv.imwrite(image, str(unfinished / f'images/{i:05d}.png'))
            mmcv.imwrite(mask, str(unfinished / f'masks/{i:05d}.png'))
        unfinished.chmod(0o755)
        try:
            os.rename(unfinished, folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_range(name, value, least):
    value = tuple(value)
    if len(value) != 2 or not least <= value[0] <= value[1]:
        raise ValueError(
            f'`{name}` must be (smallest, largest), at least {least}, got {value}.'
        )
    return value


def _check_sizes(sizes, digit_sizes):
    sizes = [sizes] if isinstance(sizes[0], int) else list(sizes)
    sizes = [tuple(size) for size in sizes]
    for size in sizes:
        if len(size) != 2 or min(size) < digit_sizes[1]:
            raise ValueError(
                f'`sizes` must be canvases (h, w) that hold the largest digit, '
                f'{digit_sizes[1]} pixels (`digit_sizes`), got {size}.'
            )
    return sizes


if DATASETS is not None:

    @DATASETS.register_module()
    class DigitScenes(BaseSegDataset):
        """Scenes of handwritten digits: segmentation with no download.

        Real digits, 8 x 8 pixels in their source, are enlarged and laid beside
        one another on canvases of any size. Class 0 is the background, class
        c + 1 the ink of digit c. Training and validation share no digit. The
        scenes follow from the arguments alone. They are written once, as image
        and mask files, so that every mmsegmentation pipeline and tool works.

        Args:
            split (str): 'train' or 'val'. Defaults to 'train'.
            sizes (Tuple[int, int] | Sequence[Tuple[int, int]]): The canvas
                (h, w) in pixels, or several that take turns.
                Defaults to (64, 96).
            num_scenes (int, optional): Defaults to None: 1,000 for training,
                200 for validation.
            digit_sizes (Tuple[int, int]): Smallest and largest side of a
                digit, in pixels. Defaults to (20, 32).
            num_digits (Tuple[int, int]): Fewest and most digits tried a scene.
                Defaults to (3, 8).
            seed (int): Defaults to 0.
            data_root (str): Where the files are written, in a sub-folder of
                these arguments. Defaults to 'data/digit_scenes'.
            **kwargs: ``pipeline``, ``indices``, ``test_mode`` and the other
                arguments of mmsegmentation's BaseSegDataset.

        Raises:
            ValueError: For an unknown split, a canvas smaller than the largest
                digit, or no scenes.
        """

        METAINFO = dict(
            classes=('background', *(f'digit {d}' for d in range(10))),
            palette=[
                [0, 0, 0],
                [230, 25, 75],
                [60, 180, 75],
                [255, 225, 25],
                [0, 130, 200],
                [245, 130, 48],
                [145, 30, 180],
                [70, 240, 240],
                [240, 50, 230],
                [210, 245, 60],
                [250, 190, 212],
            ],
        )

        def __init__(
            self,
            split='train',
            sizes=(64, 96),
            num_scenes=None,
            digit_sizes=(20, 32),
            num_digits=(3, 8),
            seed=0,
            data_root='data/digit_scenes',
            **kwargs,
        ):
            if split not in SOURCES:
                raise ValueError(
                    f'`split` must be one of {tuple(SOURCES)}, got {split!r}.'
                )
            if num_scenes is None:
                num_scenes = 1000 if split == 'train' else 200
            if num_scenes < 1:
                raise ValueError(
                    f'`num_scenes` must be at least 1, got {num_scenes}: the '
                    f'{split!r} split would be empty.'
                )
            digit_sizes = _check_range('digit_sizes', digit_sizes, 8)
            scenes = dict(
                split=split,
                sizes=_check_sizes(sizes, digit_sizes),
                num_scenes=num_scenes,
                digit_sizes=digit_sizes,
                num_digits=_check_range('num_digits', num_digits, 1),
                seed=seed,
            )
            text = json.dumps([VERSION, scenes], sort_keys=True)
            name = f'{split}-{hashlib.sha1(text.encode()).hexdigest()[:8]}'
            write_scenes(Path(data_root) / name, **scenes)
            super().__init__(
                data_root=str(data_root),
                data_prefix=dict(
                    img_path=f'{name}/images', seg_map_path=f'{name}/masks'
                ),
                img_suffix='.png',
                seg_map_suffix='.png',
                **kwargs,
            )

"""Some of the classes of a folder of images."""

import os
import os.path as osp
from collections.abc import Sequence
from typing import Optional, Union

from mmpretrain.datasets import CustomDataset
from mmpretrain.datasets.custom import get_samples
from mmpretrain.registry import DATASETS

MAX_LISTED = 10
# CustomDataset's own, and what the decoders read beside these.
EXTENSIONS = (
    *('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif'),
    *('.tiff', '.webp', '.jp2'),
)


@DATASETS.register_module()
class CustomSubsetDataset(CustomDataset):
    """mmpretrain's CustomDataset over chosen sub-folders, such as ImageNet-100.

    CustomDataset refuses a folder that holds more sub-folders than there are
    classes; this one leaves the others out, so ImageNet need not be copied. The
    labels follow the folders' names in alphabetical order, as they would in a folder
    of these classes alone.

    Args:
        class_folders (Sequence[str] | str): Names of the sub-folders, one a class, or
            the path of a text file with one name a line; empty lines and what follows
            a ``#`` are left out.
        data_root (str): As of CustomDataset. Defaults to ''.
        data_prefix (str | dict): The folder of the sub-folders. Defaults to ''.
        metainfo (dict, optional): Its ``classes`` may name the classes in the labels'
            order. Defaults to None: the folders' names.
        extensions (Sequence[str]): Endings of the images. Defaults to ``EXTENSIONS``,
            more than CustomDataset's.
        **kwargs: Of CustomDataset, but for ``ann_file`` and ``with_label``.

    Raises:
        ValueError: If ``class_folders`` is no list of two names or more, if one comes
            twice, or if the folder lacks one of them or its images.
    """

    def __init__(
        self,
        class_folders: Union[Sequence[str], str],
        data_root: str = '',
        data_prefix: Union[str, dict] = '',
        metainfo: Optional[dict] = None,
        extensions: Sequence[str] = EXTENSIONS,
        **kwargs,
    ):
        for name in ('ann_file', 'with_label'):
            if name in kwargs:
                raise ValueError(
                    f'CustomSubsetDataset takes the labels from sub-folders, so not '
                    f'`{name}`. CustomDataset reads an annotation file.'
                )
        self.class_folders = sorted(read_class_folders(class_folders))
        metainfo = dict(metainfo or {})
        names = metainfo.setdefault('classes', tuple(self.class_folders))
        if len(names) != len(self.class_folders):
            raise ValueError(
                f"metainfo['classes'] names {len(names)} classes, but `class_folders` "
                f'has {len(self.class_folders)}.'
            )
        super().__init__(
            data_root=data_root,
            data_prefix=data_prefix,
            metainfo=metainfo,
            extensions=extensions,
            **kwargs,
        )

    def _find_samples(self):
        root = self.img_prefix
        if not osp.isdir(root):
            raise ValueError(f'The folder {root} does not exist.')
        there = {entry.name for entry in os.scandir(root) if entry.is_dir()}
        missing = [name for name in self.class_folders if name not in there]
        self._check(missing, f'has no sub-folder for {{}} (it has {len(there)} others)')
        self.folder_to_idx = {name: i for i, name in enumerate(self.class_folders)}
        samples, empty = get_samples(root, self.folder_to_idx, self.is_valid_file)
        self._check(sorted(empty), 'has no images of {} in the sub-folders')
        return samples

    def _check(self, names, message):
        if names:
            shown = ', '.join(names[:MAX_LISTED])
            shown += ', ...' if len(names) > MAX_LISTED else ''
            count = f'{len(names)} of the {len(self.class_folders)} classes'
            raise ValueError(
                f'{self.img_prefix} {message.format(count)}: {shown}. Add them, or '
                'change `class_folders` and the number of classes.'
            )


def read_class_folders(class_folders: Union[Sequence[str], str]) -> list:
    """Names of folders, from a list or a text file.

    Raises:
        ValueError: As of :class:`CustomSubsetDataset`.
    """
    origin = '`class_folders`'
    if isinstance(class_folders, str):
        origin = f'The file {class_folders} of `class_folders`'
        if not osp.isfile(class_folders):
            raise ValueError(f'{origin} does not exist. It has one name a line.')
        with open(class_folders, encoding='utf-8') as file:
            lines = [line.split('#')[0].strip() for line in file]
        class_folders = [line for line in lines if line]
    names = list(class_folders)
    wrong = [name for name in names if not isinstance(name, str) or osp.sep in name]
    if wrong:
        raise ValueError(f'{origin} takes names of sub-folders, got {wrong[0]!r}.')
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f'{origin} has some names twice: {", ".join(twice)}.')
    if len(names) < 2:
        raise ValueError(f'{origin} needs two names or more, got {names}.')
    return names

"""Making label maps: a classifier's opinion on every place of every image."""

import hashlib
import json
import os
import os.path as osp

import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from mmengine.utils import ProgressBar
from mmpretrain.datasets import CustomDataset
from torch.utils.data import DataLoader, Subset

from ..utils import (
    LabelMapError,
    UserError,
    check_new_folder,
    new_figure,
    reverses_channels,
    save_figure,
    whole_file,
)
from .checks import guard_files, patch_size
from .subset import EXTENSIONS
from .token_labels import (
    INFO_FILE,
    find_label_maps,
    label_map_dtype,
    label_map_names,
    read_label_map,
    write_label_map,
)


class DenseTeacher:
    """A classifier of mmpretrain that scores every place of its last grid.

    Its neck and head see each place as they see the whole image: a CNN's
    feature vectors, of one place each, go through pooling and classifier; a
    ViT's patch tokens go where the class token goes. A head that has an
    auxiliary head for tokens (TokenLabelClsHead) uses that.

    Args:
        model (ImageClassifier): A trained classifier; it is put in evaluation
            mode and its backbone asked for its feature map.

    Raises:
        UserError: If it is no such classifier, with the reason.
    """

    def __init__(self, model):
        for name in ('backbone', 'head', 'data_preprocessor'):
            if getattr(model, name, None) is None:
                raise UserError(
                    f'The teacher, a {type(model).__name__}, has no `{name}`; an image '
                    'classifier of mmpretrain is needed.'
                )
        self.model = model.eval()
        backbone = model.backbone
        self.on_tokens = getattr(model.head, 'aux_head', None) is not None
        self.norm = None
        if getattr(backbone, 'out_type', None) is not None:
            if backbone.out_type == 'avg_featmap':
                self.norm = getattr(backbone, 'ln2', None)
            backbone.out_type = 'featmap'
        if getattr(backbone, 'gap_before_final_norm', False):
            backbone.gap_before_final_norm = False

    @torch.no_grad()
    def __call__(self, images):
        """Scores (B, classes, h, w) of preprocessed images (B, 3, H, W)."""
        feats = self.model.backbone(images)
        feat = feats[-1] if isinstance(feats, (tuple, list)) else feats
        if isinstance(feat, (tuple, list)):
            feat = feat[0]
        if feat.ndim != 4:
            raise UserError(
                f'The teacher {type(self.model.backbone).__name__} gives features of '
                f'shape {tuple(feat.shape)}, which keep no places. Take one with a '
                'feature map: a CNN, Swin, or a ViT with `out_type`.'
            )
        batch, channels, height, width = feat.shape
        places = feat.permute(0, 2, 3, 1).reshape(-1, channels)
        if self.norm is not None:
            places = self.norm(places)
        head = self.model.head
        if self.on_tokens:
            scores = head.aux_head(places)
        else:
            if self.model.with_neck:
                # Images of one place: pooling leaves them as they are.
                places = self.model.neck((places[..., None, None],))[-1]
            scores = head((places,))
        return scores.reshape(batch, height, width, -1).permute(0, 3, 1, 2).float()


def make_label_map(scores, top_k=5):
    """Keep the highest scores: (B, classes, h, w) -> (B, 2, K, h, w)."""
    values, ids = scores.topk(min(top_k, scores.shape[1]), dim=1)
    return torch.stack((values, ids.to(values.dtype)), dim=1)


def generate_token_labels(
    model,
    image_root,
    label_root,
    size=224,
    top_k=5,
    batch_size=16,
    num_workers=2,
    device='cpu',
    teacher_name='',
    preview=0,
    progress=True,
):
    """Write the label maps of all images under a folder.

    Whole images are shown to the teacher, squeezed to a square, so that a map
    covers its image from edge to edge. Maps that are there are read and left
    alone, so that a run goes on where it stopped; each new one is written whole
    or not at all, and read back.

    Args:
        model (ImageClassifier): The teacher, with its weights.
        image_root (str): Folder of images, in class folders or not.
        label_root (str): Folder for the maps: new, empty, or one that an earlier
            run with the same settings began.
        size (int): Side in pixels that the teacher sees. Defaults to 224.
        top_k (int): Scores kept at each place. Defaults to 5, as published.
        batch_size (int): Defaults to 16.
        num_workers (int): Processes that read images. Defaults to 2.
        device (str): Defaults to 'cpu'.
        teacher_name (str): Noted beside the maps. Defaults to ''.
        preview (int): Images to draw beside their maps, to ``preview.png`` in
            ``label_root``. Defaults to 0.
        progress (bool): Whether to show a progress bar. Defaults to True.

    Returns:
        Dict[str, int]: How many maps were ``written`` and how many ``kept``.

    Raises:
        UserError: Before the first image, for bad arguments, a teacher of
            another number of classes than there are class folders, or maps in
            ``label_root`` that were made otherwise.
    """
    for name, value in (('size', size), ('top_k', top_k), ('batch_size', batch_size)):
        if value < 1:
            raise UserError(f'`{name}` must be at least 1, got {value}.')
    patch = patch_size(model)
    if patch is not None and size < max(patch):
        raise UserError(
            f'`size` must hold one patch of the teacher, {patch[0]} x {patch[1]} '
            f'pixels, got {size}.'
        )
    if not osp.isdir(image_root):
        what = 'is a file' if osp.exists(image_root) else 'does not exist'
        raise UserError(f'The folder of images {image_root!r} {what}.')
    label_root = check_new_folder(label_root)

    teacher = DenseTeacher(model.to(device))
    num_classes = getattr(model.head, 'num_classes', None)
    if num_classes is None:
        raise UserError(
            f'The head of the teacher, a {type(model.head).__name__}, has no '
            '`num_classes`.'
        )
    classes = _class_folders(image_root)
    if classes and len(classes) != num_classes:
        raise UserError(
            f'The teacher knows {num_classes} classes, but {image_root} has '
            f'{len(classes)} class folders ({", ".join(classes[:3])}, ...). Its class '
            'ids would not be those of the folder: train the teacher on it first.'
        )
    try:
        dataset = CustomDataset(
            data_prefix=image_root,
            with_label=False,
            extensions=EXTENSIONS,
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(
                    type='Resize',
                    scale=(size, size),
                    backend='pillow',
                    interpolation='bicubic',
                ),
                dict(type='PackInputs'),
            ],
            test_mode=True,
        )
    except RuntimeError as error:  # no images
        raise UserError(f'The folder of images {image_root!r}: {error}') from error
    guard_files(dataset)
    paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    names = label_map_names(paths, image_root)
    settings = dict(
        teacher=teacher_name,
        weights=_fingerprint(model),
        num_classes=num_classes,
        classes=classes,
        size=size,
        top_k=min(top_k, num_classes),
        dtype=str(label_map_dtype(num_classes)),
        preprocessing=_preprocessing(model.data_preprocessor),
    )
    _open_label_root(label_root, settings)

    todo = _unfinished(names, label_root, num_classes)
    bar = ProgressBar(len(todo)) if progress and todo else None
    loader = DataLoader(
        Subset(dataset, todo),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=pseudo_collate,
    )
    done = iter(todo)
    for data in loader:
        images = model.data_preprocessor(data, False)['inputs']
        scores = teacher(images)
        if not scores.isfinite().all():
            raise UserError(
                f'The teacher gives nan or infinity for one of {len(images)} images from '
                f'{names[next(done)]} on. Look at data_preprocessor of its config.'
            )
        for label_map in make_label_map(scores, top_k):
            path = osp.join(label_root, names[next(done)])
            write_label_map(path, label_map, num_classes)
            if bar is not None:
                bar.update()
    if bar is not None:
        print()
    if preview:
        chosen = np.linspace(0, len(names) - 1, min(preview, len(names))).astype(int)
        draw_preview(
            [paths[i] for i in chosen],
            [osp.join(label_root, names[i]) for i in chosen],
            osp.join(label_root, 'preview.png'),
            classes,
        )
    return dict(written=len(todo), kept=len(names) - len(todo))


def _class_folders(image_root):
    return sorted(entry.name for entry in os.scandir(image_root) if entry.is_dir())


def _fingerprint(model):
    """Tells teachers apart: a hash of the weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]


def _preprocessing(preprocessor):
    """How images are normalized, which is not among the weights."""
    found = {'reverses_channels': reverses_channels(preprocessor)}
    for name in ('mean', 'std'):
        if isinstance(value := getattr(preprocessor, name, None), torch.Tensor):
            found[name] = [round(x, 4) for x in value.flatten().tolist()]
    return found


def _open_label_root(label_root, settings):
    """Take up a folder that the same settings began, or begin it."""
    path = osp.join(label_root, INFO_FILE)
    if osp.isfile(path):
        with open(path, encoding='utf-8') as file:
            found = json.load(file)
        # A folder that was begun before it was kept takes up what comes first.
        complete = 'preprocessing' in found
        found.setdefault('preprocessing', settings['preprocessing'])
        differing = [key for key in settings if found.get(key) != settings[key]]
        if differing:
            listed = '; '.join(
                f'{key}: {found.get(key)!r} there, {settings[key]!r} now'
                for key in differing
            )
            raise UserError(
                f'The label maps in {label_root} were made otherwise ({listed[:500]}). '
                'Give another folder, so that maps of two kinds are not mixed.'
            )
        if not complete:
            _write_settings(path, settings)
        return
    if osp.isdir(label_root) and find_label_maps(label_root):
        raise UserError(
            f'{label_root} holds .pt files, but no {INFO_FILE} that says how they were '
            'made. Give a new folder, so that they are neither mixed nor lost.'
        )
    _write_settings(path, settings)


def _write_settings(path, settings):
    with whole_file(path) as partial, open(partial, 'w', encoding='utf-8') as file:
        json.dump(settings, file, indent=1)


def _unfinished(names, label_root, num_classes):
    """Indices of the maps that are missing or cannot be read."""
    present = find_label_maps(label_root)
    todo = []
    for i, name in enumerate(names):
        if name in present:
            try:
                read_label_map(osp.join(label_root, name), num_classes)
                continue
            except LabelMapError as error:
                print(f'Made anew: {error}')
        todo.append(i)
    return todo


def draw_preview(image_paths, map_paths, path, classes=None):
    """Draw images beside their label maps.

    Args:
        image_paths (Sequence[str]): Images.
        map_paths (Sequence[str]): Their label maps.
        path (str): The PNG to write.
        classes (Sequence[str], optional): Names of the classes.
    """
    figure = new_figure(8, 2.6 * len(image_paths))
    axes = figure.subplots(len(image_paths), 3, squeeze=False)
    for row, image_path, map_path in zip(axes, image_paths, map_paths, strict=True):
        image = mmcv.imread(image_path, channel_order='rgb')
        height, width = image.shape[:2]
        extent = (0, width, height, 0)
        label_map = read_label_map(map_path).float()
        ids, counts = label_map[1, 0].long().unique(return_counts=True)
        top = ids[counts.argsort(descending=True)].tolist()
        # The most frequent classes get colours of their own, the others grey.
        colours = torch.full(label_map.shape[2:], 9)
        for i, class_id in enumerate(top[:9]):
            colours[label_map[1, 0] == class_id] = i
        row[0].imshow(image, extent=extent)
        row[0].set_title(osp.basename(image_path), fontsize=7)
        row[1].imshow(colours, cmap='tab10', vmin=0, vmax=9, extent=extent)
        labels = [classes[i] if classes else str(i) for i in top[:3]]
        row[1].set_title('best class: ' + ', '.join(labels), fontsize=7)
        shown = row[2].imshow(label_map[0, 0], cmap='viridis', extent=extent)
        row[2].set_title('its score', fontsize=7)
        figure.colorbar(shown, ax=row[2])
        for axis in row:
            axis.set_axis_off()
    save_figure(figure, path, dpi=100)

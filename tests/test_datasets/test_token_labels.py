import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmpretrain.registry import DATASETS, TRANSFORMS
from torch.utils.data import DataLoader

import spvit_mm  # noqa: F401
from spvit_mm.datasets.token_labels import (
    label_map_dtype,
    read_label_map,
    write_label_map,
)
from spvit_mm.models.heads import crop_label_maps
from spvit_mm.utils import LabelMapError, UserError


def a_map(num_classes=3, hw=(4, 6), top_k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_classes, *hw, generator=generator).topk(top_k, dim=0)
    return torch.stack((scores[0], scores[1].float()))


@pytest.fixture
def folder(tmp_path):
    """Nine images in three class folders and, published alike, their maps."""
    for c in 'abc':
        for i in range(3):
            path = tmp_path / 'images' / c / f'{c}_{i}.JPEG.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.full((20, 30, 3), 10 * i, np.uint8))
            label = tmp_path / 'labels' / c / f'{c}_{i}.JPEG.pt'
            label.parent.mkdir(parents=True, exist_ok=True)
            torch.save(a_map(seed=i).half(), label)
    return tmp_path


PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='TokenLabelRandomResizedCrop', scale=(16, 24)),
    dict(type='TokenLabelRandomFlip', prob=0.5),
    dict(type='RandAugment', policies='timm_increasing', num_policies=2,
         total_level=10, magnitude_level=9, magnitude_std=0.5),
    dict(type='RandomErasing', erase_prob=0.25, mode='rand'),
    dict(type='PackTokenLabelInputs'),
]  # fmt: skip


def build(folder, pipeline=PIPELINE, **kwargs):
    return DATASETS.build(
        dict(
            type='TokenLabelDataset',
            dataset=dict(type='CustomDataset', data_prefix=str(folder / 'images')),
            label_root=str(folder / 'labels'),
            pipeline=pipeline,
            **kwargs,
        )
    )


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches(folder, num_workers):
    dataset = build(folder)
    assert len(dataset) == 9
    assert dataset.CLASSES == ('a', 'b', 'c')
    assert dataset.get_gt_labels().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    loader = DataLoader(
        dataset, batch_size=9, num_workers=num_workers, collate_fn=pseudo_collate
    )
    batch = next(iter(loader))
    for i, (image, sample) in enumerate(
        zip(batch['inputs'], batch['data_samples'], strict=True)
    ):
        assert image.shape == (3, 16, 24)
        assert sample.gt_label.item() == i // 3
        assert sample.num_classes == 3
        assert torch.equal(sample.token_label, a_map(seed=i % 3).half())
        assert sample.token_label_view.dtype == torch.float32
        assert ((sample.token_label_view >= 0) & (sample.token_label_view <= 1)).all()


def test_imagenet_with_an_annotation_file(folder):
    (folder / 'meta.txt').write_text('a/a_0.JPEG.png 7\nb/b_2.JPEG.png 1\n')
    dataset = DATASETS.build(
        dict(
            type='TokenLabelDataset',
            dataset=dict(
                type='ImageNet',
                data_root=str(folder),
                data_prefix='images',
                ann_file='meta.txt',
            ),
            label_root=str(folder / 'labels'),
            pipeline=PIPELINE,
        )
    )
    assert [dataset[i]['data_samples'].gt_label.item() for i in (0, 1)] == [7, 1]
    assert dataset.num_classes == 1000


def test_the_view_says_what_the_crop_shows():
    # The image's values are its coordinates.
    height, width = 200, 300
    image = np.zeros((height, width, 3), np.float32)
    image[..., 0] = (np.arange(width) + 0.5) / width
    image[..., 1] = ((np.arange(height) + 0.5) / height)[:, None]
    crop = TRANSFORMS.build(
        dict(type='TokenLabelRandomResizedCrop', scale=(100, 100), backend='cv2')
    )
    flip = TRANSFORMS.build(
        dict(
            type='TokenLabelRandomFlip',
            prob=[0.25, 0.25, 0.25],
            direction=['horizontal', 'vertical', 'diagonal'],
        )
    )
    np.random.seed(0)
    directions = set()
    for _ in range(40):
        results = dict(img=image.copy())
        # Twice: views compose.
        results = flip(crop(crop(results)))
        directions.add(results['flip_direction'])
        left, top, right, bottom = results['token_label_view']
        x, y = results['img'][50:, 50:, :2][0, 0]
        half = np.float32(50.5 / 100)
        assert abs(left + half * (right - left) - x) < 0.01
        assert abs(top + half * (bottom - top) - y) < 0.01
    assert directions == {None, 'horizontal', 'vertical', 'diagonal'}


def test_labels_stay_where_their_pixels_are():
    """Image and map show the same classes by colour, through crop and flip."""
    classes = np.kron(np.arange(16).reshape(4, 4), np.ones((32, 32)))
    image = np.repeat(classes[..., None], 3, axis=-1).astype(np.float32)
    label_map = torch.zeros(1, 2, 1, 128, 128)
    label_map[:, 0] = 100
    label_map[0, 1, 0] = torch.from_numpy(classes)
    crop = TRANSFORMS.build(
        dict(
            type='TokenLabelRandomResizedCrop', scale=(64, 64), interpolation='nearest'
        )
    )
    flip = TRANSFORMS.build(dict(type='TokenLabelRandomFlip', prob=0.5))
    np.random.seed(1)
    for _ in range(10):
        results = flip(crop(dict(img=image.copy())))
        view = torch.tensor([results['token_label_view']])
        seen = crop_label_maps(label_map, view, 16, (64, 64))[0].argmax(0).numpy()
        agree = seen == results['img'][..., 0]
        assert agree.mean() > 0.94  # all but the seams


def test_files(tmp_path):
    path = str(tmp_path / 'new' / 'x.pt')
    write_label_map(path, a_map(), 3)
    assert torch.equal(read_label_map(path, 3), a_map().half())
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['x.pt']
    assert label_map_dtype(2048) == torch.float16
    assert label_map_dtype(2049) == torch.float32
    # The highest ids of both kinds are exact.
    for num_classes in (2048, 2049, 21841):
        label_map = torch.full((2, 1, 1, 1), float(num_classes - 1))
        write_label_map(path, label_map, num_classes)
        assert read_label_map(path, num_classes)[1].item() == num_classes - 1


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def fails(*args):
        raise OSError('No space left on device')

    monkeypatch.setattr(torch, 'save', fails)
    with pytest.raises(UserError, match='No space'):
        write_label_map(str(tmp_path / 'x.pt'), a_map(), 3)
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self):
        return (eval, ('1/0',))


def break_map(path, how):
    """Break a label map; returns what the error must say."""
    good = a_map()
    wrong = {
        'class id': ({'x': 3}, 'class id 3, but the data set has 3 classes'),
        'negative': ({'x': -1}, 'not whole numbers'),
        'fraction': ({'x': 0.5}, 'not whole numbers'),
        'nan id': ({'x': float('nan')}, 'not whole numbers'),
    }
    if how in wrong:
        good[1, 0, 0, 0] = wrong[how][0]['x']
        torch.save(good, path)
        return wrong[how][1]
    if how == 'nan':
        good[0, 0, 0, 0] = float('nan')
        torch.save(good, path)
        return 'not finite'
    if how == 'missing':
        path.unlink()
        return 'no such file'
    if how == 'truncated':
        path.write_bytes(path.read_bytes()[:700])
        return r'only partly downloaded \(700 bytes'
    if how == 'empty':
        path.write_bytes(b'')
        return '0 bytes'
    if how == 'html':
        path.write_text('<!DOCTYPE html><html>404</html>')
        return 'a web page'
    if how == 'code':
        torch.save(Evil(), path)
        return 'asks for .*eval`'
    if how == 'pickle':
        path.write_bytes(pickle.dumps(Evil()))
        return 'a bare pickle'
    if how == 'dict':
        torch.save(dict(label=good), path)
        return 'a dict, not a tensor'
    if how == 'shape':
        torch.save(good[0], path)
        return r'shape \(2, 4, 6\)'
    if how == 'grid':
        torch.save(good[..., :3].contiguous(), path)
        return r'\(2, 2, 4, 3\), where most label maps have \(2, 2, 4, 6\)'
    assert how == 'integers'
    torch.save(good.long(), path)
    return 'torch.int64'


FAULTS = ['missing', 'truncated', 'empty', 'html', 'code', 'pickle', 'dict', 'shape', 'grid', 'integers', 'nan', 'negative', 'fraction'] + ['class id', 'nan id']  # fmt: skip


@pytest.mark.parametrize('how', FAULTS)
def test_a_bad_label_map_is_named_before_training(folder, how):
    path = folder / 'labels' / 'b' / 'b_1.JPEG.pt'
    match = break_map(path, how)
    with pytest.raises(LabelMapError, match=match) as info:
        build(folder)
    assert str(path) in str(info.value)
    assert '1 of 9 images have no usable label map' in str(info.value)


@pytest.mark.parametrize('how', FAULTS)
def test_the_image_label_can_take_its_place(folder, how):
    break_map(folder / 'labels' / 'b' / 'b_1.JPEG.pt', how)
    dataset = build(folder, missing='image_label')
    sample = dataset[4]['data_samples']
    view = sample.token_label_view[None]
    target = crop_label_maps(sample.token_label[None], view, 3, (2, 3))
    assert torch.equal(target[0, 1], torch.ones(2, 3))
    assert dataset.num_missing.item() == 1


def test_fallback_is_counted_across_workers(folder):
    for i in range(3):
        break_map(folder / 'labels' / 'b' / f'b_{i}.JPEG.pt', 'truncated')
    dataset = build(folder, missing='image_label')
    for _ in DataLoader(dataset, num_workers=2, collate_fn=pseudo_collate):
        pass
    assert dataset.num_missing.item() == 3


def test_the_first_ten_and_the_count(tmp_path):
    for i in range(30):
        (tmp_path / 'images' / 'a').mkdir(parents=True, exist_ok=True)
        cv2.imwrite(
            str(tmp_path / 'images' / 'a' / f'{i:02d}.png'), np.zeros((4, 4), np.uint8)
        )
    (tmp_path / 'images' / 'b').mkdir()
    cv2.imwrite(str(tmp_path / 'images' / 'b' / 'x.png'), np.zeros((4, 4), np.uint8))
    write_label_map(str(tmp_path / 'labels' / 'b' / 'x.pt'), a_map(2), 2)
    with pytest.raises(LabelMapError) as info:
        build(tmp_path)
    message = str(info.value)
    assert '30 of 31' in message
    assert 'and 20 more' in message
    assert message.count('no such file') == 10
    assert '09.pt' in message
    assert '10.pt' not in message


@pytest.mark.parametrize('how', ['truncated', 'grid'])
def test_a_large_set_is_sampled(folder, how):
    break_map(folder / 'labels' / 'b' / 'b_1.JPEG.pt', how)
    # Every third is read: not the broken one, which is found when it is its turn.
    dataset = build(folder, max_check=5, num_samples=3)
    with pytest.raises(LabelMapError, match='b_1'):
        dataset[4]
    with pytest.raises(LabelMapError, match='b_1'):
        build(folder, max_check=5, num_samples=3, check='all')


def test_maps_of_another_data_set(folder):
    (folder / 'labels').rename(folder / 'others')
    (folder / 'labels').mkdir()
    (folder / 'others').rename(folder / 'labels' / 'train')
    with pytest.raises(LabelMapError, match="'train/a/a_0.JPEG.pt'") as info:
        build(folder)
    assert "'a/a_0.JPEG.pt'" in str(info.value)
    # Also where the image's label may take a map's place: all would be missing.
    with pytest.raises(LabelMapError, match='another data set'):
        build(folder, missing='image_label')


def test_another_number_of_classes_beside_the_maps(folder):
    (folder / 'labels' / 'token_labels.json').write_text(json.dumps({'num_classes': 9}))
    with pytest.raises(LabelMapError, match='9 classes .* has 3'):
        build(folder)


def test_half_precision_ids_of_many_classes(folder):
    with pytest.raises(LabelMapError, match='exact for 2048 classes'):
        build(folder, num_classes=5000)


@pytest.mark.parametrize(
    'transform',
    [
        dict(type='RandomResizedCrop', scale=16),
        dict(type='RandomFlip', prob=0.5),
        dict(type='CenterCrop', crop_size=16),
        dict(type='RandomCrop', crop_size=16),
        dict(type='Pad', size=(64, 64)),
    ],
)
def test_transforms_that_leave_the_map_behind(folder, transform):
    inside = dict(type='RandomApply', transforms=[transform], prob=0.5)
    among = dict(type='RandomChoice', transforms=[[PIPELINE[1]], [transform]])
    for step in (transform, inside, among):
        with pytest.raises(
            ValueError, match=f'{transform["type"]}, which does not record'
        ):
            build(folder, pipeline=[PIPELINE[0], step, PIPELINE[-1]])


def test_bad_arguments(folder):
    with pytest.raises(ValueError, match='`label_root` .* not there'):
        DATASETS.build(
            dict(
                type='TokenLabelDataset',
                dataset=dict(type='Digits'),
                label_root=str(folder / 'nowhere'),
            )
        )
    with pytest.raises(ValueError, match='`missing`'):
        build(folder, missing='ignore')
    with pytest.raises(ValueError, match='`check`'):
        build(folder, check='none')
    with pytest.raises(ValueError, match='Give the `pipeline` to'):
        DATASETS.build(
            dict(
                type='TokenLabelDataset',
                dataset=dict(type='Digits', pipeline=[dict(type='PackInputs')]),
                label_root=str(folder / 'labels'),
            )
        )
    with pytest.raises(ValueError, match='without an `img_path`'):
        DATASETS.build(
            dict(
                type='TokenLabelDataset',
                dataset=dict(type='Digits'),
                label_root=str(folder / 'labels'),
            )
        )
    with pytest.raises(ValueError, match='TokenLabelDataset'):
        TRANSFORMS.build(dict(type='PackTokenLabelInputs'))(dict(img=np.zeros((4, 4))))


def test_two_images_of_one_name(folder):
    cv2.imwrite(str(folder / 'images/a/a_0.JPEG.jpg'), np.zeros((4, 4), np.uint8))
    with pytest.raises(LabelMapError, match='would share the label map'):
        build(folder)

from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
from mmpretrain.registry import HOOKS
from mmpretrain.structures import DataSample
from mmpretrain.visualization import UniversalVisualizer


@pytest.fixture
def draw(tmp_path, mmpretrain_scope):
    """Draw images of a data set in batches of 3; the names of the pictures."""
    UniversalVisualizer._instance_dict.clear()
    UniversalVisualizer.get_instance('test')
    model = nn.Module()
    model.data_preprocessor = SimpleNamespace(to_rgb=True)
    runner = SimpleNamespace(model=model)

    def draw(paths, color=(0, 0, 0), score=None, **kwargs):
        hook = HOOKS.build(
            dict(type='ClsVisualizationHook', enable=True, out_dir=str(tmp_path))
            | {'interval': 1, **kwargs}
        )
        for _ in range(2):  # a second pass over the data draws the same pictures
            hook.before_test_epoch(runner)
            for i in range(0, len(paths), 3):
                samples = [
                    DataSample(metainfo={} if path is None else dict(img_path=path))
                    for path in paths[i : i + 3]
                ]
                if score is not None:
                    scores = torch.tensor([0, score])
                    for sample in samples:
                        sample.set_gt_label(1).set_pred_label(1).set_pred_score(scores)
                images = torch.tensor(color).view(1, 3, 1, 1).expand(-1, -1, 32, 32)
                batch = dict(inputs=images.expand(len(samples), -1, -1, -1))
                hook.after_test_iter(runner, i // 3, batch, samples)
        return sorted(path.name for path in tmp_path.iterdir())

    return draw


def test_every_image_has_a_picture(draw):
    paths = ['x/cat/0.jpg', 'x/dog/0.jpg', 'y/cat/0.jpg', 'x/cat/0.png', '0.png']
    assert draw(paths) == [
        '0_0.png',
        'cat_0_0.png',
        'cat_0_2_0.png',
        'cat_0_3_0.png',
        'dog_0_0.png',
    ]


def test_images_without_a_path(draw):
    assert draw([None] * 5) == [f'{i}_0.png' for i in range(5)]


def test_interval_counts_images_across_batches(draw):
    assert draw([None] * 8, interval=2) == [f'{i}_0.png' for i in (0, 2, 4, 6)]


def test_nothing_without_enable(draw):
    assert draw([None], enable=False) == []


def test_colors_are_those_of_the_image(draw, tmp_path):
    bgr = (250, 120, 10)
    (name,) = draw([None], color=bgr)
    picture = cv2.imread(str(tmp_path / name))
    # The text is at the top left.
    np.testing.assert_allclose(
        picture[-3:, -3:], np.broadcast_to(bgr, (3, 3, 3)), atol=3
    )


def test_small_images_are_larger_than_their_text(draw, tmp_path):
    (name,) = draw([None], color=(250, 250, 250), score=0.98)
    picture = cv2.imread(str(tmp_path / name))
    assert picture.shape == (224, 224, 3)
    assert (picture > 240).mean() > 0.7
    draw([None], resize=64)
    assert cv2.imread(str(tmp_path / name)).shape == (64, 64, 3)
    draw([None], rescale_factor=2.0)
    assert cv2.imread(str(tmp_path / name)).shape == (64, 64, 3)

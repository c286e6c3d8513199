import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmpretrain.registry import MODELS

import spvit_mm  # noqa: F401
from spvit_mm.datasets import teacher as teacher_module
from spvit_mm.datasets.teacher import DenseTeacher, generate_token_labels
from spvit_mm.datasets.token_labels import read_label_map

PREPROCESSOR = dict(mean=[128.0] * 3, std=[64.0] * 3, to_rgb=True)


def build(backbone, head, num_classes=3, **kwargs):
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            head=dict(num_classes=num_classes, **head),
            data_preprocessor=dict(PREPROCESSOR),
            **kwargs,
        )
    )
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return model.eval()


def cnn(num_classes=3):
    return build(
        dict(type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8),
        dict(type='LinearClsHead', in_channels=64),
        num_classes,
        neck=dict(type='GlobalAveragePooling'),
    )


def vit(out_type='cls_token'):
    return build(
        dict(
            type='VisionTransformer',
            arch=dict(
                embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64
            ),
            img_size=32,
            patch_size=8,
            out_type=out_type,
        ),
        dict(type='VisionTransformerClsHead', in_channels=32),
    )


def test_cnn_scores_each_place():
    model = cnn()
    images = torch.randn(2, 3, 48, 32)
    with torch.no_grad():
        feature = model.backbone(images)[-1]
        expected = torch.einsum('bchw,kc->bkhw', feature, model.head.fc.weight)
        expected = expected + model.head.fc.bias[:, None, None]
        # A linear head: the mean over places is the score of the image.
        whole = model(images)
    scores = DenseTeacher(model)(images)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores.mean((2, 3)), whole, rtol=1e-4, atol=1e-5)


def test_vit_scores_its_patch_tokens():
    images = torch.randn(2, 3, 32, 32)
    raw = vit('raw')
    with torch.no_grad():
        tokens = raw.backbone(images)[-1][:, 1:]
        expected = raw.head.layers.head(tokens).transpose(1, 2).reshape(2, 3, 4, 4)
    torch.testing.assert_close(DenseTeacher(vit())(images), expected)


def test_vit_that_averages_its_tokens():
    images = torch.randn(2, 3, 32, 32)
    model = vit('avg_featmap')
    with torch.no_grad():
        whole = model(images)
    assert DenseTeacher(model)(images).shape == (2, 3, 4, 4)
    assert whole.shape == (2, 3)


def test_a_token_labeling_student_teaches_with_its_auxiliary_head():
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='TokenLabelClassifier',
            backbone=dict(
                type='SPViT',
                arch=dict(
                    embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64
                ),
                img_size=(32, 48),
                patch_size=8,
                out_type='raw',
            ),
            head=dict(type='TokenLabelClsHead', num_classes=3, in_channels=32),
            data_preprocessor=dict(PREPROCESSOR),
        )
    )
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens = model.eval().backbone(images)[-1][:, 1:]
        expected = model.head.aux_head(tokens).transpose(1, 2).unflatten(2, (4, 6))
    torch.testing.assert_close(DenseTeacher(model)(images), expected)


def test_convnext_and_swin_keep_their_places():
    head = dict(type='LinearClsHead')
    convnext = build(
        dict(type='ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32])),
        dict(**head, in_channels=32),
    )
    assert DenseTeacher(convnext)(torch.randn(1, 3, 64, 96)).shape == (1, 3, 2, 3)
    swin = build(
        dict(
            type='SwinTransformer',
            arch=dict(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
            img_size=64,
            window_size=2,
        ),
        dict(**head, in_channels=64),
        neck=dict(type='GlobalAveragePooling'),
    )
    assert DenseTeacher(swin)(torch.randn(1, 3, 64, 64)).shape == (1, 3, 2, 2)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for c in 'abc':
        (tmp_path / 'images' / c).mkdir(parents=True)
        for i in range(3):
            image = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / 'images' / c / f'{i}.png'), image)
    return str(tmp_path / 'images')


def generate(model, images, out, **kwargs):
    settings = dict(size=32, batch_size=4, num_workers=0, progress=False, **kwargs)
    return generate_token_labels(model, images, str(out), **settings)


def test_maps_hold_the_highest_scores(images, tmp_path):
    model = cnn()
    counts = generate(model, images, tmp_path / 'maps', preview=2)
    assert counts == dict(written=9, kept=0)
    image = cv2.imread(f'{images}/b/1.png')
    from mmcv import imresize

    image = imresize(image, (32, 32), interpolation='bicubic', backend='pillow')
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    scores = DenseTeacher(model)(
        model.data_preprocessor(dict(inputs=tensor), False)['inputs']
    )
    values, ids = scores[0].sort(dim=0, descending=True)
    label_map = read_label_map(str(tmp_path / 'maps' / 'b' / '1.pt'), 3)
    assert label_map.dtype == torch.float16
    assert label_map.shape == (2, 3, 4, 4)
    assert torch.equal(label_map[1].long(), ids)
    torch.testing.assert_close(label_map[0].float(), values, rtol=1e-3, atol=1e-3)
    preview = cv2.imread(str(tmp_path / 'maps' / 'preview.png'))
    assert preview.std() > 10


def test_goes_on_where_it_stopped(images, tmp_path, monkeypatch):
    model, out = cnn(), tmp_path / 'maps'
    write, written = teacher_module.write_label_map, []

    def stops_after_five(path, *args):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *args)

    monkeypatch.setattr(teacher_module, 'write_label_map', stops_after_five)
    with pytest.raises(KeyboardInterrupt):
        generate(model, images, out)
    monkeypatch.undo()
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob('*.pt')}
    assert len(stamps) == 5
    cut = out / 'a' / '1.pt'
    cut.write_bytes(cut.read_bytes()[:100])
    assert generate(model, images, out) == dict(written=5, kept=4)
    assert all(p.stat().st_mtime_ns == t for p, t in stamps.items() if p != cut)
    assert read_label_map(str(cut), 3).shape == (2, 3, 4, 4)
    assert generate(model, images, out) == dict(written=0, kept=9)
    assert not list(out.rglob('*.tmp'))


def test_many_classes_are_stored_in_single_precision(images, tmp_path):
    # Without class folders the folder says nothing of the number of classes.
    generate(cnn(2500), f'{images}/a', tmp_path / 'maps')
    label_map = read_label_map(str(tmp_path / 'maps' / '0.pt'), 2500)
    assert label_map.dtype == torch.float32
    assert label_map.shape == (2, 5, 4, 4)


def test_maps_of_two_teachers_are_not_mixed(images, tmp_path):
    generate(cnn(), images, tmp_path / 'maps')
    before = {p: p.read_bytes() for p in (tmp_path / 'maps').rglob('*.pt')}
    with pytest.raises(ValueError, match='made otherwise .*weights'):
        generate(vit(), images, tmp_path / 'maps')
    with pytest.raises(ValueError, match='made otherwise .*top_k: 3 there, 2 now'):
        generate(cnn(), images, tmp_path / 'maps', top_k=2)
    # Mean and std are not among the weights.
    other = cnn()
    other.data_preprocessor.mean += 1
    with pytest.raises(ValueError, match='made otherwise .*preprocessing'):
        generate(other, images, tmp_path / 'maps')
    # A folder of before that was kept takes up the first one, and keeps to it.
    info = tmp_path / 'maps' / 'token_labels.json'
    kept = json.loads(info.read_text())
    info.write_text(json.dumps({k: v for k, v in kept.items() if k != 'preprocessing'}))
    assert generate(cnn(), images, tmp_path / 'maps') == dict(written=0, kept=9)
    assert json.loads(info.read_text()) == kept
    info.unlink()
    with pytest.raises(ValueError, match=r'holds \.pt files, but no'):
        generate(cnn(), images, tmp_path / 'maps')
    assert all(p.read_bytes() == data for p, data in before.items())


def test_bad_input(images, tmp_path):
    with pytest.raises(ValueError, match='knows 7 classes, but .* has 3'):
        generate(cnn(7), images, tmp_path / 'maps')
    with pytest.raises(ValueError, match='does not exist'):
        generate(cnn(), str(tmp_path / 'nowhere'), tmp_path / 'maps')
    (tmp_path / 'file').write_text('x')
    with pytest.raises(ValueError, match='is not a folder'):
        generate(cnn(), images, tmp_path / 'file')
    with pytest.raises(ValueError, match='`top_k` must be at least 1'):
        generate(cnn(), images, tmp_path / 'maps', top_k=0)
    headless = dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=18))
    with pytest.raises(ValueError, match='has no `head`'):
        generate(MODELS.build(headless), images, tmp_path / 'maps')
    other = cnn()
    del other.head.num_classes
    with pytest.raises(ValueError, match='LinearClsHead, has no `num_classes`'):
        generate(other, images, tmp_path / 'maps')
    assert not (tmp_path / 'maps').exists()


CONFIG = """
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet_CIFAR', depth=18, stem_channels=8, base_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=64),
    data_preprocessor=dict(mean=[128.0] * 3, std=[64.0] * 3),
)
"""


def test_command_line(images, tmp_path):
    (tmp_path / 'teacher.py').write_text(CONFIG)
    torch.save(dict(state_dict=cnn().state_dict()), tmp_path / 'teacher.pth')

    def run(checkpoint):
        command = [sys.executable, 'tools/dataset_converters/generate_token_labels.py']
        command += [str(tmp_path / 'teacher.py'), str(tmp_path / checkpoint), images]
        command += [str(tmp_path / 'maps'), '--size', '32', '--num-workers', '0']
        return subprocess.run(
            [*command, '--preview', '1'], capture_output=True, text=True, timeout=200
        )

    done = run('nowhere.pth')
    assert done.returncode == 2
    assert 'nowhere.pth' in done.stderr
    assert 'Traceback' not in done.stderr
    done = run('teacher.pth')
    assert done.returncode == 0, done.stderr
    assert '9 label maps written, 0 kept' in done.stdout
    assert (tmp_path / 'maps' / 'preview.png').stat().st_size > 1000
    info = json.loads((tmp_path / 'maps' / 'token_labels.json').read_text())
    assert info['num_classes'] == 3
    assert info['classes'] == ['a', 'b', 'c']

import os.path as osp
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample

import spvit_mm  # noqa: F401

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64)


def model_cfg(out_type='raw', mix=1.0, **head):
    return dict(
        type='TokenLabelClassifier',
        backbone=dict(
            type='SPViT',
            arch=ARCH,
            img_size=(32, 48),
            patch_size=8,
            stem=dict(type='ConvStem', stem_channels=8),
            with_peg=True,
            out_type=out_type,
        ),
        head=dict(type='TokenLabelClsHead', num_classes=5, in_channels=32, **head),
        mix_token_alpha=mix,
    )


def build(*args, **kwargs):
    torch.manual_seed(0)
    model = MODELS.build(model_cfg(*args, **kwargs))
    # Not all-zero scores.
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.2)
    return model


def make_batch(batch=4, label_maps=True):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 32, 48, generator=generator)
    samples = []
    for i in range(batch):
        sample = DataSample().set_gt_label(i % 5)
        if label_maps:
            scores = torch.randn(5, 3, 3, generator=generator).topk(5, dim=0)
            sample.token_label = torch.stack((scores[0] * 3, scores[1].float())).half()
            sample.token_label_view = torch.tensor([0.1, 0.0, 0.8, 0.9])
        samples.append(sample)
    return images, samples


def test_trains_on_a_grid_that_is_not_square():
    model = build()
    losses = model(*make_batch(), mode='loss')
    assert set(losses) == {'loss_cls', 'loss_dense'}
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_mixed_tokens_and_targets():
    model = build()
    images, samples = make_batch()
    seen = {}

    def keep(x, hw):
        seen.update(x=x, hw=hw)
        return forward_layers(x, hw)

    forward_layers = model.backbone.forward_layers
    model.backbone.forward_layers = keep
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1:3, 2:6] = True
    model._mix_mask = lambda hw, device: mask.flatten()
    losses = model.loss(images, samples)
    model._mix_mask = lambda hw, device: None

    tokens, hw = model.backbone.forward_stem(images)
    assert seen['hw'] == hw == (4, 6)
    expected = tokens.clone()
    for i in range(4):
        for row in range(1, 3):
            for column in range(2, 6):
                n = row * 6 + column
                expected[i, n] = tokens[3 - i, n]
    assert torch.equal(seen['x'], expected)
    assert losses['loss_cls'] != model.loss(images, samples)['loss_cls']


def test_boxes_have_the_area_that_was_drawn():
    model = build()
    np.random.seed(0)
    areas = torch.stack([model._mix_mask((14, 14), 'cpu') for _ in range(4000)])
    # The box is cut at the border of the grid: by CutMix's rule 1 - lam is on
    # average a little below 1/2; the mean of the rule, from its definition.
    expected = []
    for _ in range(4000):
        side = int(14 * np.sqrt(1 - np.random.beta(1, 1)))
        y, x = np.random.randint(0, 14, 2)
        height = min(y + side // 2, 14) - max(y - side // 2, 0)
        width = min(x + side // 2, 14) - max(x - side // 2, 0)
        expected.append(height * width / 196)
    assert abs(areas.float().mean() - np.mean(expected)) < 0.02


def test_no_mixing_in_evaluation_or_when_off():
    model = build()
    assert model.eval()._mix_mask((4, 6), 'cpu') is None
    assert build(mix=0.0)._mix_mask((4, 6), 'cpu') is None
    images, samples = make_batch()
    first = model.loss(images, samples)
    assert all(torch.equal(first[k], v) for k, v in model.loss(images, samples).items())


def test_predictions():
    model = build().eval()
    images, samples = make_batch()
    with torch.no_grad():
        raw = model.backbone(images)[-1]
        aux = model.head.aux_head(raw[:, 1:])
        scores = model.head.layers.head(raw[:, 0]) + 0.5 * aux.max(dim=1)[0]
        predicted = model.predict(images, samples)
        assert torch.equal(model(images), scores)
    for sample, row in zip(predicted, scores, strict=True):
        torch.testing.assert_close(sample.pred_score, row.softmax(0))
    # A backbone at another size than in training.
    assert model(torch.randn(2, 3, 40, 24)).shape == (2, 5)


@pytest.mark.parametrize('out_type', ['raw', 'cls_token', 'avg_featmap'])
@pytest.mark.parametrize('mix', [0.0, 1.0])
def test_ordinary_data_without_label_maps(out_type, mix):
    model = build(out_type, mix=mix, dense_weight=0)
    losses = model.loss(*make_batch(label_maps=False))
    losses['loss_cls'].backward()
    idle = [
        name
        for name, param in model.named_parameters()
        if param.requires_grad and param.grad is None
    ]
    assert idle == [] or out_type == 'avg_featmap'


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(out_type='cls_token'), "out_type='raw'"),
        (dict(out_type='featmap', dense_weight=0), "'featmap'"),
    ],
)
def test_out_types_that_do_not_fit(changes, match):
    with pytest.raises(ValueError, match=match):
        MODELS.build(model_cfg(**changes))


def test_bad_arguments():
    cfg = model_cfg()
    with pytest.raises(ValueError, match='forward_stem'):
        MODELS.build({**cfg, 'backbone': dict(type='VisionTransformer', arch='deit-t')})
    with pytest.raises(ValueError, match='TokenLabelClsHead'):
        MODELS.build(
            {**cfg, 'head': dict(type='LinearClsHead', num_classes=5, in_channels=32)}
        )
    with pytest.raises(ValueError, match='mix_token_alpha'):
        MODELS.build({**cfg, 'mix_token_alpha': -1})
    with pytest.raises(ValueError, match='mix_token_prob'):
        MODELS.build({**cfg, 'mix_token_prob': 1.5})


def test_mixed_precision():
    model = build()
    images, samples = make_batch()
    with torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(images, samples)
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    sum(losses.values()).backward()


def test_test_time_augmentation():
    model = build().eval()
    images, samples = make_batch(2)
    tta = MODELS.build(dict(type='AverageClsScoreTTA', module=model))
    data = dict(
        inputs=[images, images.flip(3)],
        data_samples=[samples, [s.clone() for s in samples]],
    )
    with torch.no_grad():
        merged = tta.test_step(data)
        plain = [model(x).softmax(1) for x in (images, images.flip(3))]
    for i, sample in enumerate(merged):
        torch.testing.assert_close(sample.pred_score, (plain[0][i] + plain[1][i]) / 2)


class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        self.images, self.samples = make_batch(8)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=self.images[index], data_samples=self.samples[index])


def test_moving_average(tmp_path):
    runner = Runner(
        model=model_cfg(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            batch_size=4,
            num_workers=0,
            dataset=Pairs(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2)),
        custom_hooks=[dict(type='EMAHook', momentum=0.5)],
        default_hooks=dict(logger=None, checkpoint=None),
        default_scope='mmpretrain',
        experiment_name=f'ema_{tmp_path.name}',
        randomness=dict(seed=0),
    )
    model = runner.train()
    hook = next(h for h in runner.hooks if isinstance(h, EMAHook))
    average = hook.ema_model.module
    assert not torch.equal(average.head.aux_head.weight, model.head.aux_head.weight)
    average.eval()
    assert average(make_batch()[0]).isfinite().all()


def test_two_processes(tmp_path):
    script = osp.join(osp.dirname(__file__), 'two_processes.py')
    done = subprocess.run(
        [
            sys.executable,
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node=2',
            script,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'same loss and gradients' in done.stdout
    assert 'equal weights' in done.stdout

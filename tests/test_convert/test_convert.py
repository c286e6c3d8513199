import argparse
import functools
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.registry import MODELS

from spvit_mm.apis import load_config, load_trained_model, run_cli
from spvit_mm.convert import (
    Options,
    convert_file,
    convert_to_mm,
    convert_to_released,
    convert_to_timm,
)
from spvit_mm.convert.config import config_text
from spvit_mm.utils import CheckpointError, UserError, read_checkpoint, write_checkpoint
from spvit_mm.utils.checkpoint import CAN_ALLOW

from .source_models import (
    RELEASED,
    Spec,
    as_saved,
    classify,
    forward,
    lvvit,
    make_state,
    spvit,
)

TOLERANCE = 1e-5
TINY = dict(grid=(4, 4), classes=7)
SMALL = {
    'spvit': spvit(24, 4, 3, 2, stem=8, **TINY),
    'spvit of hidden width 5': spvit(24, 3, 2, 1, stem=8, hidden=5, **TINY),
    'spvit, class token first': spvit(24, 3, 3, 2, stem=8, cls_layer=0, **TINY),
    'spvit without SP-SA': spvit(24, 4, 3, 0, stem=8, cls_layer=2, **TINY),
    'spvit without aux_head': spvit(24, 3, 3, 2, stem=8, aux=False, **TINY),
    'spvit, grid 3 x 5': spvit(24, 3, 3, 2, stem=8, grid=(3, 5), classes=7),
    'spvit, patch 8': spvit(24, 3, 3, 2, stem=8, patch=8, **TINY),
    'spvit, skip 3': spvit(24, 3, 3, 2, stem=8, skip=3.0, **TINY),
    'lvvit': lvvit(24, 3, 3, stem=8, **TINY),
    'deit': Spec(24, 3, 3, **TINY),
    'timm': Spec(24, 3, 3, layer_scale=('ls1.gamma', 'ls2.gamma'), **TINY),
    'deit III': Spec(24, 3, 3, layer_scale=('gamma_1', 'gamma_2'), **TINY),
}


def options_of(spec, **kwargs):
    """What a shape that is no released one must be told."""
    common = dict(skip_scale=spec.skip, img_size=spec.img_size)
    if not spec.num_spsa:
        common['num_heads'] = spec.heads
    return Options(**{**common, **kwargs})


def count_parameters(state):
    statistics = ('running_mean', 'running_var', 'num_batches_tracked', 'train_grid')
    return sum(v.numel() for k, v in state.items() if not k.endswith(statistics))


def build_backbone(result):
    cfg = dict(result.model['backbone'], out_type='raw', _scope_='mmpretrain')
    backbone = MODELS.build(cfg).eval()
    state = {
        k[len('backbone.') :]: v
        for k, v in result.state_dict.items()
        if k.startswith('backbone.')
    }
    backbone.load_state_dict(state, strict=True)
    return backbone


@torch.no_grad()
def difference(spec, state, result, batch=2):
    """Largest difference of tokens and of logits, relative to the largest value."""
    images = torch.randn(
        batch, 3, *spec.img_size, generator=torch.Generator().manual_seed(1)
    )
    want = forward(spec, state, images.double())
    got = build_backbone(result)(images)[0]
    scores = got[:, 0] @ result.state_dict['head.layers.head.weight'].T
    scores = scores + result.state_dict['head.layers.head.bias']
    if spec.aux:
        dense = got[:, 1:] @ result.state_dict['head.aux_head.weight'].T
        scores = scores + 0.5 * (dense + result.state_dict['head.aux_head.bias']).amax(
            1
        )
    want_scores = classify(spec, state, images.double())
    tokens = (got - want).abs().max() / want.abs().max()
    logits = (scores - want_scores).abs().max() / want_scores.abs().max()
    return tokens.item(), logits.item()


@pytest.mark.parametrize('name', SMALL)
def test_outputs_equal_the_source(name):
    spec = SMALL[name]
    state = make_state(spec)
    result = convert_to_mm({'state_dict': as_saved(state)}, options=options_of(spec))
    assert max(difference(spec, state, result)) < TOLERANCE
    cls_layer = result.model['backbone']['cls_token_layer']
    assert cls_layer == spec.cls_layer


def test_the_comparison_notices_each_weight():
    """A converter that lost any weight would be found out."""
    spec = SMALL['spvit']
    state = make_state(spec)
    result = convert_to_mm({'state_dict': as_saved(state)}, options=options_of(spec))
    for key in state:
        if key.endswith('num_batches_tracked'):
            continue
        changed = {**state, key: state[key] * 1.5 + 0.1}
        if key in ('blocks.0.attn.qk.weight', 'blocks.0.attn.v.weight'):
            changed[key] = state[key].flip(0)
        assert max(difference(spec, changed, result)) > TOLERANCE, key


@pytest.mark.slow
@pytest.mark.parametrize('name', RELEASED)
def test_released_sizes(name, capsys):
    """Every published model; `-s` prints the table of differences."""
    spec = RELEASED[name]
    state = make_state(spec)
    saved = as_saved(state)
    result = convert_to_mm({'state_dict': saved})
    tokens, logits = difference(spec, state, result, batch=1)
    with capsys.disabled():
        number = count_parameters(saved)
        print(f'\n| {name} | {number:,} | {tokens:.1e} | {logits:.1e} |', end='')
    assert max(tokens, logits) < TOLERANCE
    if result.source in ('spvit', 'lvvit'):
        back = convert_to_released({'state_dict': result.state_dict}).state_dict
        assert_same(back, saved)


@pytest.mark.parametrize(
    ('name', 'number'),
    [
        ('SP-ViT-S', 26_234_468),
        ('SP-ViT-M', 55_969_440),
        ('SP-ViT-L (22 SP-SA)', 150_273_368),
        ('SP-ViT-L (as released)', 150_205_520),
        ('LV-ViT-S', 26_151_824),
        ('LV-ViT-M', 55_830_544),
        ('LV-ViT-L', 150_021_968),
    ],
)
def test_parameter_counts_and_config_of_released_sizes(name, number):
    spec = RELEASED[name]
    state = make_state_shapes(spec)
    assert count_parameters(state) == number
    result = convert_to_mm({'state_dict': state})
    assert count_parameters(result.state_dict) == number
    backbone = result.model['backbone']
    assert backbone['arch'] in ('spvit-small', 'spvit-medium', 'spvit-large')
    assert backbone['num_spsa_layers'] == spec.num_spsa
    assert backbone['cls_token_layer'] == spec.cls_layer
    assert result.model['type'] == 'TokenLabelClassifier'
    assert backbone['out_type'] == 'raw'
    crop = 0.9 if spec.width == 384 else 1.0
    assert result.test_crop == crop
    notes = ' '.join(result.notes)
    assert f'{number:,} parameters' in notes
    assert ('No layer is SP-SA' in notes) == ('as released' in name)


def make_state_shapes(spec):
    """A state of released size, all zeros: quicker than random numbers."""
    small = make_state(
        Spec(
            **{
                **vars(spec),
                'width': spec.heads * 4,
                'classes': 3,
                'hidden': 4,
                'stem': 2,
            }
        )
    )
    sizes = {spec.heads * 4 * n: spec.width * n for n in (1, 2, 3)}
    sizes.update({3: spec.classes, 2: spec.stem})
    state = {}
    for key, value in small.items():
        shape = list(value.shape)
        if key.startswith(('head', 'aux_head')):
            shape = [spec.classes, spec.width][: len(shape)]
        elif '.pos_block.' in key:
            shape[0] = spec.width
        elif key.startswith('patch_embed.proj'):
            shape[0] = spec.width
            shape[1:2] = [spec.stem] if len(shape) > 1 else []
        elif key.startswith('patch_embed.conv'):
            shape[0] = spec.stem
            shape[1] = 3 if key.startswith('patch_embed.conv1') else spec.stem
        elif key.startswith('patch_embed.bn'):
            shape = [spec.stem for _ in shape]
        elif key in ('cls_token', 'pos_embed'):
            shape[2] = spec.width
        elif not key.endswith('attn.b2'):
            shape = [n if n in (1, 2) else sizes[n] for n in shape]
        state[key] = torch.zeros(shape, dtype=value.float().dtype)
    return state


# --------------------------------------------------------------- round trips


def assert_same(got, want):
    assert sorted(got) == sorted(want)
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key


# The released code has square grids only, and priors as wide as a head.
HAS_WAY_BACK = [
    name
    for name, spec in SMALL.items()
    if spec.stem and spec.grid == (4, 4) and spec.hidden != 5
]


@pytest.mark.parametrize('name', HAS_WAY_BACK)
def test_back_to_the_released_names(name):
    spec = SMALL[name]
    saved = as_saved(make_state(spec))
    ours = convert_to_mm({'state_dict': saved}, options=options_of(spec)).state_dict
    back = convert_to_released({'state_dict': ours})
    assert_same(back.state_dict, saved)
    warned = any('class token comes first' in note for note in back.notes)
    assert warned == (spec.num_spsa > 0 and spec.cls_layer == 0)


def test_back_widens_the_priors_and_keeps_the_function():
    spec = SMALL['spvit of hidden width 5']
    state = make_state(spec)
    ours = convert_to_mm({'state_dict': as_saved(state)}, options=options_of(spec))
    back = convert_to_released({'state_dict': ours.state_dict})
    assert any('widened from 5 to 12' in note for note in back.notes)
    wide = Spec(**{**vars(spec), 'hidden': 12})
    assert back.state_dict['blocks.0.attn.w1.weight'].shape == (24, 2)
    images = torch.randn(1, 3, *spec.img_size).double()
    double = {k: v.double() for k, v in back.state_dict.items()}
    torch.testing.assert_close(
        forward(wide, double, images), forward(spec, state, images), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (dict(prior=dict(type='MLPSpatialPrior', hidden_dims=(8, 8))), 'prior.w3'),
        (dict(prior=dict(type='MLPSpatialPrior', hidden_dims=16)), 'cannot hold 16'),
        (dict(share_prior='network'), 'backbone.prior.w1'),
        (dict(share_prior='heads'), 'a prior for each head'),
        (dict(qkv_bias=True), 'attn.qkv.bias'),
        (dict(stem='patch'), 'convolution stem alone'),
        (dict(with_peg=False), 'a PEG in all'),
        (dict(img_size=(64, 96)), '4 x 6 patches'),
    ],
)
def test_back_lists_what_has_no_place(change, words):
    spec = SMALL['spvit']
    state = as_saved(make_state(spec))
    cfg = convert_to_mm({'state_dict': state}, options=options_of(spec)).model
    backbone = dict(cfg['backbone'], _scope_='mmpretrain', **change)
    head = MODELS.build(
        dict(type='mmpretrain.VisionTransformerClsHead', num_classes=7, in_channels=24)
    )
    model = torch.nn.ModuleDict(dict(backbone=MODELS.build(backbone), head=head))
    with pytest.raises(CheckpointError, match=words):
        convert_to_released({'state_dict': model.state_dict()})


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({}, None),
        (dict(attn_cfg=dict(combine='add')), "layer 0: .*combine='add'"),
        (dict(attn_cfg=dict(qk_scale=1.0)), 'scales its scores by 1 '),
        (dict(prior=dict(coords='log')), "coords='log', not raw"),
        (dict(prior=dict(act_cfg=dict(type='GELU'))), 'its prior has GELU'),
        (dict(layer_cfgs=dict(act_cfg=dict(type='ReLU'))), 'its FFN has ReLU'),
        (dict(norm_cfg=dict(eps=1e-6)), 'eps of its norms is 1e-06'),
        (dict(cls_token_layer=3), 'joins before layer 3'),
        (dict(out_indices=-2), 'its head reads layer [0-9] .out_indices'),
        (
            dict(prior=dict(hidden_dims=7)),
            'not that of the checkpoint: .*attn.prior.b1',
        ),
    ],
)
def test_back_asks_the_model_for_what_no_weight_shows(change, words):
    spec = SMALL['spvit']
    state = as_saved(make_state(spec))
    cfg = convert_to_mm({'state_dict': state}, options=options_of(spec)).model
    state = convert_to_mm({'state_dict': state}, options=options_of(spec)).state_dict
    change = {
        k: {**(cfg['backbone'].get(k) or {}), **v} if isinstance(v, dict) else v
        for k, v in change.items()
    }
    backbone = MODELS.build(dict(cfg['backbone'], _scope_='mmpretrain', **change))
    model = torch.nn.ModuleDict(dict(backbone=backbone, head=torch.nn.Identity()))
    ours = {k: v for k, v in state.items() if k.startswith('backbone.')}
    # The weights are all there, so without the model nothing but a warning is left.
    notes = convert_to_released({'state_dict': dict(ours)}).notes
    assert any('WARNING: no weight shows how a prior is used' in x for x in notes)
    if words is None:
        notes = convert_to_released({'state_dict': ours}, model=model).notes
        assert not any('WARNING: no weight' in note for note in notes)
    else:
        with pytest.raises(CheckpointError, match=words):
            convert_to_released({'state_dict': ours}, model=model)


def test_a_grey_model_reads_grey_pictures():
    spec = SMALL['timm']
    state = as_saved(make_state(spec))
    weight = state['patch_embed.proj.weight']
    state['patch_embed.proj.weight'] = weight.sum(1, keepdim=True)
    result = convert_to_mm({'state_dict': state}, 'timm', options_of(spec))
    text = config_text('a.pth', 'b.pth', result)
    assert "dict(color_type='grayscale', type='LoadImageFromFile')" in text


def test_back_takes_ema_and_plain_of_mmengine():
    """EMAHook saves the average as state_dict, the plain as ema_state_dict."""
    spec = SMALL['spvit']
    average, plain = (as_saved(make_state(spec, seed)) for seed in (0, 1))
    ours = [
        convert_to_mm({'state_dict': s}, options=options_of(spec)).state_dict
        for s in (average, plain)
    ]
    content = dict(
        state_dict=ours[0],
        ema_state_dict={
            'steps': torch.tensor(9),
            **{f'module.{k}': v for k, v in ours[1].items()},
        },
    )
    assert_same(convert_to_released(content).state_dict, average)
    for weights, want in (('ema', average), ('plain', plain)):
        got = convert_to_released(content, Options(weights=weights))
        assert_same(got.state_dict, want)


# ---------------------------------------------------- which weights, which model


def test_picks_ema_or_plain_and_strips_module():
    spec = SMALL['spvit']
    plain, ema = (as_saved(make_state(spec, seed)) for seed in (0, 1))
    content = dict(
        epoch=1,
        args=argparse.Namespace(lr=1),
        state_dict={f'module.{k}': v for k, v in plain.items()},
        state_dict_ema=ema,
    )
    for weights, want in (('auto', ema), ('ema', ema), ('plain', plain)):
        result = convert_to_mm(content, options=options_of(spec, weights=weights))
        assert torch.equal(result.state_dict['backbone.cls_token'], want['cls_token'])
    del content['state_dict_ema']
    assert convert_to_mm(content, options=options_of(spec))
    with pytest.raises(CheckpointError, match='no ema weights.*state_dict'):
        convert_to_mm(content, options=options_of(spec, weights='ema'))


def test_bare_state_dict_and_deit_model_entry():
    spec = SMALL['deit']
    state = as_saved(make_state(spec))
    assert convert_to_mm(state, options=options_of(spec)).source == 'timm'
    result = convert_to_mm({'model': state}, options=options_of(spec))
    assert result.source == 'deit'
    assert (result.normalization, result.test_crop) == ('imagenet', 0.875)
    assert convert_to_mm(state, 'timm', options_of(spec)).normalization == 'half'
    options = options_of(spec, normalization='imagenet', test_crop=0.5)
    result = convert_to_mm(state, options=options)
    assert (result.normalization, result.test_crop) == ('imagenet', 0.5)


@pytest.mark.parametrize(
    'content',
    [{}, [1], dict(epoch=3), dict(state_dict=[1]), dict(state_dict={'a': 1}), 5],
)
def test_content_without_weights(content):
    with pytest.raises(CheckpointError):
        convert_to_mm(content)


def test_half_precision_is_stored_as_float32():
    spec = SMALL['deit']
    state = {k: v.half() for k, v in make_state(spec).items()}
    result = convert_to_mm(state, options=options_of(spec))
    assert all(
        v.dtype in (torch.float32, torch.int64) for v in result.state_dict.values()
    )
    assert any('in float32' in note for note in result.notes)


def test_where_the_class_token_joins_can_be_said():
    spec = SMALL['spvit without SP-SA']
    content = dict(state_dict=as_saved(make_state(spec)))
    result = convert(content, spec)
    assert result.model['backbone']['cls_token_layer'] == 2
    assert any("the paper's rule" in note for note in result.notes)
    result = convert(content, spec, cls_token_layer=1)
    assert result.model['backbone']['cls_token_layer'] == 1


def convert(content, spec, **kwargs):
    return convert_to_mm(content, options=options_of(spec, **kwargs))


@pytest.mark.skipif(not CAN_ALLOW, reason='PyTorch before 2.4 refuses such a file')
def test_args_of_the_file_say_where_the_class_token_joins(tmp_path):
    spec = SMALL['spvit without SP-SA']
    args = argparse.Namespace(local_up_to_layer=3)
    torch.save(
        dict(state_dict=as_saved(make_state(spec)), args=args), tmp_path / 'a.tar'
    )
    result = convert_file(
        tmp_path / 'a.tar', tmp_path / 'b.pth', options=options_of(spec)
    )
    assert result.model['backbone']['cls_token_layer'] == 3
    assert any('args.local_up_to_layer' in note for note in result.notes)


# ------------------------------------------------------------------ DeiT, timm


def test_deit_with_a_late_class_token_folds_its_position():
    spec = SMALL['deit']
    state = make_state(spec)
    result = convert_to_mm(
        as_saved(state), options=options_of(spec, cls_token_layer=2, num_spsa_layers=2)
    )
    assert any('was added to cls_token' in note for note in result.notes)
    late = Spec(**{**vars(spec), 'cls_layer': 2})
    folded = dict(state)
    folded['cls_token'] = state['cls_token'] + state['pos_embed'][:, :1]
    folded['pos_embed'] = state['pos_embed'][:, 1:]
    assert max(difference(late, folded, result)) < TOLERANCE


def test_deit_priors_are_neutral_and_can_be_chosen():
    spec = SMALL['deit']
    state = as_saved(make_state(spec))
    result = convert(state, spec, num_spsa_layers=3, hidden_dims=8)
    assert result.model['backbone']['num_spsa_layers'] == 3
    for i in range(3):
        prior = f'backbone.layers.{i}.attn.prior.'
        assert result.state_dict[prior + 'w2'].shape == (24, 1)
        assert not result.state_dict[prior + 'w2'].any()
        assert (result.state_dict[prior + 'b2'] == 1).all()
        assert result.state_dict[prior + 'w1'].std() > 0
    again = convert(state, spec, num_spsa_layers=3, hidden_dims=8)
    assert_same(again.state_dict, result.state_dict)
    assert (
        convert(state, spec, num_spsa_layers=0).model['backbone']['num_spsa_layers']
        == 0
    )


def test_position_without_class_entry_gets_zero():
    """timm's no_embed_class and DeiT III: the token is first, without position."""
    spec = SMALL['deit III']
    state = make_state(spec)
    saved = as_saved(state)
    saved['pos_embed'] = saved['pos_embed'][:, 1:]
    state['pos_embed'][:, 0] = 0
    result = convert(saved, spec)
    assert max(difference(spec, state, result)) < TOLERANCE


def test_distilled_deit():
    spec = Spec(24, 3, 3, distilled=True, **TINY)
    content = {'model': as_saved(make_state(spec))}
    with pytest.raises(CheckpointError, match='distillation token.*--distilled drop'):
        convert(content, spec)
    result = convert(content, spec, distilled='drop')
    note = next(note for note in result.notes if 'Left out' in note)
    for key in ('dist_token', 'head_dist.weight', 'head_dist.bias', 'pos_embed[:, 1]'):
        assert key in note
    state = content['model']
    kept = torch.cat((state['pos_embed'][:, :1], state['pos_embed'][:, 2:]), 1)
    assert torch.equal(result.state_dict['backbone.pos_embed'], kept)


def test_pre_logits_of_older_timm():
    spec = SMALL['deit']
    state = as_saved(make_state(spec))
    state['pre_logits.fc.weight'] = torch.randn(10, 24)
    state['pre_logits.fc.bias'] = torch.randn(10)
    state['head.weight'] = torch.randn(7, 10)
    result = convert(state, spec)
    assert result.model['head']['hidden_dim'] == 10
    head = MODELS.build(dict(result.model['head'], _scope_='mmpretrain')).eval()
    head.load_state_dict(
        {k[5:]: v for k, v in result.state_dict.items() if k.startswith('head.')}
    )
    x = torch.randn(2, 24)
    want = torch.tanh(x @ state['pre_logits.fc.weight'].T + state['pre_logits.fc.bias'])
    want = want @ state['head.weight'].T + state['head.bias']
    torch.testing.assert_close(head((x,)), want)


# ------------------------------------------------------------- without a head

SCALED = ('ls1.gamma', 'ls2.gamma')
CLIP = dict(pre_norm=True, eps=1e-5, **TINY)
HEADLESS = {
    'timm': Spec(24, 3, 3, head=False, **TINY),
    'MAE': Spec(24, 3, 3, head=False, **TINY),
    'DINOv2': Spec(24, 3, 3, head=False, patch=14, layer_scale=SCALED, **TINY),
    'CLIP': Spec(24, 3, 3, head=False, **CLIP),
    "OpenAI's CLIP": Spec(24, 3, 3, head=False, patch=14, quick_gelu=True, **CLIP),
}


def headless_content(name):
    """A file as its codebase writes it."""
    state = as_saved(make_state(HEADLESS[name]))
    if name in ('MAE', 'DINOv2'):
        state['mask_token'] = torch.ones(1, 24)
    if name == 'MAE':
        state['decoder_pos_embed'] = torch.ones(1, 17, 8)
        state['decoder_blocks.0.norm1.weight'] = torch.ones(8)
        return {'model': state}
    return state


def headless_result(name):
    act = 'quick_gelu' if HEADLESS[name].quick_gelu else 'gelu'
    return convert(headless_content(name), HEADLESS[name], act=act)


@pytest.mark.parametrize('name', HEADLESS)
def test_a_model_without_a_head_becomes_a_backbone(name):
    spec = HEADLESS[name]
    state, result = make_state(spec), headless_result(name)
    assert all(key.startswith('backbone.') for key in result.state_dict)
    head = dict(type='VisionTransformerClsHead', num_classes=1000, in_channels=24)
    assert head.items() <= result.model['head'].items()
    assert result.normalization == ('clip' if spec.pre_norm else 'imagenet')
    notes = ' '.join(result.notes)
    assert 'It has no head' in notes
    assert ('mask_token' in notes) == (name in ('MAE', 'DINOv2'))
    assert ('decoder_pos_embed' in notes) == (name == 'MAE')
    images = torch.randn(2, 3, *spec.img_size)
    with torch.no_grad():
        got = build_backbone(result)(images)[0]
    want = forward(spec, state, images.double())
    assert (got - want).abs().max() < TOLERANCE * want.abs().max()
    if spec.quick_gelu:
        plain = build_backbone(convert(headless_content(name), spec))(images)[0]
        assert (plain - want).abs().max() > 100 * TOLERANCE * want.abs().max()


def test_a_backbone_starts_a_model_of_another_size(tmp_path):
    """DINOv2 at 518 pixels, say, for a segmentor of 224: the file as init_cfg."""
    torch.save(headless_content('DINOv2'), tmp_path / 'dino.pth')
    convert_file(
        tmp_path / 'dino.pth',
        tmp_path / 'start.pth',
        options=options_of(HEADLESS['DINOv2']),
    )
    cfg = Config.fromfile(tmp_path / 'start.py')
    assert cfg.model.backbone.img_size == (56, 56)
    start = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'start.pth'), prefix='backbone'
    )
    cfg.model.backbone.update(img_size=70, out_type='featmap', init_cfg=start)
    model = MODELS.build(dict(cfg.model.backbone, _scope_='mmpretrain')).eval()
    model.init_weights()
    assert model(torch.zeros(1, 3, 70, 70))[0].shape == (1, 24, 5, 5)
    state = make_state(HEADLESS['DINOv2'])
    torch.testing.assert_close(
        model.layers[2].ffn.gamma2.weight, state['blocks.2.ls2.gamma'].float()
    )


def test_the_heads_can_be_left_out():
    for name in ('deit', 'spvit'):
        state = as_saved(make_state(SMALL[name]))
        result = convert(state, SMALL[name], classifier='none')
        assert all(key.startswith('backbone.') for key in result.state_dict)
        assert any('head.weight' in note for note in result.notes)


@pytest.mark.parametrize('key', ['reg_token', 'register_tokens'])
def test_register_tokens_are_refused(key):
    content = {**headless_content('DINOv2'), key: torch.ones(1, 4, 24)}
    with pytest.raises(CheckpointError, match=f'register tokens .`{key}`.*without reg'):
        convert(content, HEADLESS['DINOv2'])


@pytest.mark.parametrize('kind', ['DINOv2', 'MAE', 'CLIP'])
def test_mmpretrain_checkpoints_without_a_head_load_as_they_are(tmp_path, kind):
    kwargs = dict(
        DINOv2=dict(patch_size=14, layer_scale_init_value=1e-5),
        MAE=dict(),
        CLIP=dict(
            pre_norm=True,
            norm_cfg=dict(type='LN', eps=1e-5),
            layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU')),
        ),
    )[kind]
    arch = dict(embed_dims=24, num_layers=3, num_heads=3, feedforward_channels=48)
    kwargs.update(arch=arch, img_size=56, out_type='raw')
    vit = VisionTransformer(**kwargs)
    vit.eval()
    for param in vit.parameters():
        torch.nn.init.normal_(param, std=0.2)
    state = {f'backbone.{k}': v for k, v in vit.state_dict().items()}
    state['neck.mask_token'] = torch.ones(1, 1, 8)
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    start = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'))
    start['prefix'] = 'backbone'
    cfg = dict(type='SPViT', **kwargs, cls_token_layer=0, init_cfg=start)
    model = MODELS.build(cfg).eval()
    model.init_weights()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images)[0], vit(images)[0], rtol=1e-5, atol=1e-5
        )


# ------------------------------------------------------------------ back to timm


def ours(classes=7, **kwargs):
    """A classifier with an SPViT, its weights random, its priors as they start."""
    arch = dict(embed_dims=24, num_layers=3, num_heads=3, feedforward_channels=48)
    backbone = dict(type='SPViT', arch=arch, img_size=64, cls_token_layer=0)
    backbone.update(kwargs)
    head = dict(type='VisionTransformerClsHead', num_classes=classes, in_channels=24)
    model = MODELS.build(
        dict(type='ImageClassifier', backbone=backbone, head=head if classes else None)
    ).eval()
    for name, param in model.named_parameters():
        if 'prior.' not in name:
            torch.nn.init.normal_(param, std=0.2)
    return model


def timm_of(result):
    timm = pytest.importorskip('timm')
    call = result.notes[1].split('by ', 1)[1].rstrip('.')
    return eval(call, dict(timm=timm, functools=functools, torch=torch))


ADD = dict(type='SpatialPriorAttention', combine='add', strength=3.0)
BOTH = dict(type='SpatialPriorAttention', combine='both', init_score=0.5)
NEUTRAL = {
    'multiply': dict(),
    'none': dict(num_spsa_layers=0),
    'add': dict(attn_cfg=ADD),
    'both, with a score': dict(attn_cfg=BOTH, qkv_bias=False),
    'shared': dict(share_prior='network'),
    'masks that keep all': dict(
        attn_cfg=dict(type='SpatialPriorAttention', masked=True)
    ),
    'scaled coordinates': dict(prior=dict(type='MLPSpatialPrior', coords='scaled')),
    'table': dict(prior=dict(type='TableSpatialPrior')),
    'a window as large as the grid': dict(
        prior=dict(type='WindowSpatialPrior', window=15)
    ),
    'layer scale, oblong patches': dict(
        layer_scale_init_value=1e-5, patch_size=(16, 32), img_size=(64, 96)
    ),
    'CLIP': dict(
        pre_norm=True,
        norm_cfg=dict(type='LN', eps=1e-5),
        layer_cfgs=dict(act_cfg=dict(type='mmpretrain.QuickGELU')),
    ),
    'no head': dict(classes=0),
}


@pytest.mark.parametrize('deployed', [False, True])
@pytest.mark.parametrize('name', NEUTRAL)
def test_to_timm_equals_what_ours_computes(name, deployed, tmp_path):
    model = ours(**NEUTRAL[name])
    images = torch.randn(2, 3, *model.backbone.img_size)
    with torch.no_grad():
        want = model.backbone(images)[0]
        want = model.head.fc(want) if hasattr(model.head, 'fc') else want
        if model.with_head:
            want = model.head((want,))
    if deployed:
        model.backbone.switch_to_deploy()
    result = convert_to_timm(model)
    assert ('backbone alone' in result.notes[-1]) == (name == 'no head')
    made = timm_of(result).eval()
    made.load_state_dict(result.state_dict, strict=True)
    for suffix in ('.pth', '.safetensors'):
        path = tmp_path / f'a{suffix}'
        write_checkpoint(dict(state_dict=result.state_dict), path)
        load = importlib.import_module('timm.models').load_checkpoint
        load(made, str(path), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(made(images), want, rtol=1e-5, atol=1e-5)


def test_to_timm_by_the_naive_model():
    """Without timm too: there and back, bit for bit."""
    spec = SMALL['timm']
    state = as_saved(make_state(spec))
    there = convert(state, spec)
    model = MODELS.build(dict(there.model, _scope_='mmpretrain'))
    model.load_state_dict(there.state_dict)
    assert_same(convert_to_timm(model).state_dict, state)


def not_neutral(model):
    model.backbone.layers[0].attn.prior.b2.data[1] = 1.5
    return model


UNLIKE = {
    'a learned prior': (
        not_neutral,
        'layer 0: its prior multiplies its scores by 1 to',
    ),
    'added': (lambda m: not_neutral(ours(attn_cfg=ADD)), 'adds to its scores 0 to 1.5'),
    'late class token': (dict(cls_token_layer=1), 'it joins at layer 1'),
    'no class token': (
        dict(with_cls_token=False, cls_token_layer=None, out_type='featmap', classes=0),
        'it has no class token',
    ),
    'stem': (dict(stem='conv'), 'its stem is a ConvStem'),
    'PEG': (dict(with_peg=True), 'layer 2: a PEG follows'),
    'skip scale': (dict(skip_scale=2.0), 'layer 1: skip_scale is 2 and not 1'),
    'no position': (dict(pos_embed=None), 'no position embedding'),
    'no final norm': (dict(final_norm=False), 'no final norm'),
    'rotary': (
        dict(attn_cfg=dict(type='RotaryPositionAttention')),
        'layer 0: it attends with RotaryPositionAttention',
    ),
    'a mask': (
        dict(prior=dict(type='WindowSpatialPrior', window=3, masked=True)),
        'layer 0: its prior masks offsets',
    ),
    'ALiBi': (dict(prior=dict(type='ALiBiSpatialPrior'), attn_cfg=ADD), 'adds to its'),
    'scale': (dict(attn_cfg=dict(qk_scale=0.5)), 'scales its scores by 0.5'),
    'activation': (
        dict(layer_cfgs=dict(act_cfg=dict(type='ReLU'))),
        'its FFN has ReLU',
    ),
    'average': (dict(out_type='avg_featmap'), "its head reads out_type='avg_featmap'"),
    'another layer': (dict(out_indices=1, cls_token_layer=0), 'its head reads layer 1'),
    'a neck': (
        lambda m: setattr(m, 'neck', torch.nn.Identity()) or m,
        'reads a Identity .neck.',
    ),
    'patches': (dict(patch_cfg=dict(stride=8)), 'its patches overlap'),
    'folded elsewhere': (
        lambda m: m.backbone.switch_to_deploy((5, 5)) or m,
        r'folded for the grid \(5, 5\), not for \(4, 4\)',
    ),
}


@pytest.mark.parametrize('name', UNLIKE)
def test_to_timm_refuses_what_computes_something_else(name):
    change, words = UNLIKE[name]
    model = change(ours()) if callable(change) else ours(**change)
    with pytest.raises(CheckpointError, match=words):
        convert_to_timm(model)


def test_to_timm_lists_every_difference():
    with pytest.raises(CheckpointError) as error:
        convert_to_timm(ours(skip_scale=2.0, with_peg=True, pos_embed=None))
    assert len(str(error.value).splitlines()) == 1 + 1 + 2 * 3
    with pytest.raises(CheckpointError, match='converts an SPViT.* a Linear'):
        convert_to_timm(torch.nn.Linear(2, 2))


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    'key',
    [
        'blocks.1.attn.extra',
        'fc_norm.weight',
        'blocks.1.attn.q_norm.weight',
    ],
)
def test_keys_without_a_place_are_listed(key):
    spec = SMALL['deit']
    state = as_saved(make_state(spec))
    state[key] = torch.ones(24)
    with pytest.raises(CheckpointError, match='find no place') as error:
        convert(state, spec)
    assert key in str(error.value)


def test_what_holds_no_numbers_of_a_model_is_refused():
    spec = SMALL['deit']
    state = as_saved(make_state(spec))
    whole = {**state, 'norm.bias': state['norm.bias'].int()}
    with pytest.raises(CheckpointError, match=r'floating.*\n  norm.bias: torch.int32$'):
        convert(whole, spec)
    weight = state['head.weight']
    packed = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    for value in (weight.to_sparse(), packed):
        with pytest.raises(CheckpointError, match="'head.weight'.*sparse or quantized"):
            convert({**state, 'head.weight': value}, spec)


def test_every_missing_key_and_odd_shape_is_listed():
    spec = SMALL['spvit']
    state = as_saved(make_state(spec))
    del state['blocks.3.norm1.bias'], state['blocks.1.attn.v.weight']
    state['blocks.2.norm2.weight'] = torch.ones(23)
    with pytest.raises(CheckpointError) as error:
        convert(state, spec)
    for words in (
        '2 keys are missing',
        'blocks.3.norm1.bias',
        'blocks.1.attn.v.weight',
    ):
        assert words in str(error.value)
    assert 'blocks.2.norm2.weight: (23,) instead of (24,)' in str(error.value)


@pytest.mark.parametrize(
    ('name', 'options', 'words'),
    [
        ('lvvit', dict(num_heads=None), '--num-heads'),
        ('lvvit', dict(num_heads=5), 'must be divisible'),
        ('spvit', dict(num_heads=4), r'b2: .3,. instead of .4,.'),
        ('spvit', dict(skip_scale=None), '--skip-scale'),
        ('spvit', dict(skip_scale=0.0), 'above 0'),
        ('spvit', dict(img_size=(32, 32)), r'pos_embed: .1, 16, 24. instead'),
        ('spvit', dict(num_spsa_layers=1), r'no place.*\n.*1\.attn\.b2'),
        ('spvit', dict(cls_token_layer=9), r'0\.\.3'),
        ('deit', dict(num_spsa_layers=4), r'0\.\.3'),
        ('deit', dict(classifier='tokenlabel'), 'aux_head'),
        ('deit', dict(classifier='other'), 'classifier'),
        ('deit', dict(weights='best'), 'weights'),
        ('deit', dict(test_crop=1.2), 'test_crop'),
        ('deit', dict(hidden_dims=0), 'hidden_dims'),
        ('spvit, grid 3 x 5', dict(img_size=None), '--img-size'),
    ],
)
def test_bad_options(name, options, words):
    spec = SMALL[name]
    state = as_saved(make_state(spec))
    with pytest.raises(CheckpointError, match=words):
        convert({'state_dict': state}, spec, **options)


def test_wrong_source_and_openmmlab_files():
    spec = SMALL['spvit']
    state = as_saved(make_state(spec))
    with pytest.raises(CheckpointError, match='keys are those of spvit'):
        convert_to_mm(state, 'deit', options_of(spec))
    ours = convert(state, spec).state_dict
    with pytest.raises(CheckpointError, match='needs no conversion'):
        convert_to_mm({'state_dict': ours})
    with pytest.raises(CheckpointError, match='backbone.layers'):
        convert_to_released({'state_dict': state})
    with pytest.raises(
        CheckpointError, match='told by `patch_embed.proj.weight`.*nothing'
    ):
        convert_to_mm({'conv1.weight': torch.ones(1)})


def test_plain_classifier_leaves_the_auxiliary_head_out():
    spec = SMALL['spvit']
    result = convert(as_saved(make_state(spec)), spec, classifier='plain')
    assert result.model['type'] == 'ImageClassifier'
    assert not any('aux_head' in key for key in result.state_dict)
    assert any('auxiliary head' in note for note in result.notes)


# ------------------------------------------------------------------------ files


def tool():
    path = Path(__file__).parents[2] / 'tools' / 'model_converters' / 'convert.py'
    spec = importlib.util.spec_from_file_location('convert_tool', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def source_file(tmp_path):
    path = tmp_path / 'in' / 'source.pth.tar'
    path.parent.mkdir()
    torch.save(dict(state_dict=as_saved(make_state(SMALL['spvit']))), path)
    return path


def test_command_line_there_and_back(tmp_path, source_file):
    out, back = tmp_path / 'new' / 'ours.pth', tmp_path / 'back.pth'
    tool()([str(source_file), str(out), '--skip-scale', '2'])
    assert sorted(p.name for p in out.parent.iterdir()) == ['ours.pth', 'ours.py']
    tool()([str(out), str(back), '--to', 'spvit'])
    want = torch.load(source_file, weights_only=True)['state_dict']
    assert_same(torch.load(back, weights_only=True)['state_dict'], want)
    # Its config, which is beside it, is asked.
    there = [str(out), str(tmp_path / 'b.pth'), '--to', 'spvit']
    with pytest.raises(UserError, match="combine='add'"):
        tool()([*there, '--cfg-options', 'model.backbone.attn_cfg.combine=add'])
    with pytest.raises(UserError, match='typo.py does not exist'):
        tool()([*there, '--config', str(tmp_path / 'typo.py')])
    # A config of a model without a head has a new one.
    bare = tmp_path / 'bare.pth'
    tool()([str(source_file), str(bare), '--skip-scale', '2', '--classifier', 'none'])
    tool()([str(bare), *there[1:]])
    written = torch.load(tmp_path / 'b.pth', weights_only=True)['state_dict']
    assert_same(written, {k: v for k, v in want.items() if 'head' not in k})


def test_command_line_to_timm_by_safetensors(tmp_path):
    state = as_saved(make_state(SMALL['timm']))
    names = ('model', 'ours', 'back')
    src, middle, back = (tmp_path / f'{name}.safetensors' for name in names)
    write_checkpoint(dict(state_dict=state), src)
    tool()([str(src), str(middle), '--num-heads', '3'])
    assert Config.fromfile(tmp_path / 'ours.py').load_from.endswith('ours.safetensors')
    tool()([str(middle), str(back), '--to', 'timm'])
    assert_same(read_checkpoint(back), state)
    # The config beside it is found; one of another name is said.
    (tmp_path / 'ours.py').rename(tmp_path / 'other.py')
    arguments = [str(middle), str(tmp_path / 'b.pth'), '--to', 'timm']
    with pytest.raises(
        UserError, match='ours.py does not exist: name it with --config'
    ):
        tool()(arguments)
    tool()([*arguments, '--config', str(tmp_path / 'other.py')])
    assert_same(read_checkpoint(tmp_path / 'b.pth')['state_dict'], state)
    with pytest.raises(UserError, match='are for --to timm and spvit'):
        tool()([str(src), str(tmp_path / 'c.pth'), '--config', 'x.py'])
    # Folded priors need deploy=True, as everywhere.
    model, _ = load_trained_model(load_config(str(tmp_path / 'other.py')), str(middle))
    model.backbone.switch_to_deploy()
    write_checkpoint(dict(state_dict=model.state_dict()), tmp_path / 'folded.pth')
    folded = [str(tmp_path / 'folded.pth'), str(tmp_path / 'd.pth'), *arguments[2:]]
    folded += ['--config', str(tmp_path / 'other.py'), '--cfg-options']
    tool()([*folded, 'model.backbone.deploy=True'])
    assert_same(read_checkpoint(tmp_path / 'd.pth')['state_dict'], state)
    # Weights alone of another model are told by their names.
    with pytest.raises(UserError, match='is not a checkpoint of this model'):
        tool()([str(src), str(tmp_path / 'c.pth'), '--to', 'timm', '--config',
                str(tmp_path / 'other.py')])  # fmt: skip


def test_mistakes_end_with_code_2_and_help_explains(tmp_path, capsys):
    for argv, words in (
        ([tmp_path / 'none.pth', tmp_path / 'a.pth'], 'none.pth does not exist'),
        ([__file__, tmp_path / 'a.pth'], 'no file of torch.save'),
        ([__file__, tmp_path / 'a.bin'], 'must end in .pth or .safetensors'),
        ([__file__, tmp_path / 'a.pth', '--test-crop', '7'], 'must lie in (0, 1]'),
    ):
        with pytest.raises(SystemExit) as end:
            run_cli(tool(), 'convert.py', [str(arg) for arg in argv])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith('convert.py: error: ')
        assert words in line
    with pytest.raises(SystemExit):
        tool()(['--help'])
    helped = capsys.readouterr().out
    for option in ('from', 'to', 'img-size', 'distilled', 'act', 'config'):
        text = helped.split(f'\n  --{option} ', 1)[1].split('\n  --', 1)[0]
        assert len(text.split()) > 10, option


@pytest.mark.parametrize('existing', ['ours.pth', 'ours.py'])
def test_nothing_is_overwritten(tmp_path, source_file, existing):
    out = tmp_path / 'ours.pth'
    (tmp_path / existing).write_text('mine')
    with pytest.raises(UserError, match='exists. Give another name, or --force'):
        tool()([str(source_file), str(out), '--skip-scale', '2'])
    assert (tmp_path / existing).read_text() == 'mine'
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['in', existing])
    tool()([str(source_file), str(out), '--skip-scale', '2', '--force'])
    assert torch.load(out, weights_only=True)['state_dict']


def test_a_failed_write_leaves_nothing(tmp_path, source_file, monkeypatch):
    def fail(content, file):
        Path(file).write_bytes(b'half')
        raise OSError('No space left on device')

    out = tmp_path / 'out' / 'ours.pth'
    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(UserError, match='No space left'):
        convert_file(source_file, out, options=Options(skip_scale=2.0))
    assert not list(out.parent.iterdir())


def test_a_failed_config_leaves_nothing(tmp_path, source_file, monkeypatch):
    def fail(path, *args, **kwargs):
        raise OSError('No space left on device')

    out = tmp_path / 'out' / 'ours.pth'
    monkeypatch.setattr(Path, 'write_text', fail)
    with pytest.raises(UserError, match='No space left'):
        tool()([str(source_file), str(out), '--skip-scale', '2'])
    assert not list(out.parent.iterdir())


def test_only_a_trusted_file_may_run_code(tmp_path):
    content = dict(state_dict=as_saved(make_state(SMALL['spvit'])), args=Evil(tmp_path))
    src, out = tmp_path / 'evil.pth', tmp_path / 'ours.pth'
    torch.save(content, src)
    # Python 3.13 calls its module _io.
    with pytest.raises(UserError, match=r'asks for `_?io\.open`'):
        tool()([str(src), str(out), '--skip-scale', '2'])
    assert sorted(p.name for p in tmp_path.iterdir()) == ['evil.pth']
    tool()([str(src), str(out), '--skip-scale', '2', '--trust-checkpoint'])
    assert (tmp_path / 'ran').exists()
    assert out.exists()


class Evil:
    def __init__(self, folder):
        self.marker = str(folder / 'ran')

    def __reduce__(self):
        return open, (self.marker, 'w')


def test_the_config_runs_from_anywhere(tmp_path, source_file):
    """In a process that has imported nothing, of files that were moved."""
    tool()([str(source_file), str(tmp_path / 'a' / 'x.pth'), '--skip-scale', '2'])
    shutil.move(tmp_path / 'a', tmp_path / 'b')
    assert len((tmp_path / 'b' / 'x.py').read_text().splitlines()) < 100
    code = (
        'import sys; from mmengine.config import Config\n'
        'cfg = Config.fromfile(sys.argv[1])\n'
        'print(cfg.load_from, cfg.model.type, cfg.default_hooks.checkpoint.type)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'b' / 'x.py')],
        cwd=tmp_path / 'in',
        capture_output=True,
        text=True,
        check=True,
    )
    checkpoint, *types = done.stdout.split()[-3:]
    assert Path(checkpoint).samefile(tmp_path / 'b' / 'x.pth')
    assert types == ['TokenLabelClassifier', 'AtomicCheckpointHook']


def test_bad_files_are_one_line_and_write_nothing(tmp_path, source_file, capsys):
    page = tmp_path / 'page.pth'
    page.write_text('<!doctype html><html>Not found</html>')
    with pytest.raises(UserError, match='a web page'):
        tool()([str(page), str(tmp_path / 'ours.pth')])
    with pytest.raises(SystemExit):
        tool()([str(tmp_path), str(tmp_path / 'ours.pth')])
    assert 'is a folder' in capsys.readouterr().err
    with pytest.raises(UserError, match='end in .pth'):
        tool()([str(source_file), str(tmp_path / 'ours.bin')])
    same = tmp_path / 'same.pth'
    source_file.rename(same)
    with pytest.raises(UserError, match='is the source itself'):
        tool()([str(same), str(same), '--skip-scale', '2', '--force'])
    assert not (tmp_path / 'ours.pth').exists()


def test_written_config_tests_and_trains(tmp_path):
    """The config as written, with a folder of pictures in place of ImageNet."""
    from mmengine.runner import Runner
    from PIL import Image

    spec = SMALL['deit']
    torch.save({'model': as_saved(make_state(spec))}, tmp_path / 'deit.pth')
    convert_file(
        tmp_path / 'deit.pth',
        tmp_path / 'out' / 'sp-deit.pth',
        options=options_of(spec, cls_token_layer=1),
    )
    for name in 'abcdefg':
        folder = tmp_path / 'data' / name
        folder.mkdir(parents=True)
        Image.new('RGB', (80, 70), (ord(name), 50, 9)).save(folder / '1.png')

    cfg = Config.fromfile(tmp_path / 'out' / 'sp-deit.py')
    assert Path(cfg.load_from).resolve() == (tmp_path / 'out' / 'sp-deit.pth').resolve()
    assert cfg.data_preprocessor.num_classes == 7
    assert cfg.test_dataloader.dataset.pipeline[1].scale == 73
    assert cfg.train_dataloader.dataset.pipeline[1].scale == 64
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        pipeline = loader.dataset.pipeline
        loader.dataset = dict(
            type='CustomDataset', data_root=str(tmp_path / 'data'), pipeline=pipeline
        )
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = []
    cfg.optim_wrapper.optimizer.lr = 0.0
    cfg.work_dir = str(tmp_path / 'work')
    cfg.val_evaluator = cfg.test_evaluator = dict(type='Accuracy', topk=(1,))
    runner = Runner.from_cfg(cfg)
    assert 0 <= runner.test()['accuracy/top1'] <= 100
    loaded = runner.model.state_dict()
    assert_same(loaded, torch.load(cfg.load_from, weights_only=True)['state_dict'])

    runner = Runner.from_cfg(Config(dict(cfg, experiment_name='train')))
    runner.train()
    saved = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)
    # At learning rate 0 what was trained is what was loaded.
    assert_same(saved['state_dict'], loaded)


def test_written_config_holds_for_oblong_images(tmp_path):
    spec = SMALL['spvit, grid 3 x 5']
    torch.save(as_saved(make_state(spec)), tmp_path / 'a.pth')
    convert_file(tmp_path / 'a.pth', tmp_path / 'b.pth', options=options_of(spec))
    cfg = Config.fromfile(tmp_path / 'b.py')
    assert cfg.model.backbone.img_size == (48, 80)
    # mmcv's order is width, height.
    assert cfg.test_dataloader.dataset.pipeline[2].crop_size == (80, 48)
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (88, 53)
    assert cfg.train_dataloader.dataset.type == 'TokenLabelDataset'
    crop = cfg.train_dataloader.dataset.pipeline[1]
    assert crop.type == 'TokenLabelRandomResizedCrop'
    assert crop.scale == (80, 48)


# ------------------------------------------- mmpretrain's own need no conversion


@pytest.mark.parametrize('cls_token_layer', [0, 2])
def test_mmpretrain_checkpoints_load_as_they_are(tmp_path, cls_token_layer):
    init_default_scope('mmpretrain')
    arch = dict(embed_dims=24, num_layers=4, num_heads=3, feedforward_channels=48)
    torch.manual_seed(0)
    vit = VisionTransformer(arch, img_size=64, out_type='raw')
    vit.eval()
    for param in vit.parameters():
        torch.nn.init.normal_(param, std=0.2)
    path = tmp_path / 'vit.pth'
    head = {'head.layers.head.weight': torch.ones(2, 24)}
    state = {f'backbone.{k}': v for k, v in vit.state_dict().items()}
    torch.save(dict(state_dict={**state, **head}), path)
    model = MODELS.build(
        dict(
            type='SPViT',
            arch=arch,
            img_size=64,
            num_spsa_layers=2,
            cls_token_layer=cls_token_layer,
            out_type='raw',
            init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone'),
        )
    ).eval()
    model.init_weights()
    if cls_token_layer:
        folded = vit.cls_token + vit.pos_embed[:, :1]
        torch.testing.assert_close(model.cls_token, folded)
        torch.testing.assert_close(model.pos_embed, vit.pos_embed[:, 1:])
        return
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            model(images)[0], vit(images)[0], rtol=1e-5, atol=1e-5
        )

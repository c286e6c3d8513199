import copy
import pickle
import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn as nn
from mmengine.model.weight_init import PretrainedInit
from mmengine.runner import load_checkpoint
from mmengine.utils import digit_version
from mmpretrain.models.backbones import VisionTransformer
from mmpretrain.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

from spvit_mm.models import SPViT
from spvit_mm.models.attention import SpatialPriorAttention
from spvit_mm.models.layer import SPViTLayer

from . import AUTOCAST_DTYPES, loss_of

ARCH = dict(embed_dims=24, num_layers=4, num_heads=3, feedforward_channels=48)
SMALL = dict(arch=ARCH, img_size=32, patch_size=8)
# Older torch cannot trace mmcv's FFN (its forward is wrapped for the names of
# arguments of long ago), in mmpretrain's ViT neither.
WHOLE_GRAPH = digit_version(torch.__version__) >= digit_version('2.3')


def build(**kwargs):
    return MODELS.build(dict(type='SPViT', **{**SMALL, **kwargs}))


def randomize(model):
    """Non-trivial everything, the priors and BN statistics too."""
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        if hasattr(module, 'b2'):
            nn.init.normal_(module.w2, std=0.05)
            nn.init.normal_(module.b2, mean=1, std=0.1)
    return model


# --------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ('arch', 'width', 'expected'),
    [
        ('spvit-small', 384, 26_234_468),
        ('spvit-medium', 512, 55_969_440),
        ('spvit-large', 768, 150_273_368),
    ],
)
def test_released_parameter_counts(arch, width, expected):
    with torch.device('meta'):
        model = SPViT(arch)
    heads = 2 * (width + 1) * 1000
    assert sum(p.numel() for p in model.parameters()) + heads == expected


def test_released_large_has_no_spsa_layer():
    with torch.device('meta'):
        model = SPViT('spvit-large', num_spsa_layers=0, cls_token_layer=22)
    heads = 2 * 769 * 1000
    assert sum(p.numel() for p in model.parameters()) + heads == 150_205_520


def test_given_arguments_win_over_the_arch():
    arch = dict(ARCH, skip_scale=2.0, with_peg=True, qkv_bias=False, stem='conv')
    model = build(arch=arch)
    assert model.layers[0].branch_scale == 0.5
    assert model.layers[0].attn.qkv.bias is None
    assert model.layers[0].peg is not None
    model = build(arch=arch, skip_scale=1, with_peg=False, qkv_bias=True, stem='patch')
    assert model.layers[0].branch_scale == 1
    assert model.layers[0].attn.qkv.bias is not None
    assert model.layers[0].peg is None
    assert SPViT.arch_zoo['deit-small-9h']['embed_dims'] == 432


# ------------------------------------------------- identity with the parent


@pytest.mark.parametrize('out_type', ['raw', 'cls_token', 'featmap', 'avg_featmap'])
@pytest.mark.parametrize('size', [(32, 32), (40, 72), (30, 33)])
def test_without_spsa_it_is_vision_transformer(out_type, size):
    kwargs = dict(SMALL, out_type=out_type, out_indices=[1, 3], pre_norm=True,
                  layer_scale_init_value=0.1)  # fmt: skip
    plain = randomize(VisionTransformer(**kwargs))
    plain.eval()
    model = SPViT(**kwargs, num_spsa_layers=0).eval()
    model.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, *size)
    for ours, theirs in zip(model(x), plain(x), strict=True):
        assert torch.equal(ours, theirs)


def test_without_spsa_it_trains_as_vision_transformer():
    """Dropout and drop path too: same random numbers, same gradients."""
    kwargs = dict(SMALL, drop_rate=0.1, drop_path_rate=0.2)
    plain = randomize(VisionTransformer(**kwargs))
    model = SPViT(**kwargs, num_spsa_layers=0)
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for net in (plain, model):
        torch.manual_seed(1)
        loss_of(net(x)[0]).backward()
    theirs = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, theirs[name].grad)


@pytest.mark.parametrize('share', ['none', 'heads', 'network'])
def test_neutral_start_is_vision_transformer(share):
    plain = VisionTransformer(**SMALL)
    plain.eval()
    plain.init_weights()
    model = build(cls_token_layer=0, share_prior=share).eval()
    keys = model.load_state_dict(plain.state_dict(), strict=False)
    assert not keys.unexpected_keys
    assert all('prior' in key for key in keys.missing_keys)
    x = torch.randn(2, 3, 48, 32)
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------- structure


def test_default_layers():
    model = build()
    spatial = [layer.takes_grid for layer in model.layers]
    assert spatial == [True, True, False, False]
    assert model.cls_token_layer == 2
    assert model.pos_embed.shape == (1, 16, 24)
    assert build(cls_token_layer=0).pos_embed.shape == (1, 17, 24)
    assert build(num_spsa_layers=4).cls_token_layer == 3


def test_late_class_token_is_absent_before_it_joins():
    model = build(out_type='raw', out_indices=(0, 1, 2, 3), cls_token_layer=2)
    assert [out.shape[1] for out in model(torch.randn(1, 3, 32, 40))] == [
        20,
        20,
        21,
        21,
    ]
    model = build(out_type='featmap', out_indices=(0, 3), cls_token_layer=2)
    assert [out.shape for out in model(torch.randn(1, 3, 32, 40))] == [
        (1, 24, 4, 5)
    ] * 2


def test_forward_written_out():
    """Order of the blocks, skip scale, PEG, late class token, final norm."""
    model = randomize(
        build(with_peg=True, skip_scale=2, stem='conv', drop_path_rate=0.1)
    )
    model = model.double().eval()
    x = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    tokens, hw = model.patch_embed(x)
    assert hw == (4, 6)
    pos = model.pos_embed.view(1, 4, 4, 24).permute(0, 3, 1, 2).float()
    pos = nn.functional.interpolate(pos, hw, mode='bicubic', align_corners=False)
    out = tokens + pos.double().flatten(2).transpose(1, 2)
    for i, layer in enumerate(model.layers):
        if i == 2:
            out = torch.cat((model.cls_token.expand(2, 1, 24), out), 1)
        y = layer.ln1(out)
        y = layer.attn(y, hw) if i < 2 else layer.attn(y)
        out = out + y / 2
        out = out + layer.ffn.layers(layer.ln2(out)) / 2
        extra = 1 if i >= 2 else 0
        image = out[:, extra:].transpose(1, 2).reshape(2, 24, *hw)
        image = image + layer.peg.proj(image)
        out = torch.cat((out[:, :extra], image.flatten(2).transpose(1, 2)), 1)
    torch.testing.assert_close(model(x)[0], model.ln1(out)[:, 0])


def test_sharing():
    per_head = build(share_prior='none')
    assert per_head.layers[0].attn.prior.num_heads == 3
    per_layer = build(share_prior='heads')
    assert per_layer.layers[0].attn.prior.num_heads == 1
    assert per_layer.layers[0].attn.prior is not per_layer.layers[1].attn.prior
    network = build(share_prior='network')
    assert network.prior.num_heads == 3
    assert network.layers[0].attn.prior is None
    names = [name for name, _ in network.named_parameters() if 'prior' in name]
    assert names == ['prior.w1', 'prior.b1', 'prior.w2', 'prior.b2']


def test_network_prior_equals_the_same_prior_in_every_layer():
    network = randomize(build(share_prior='network')).double().eval()
    own = build().double().eval()
    state = network.state_dict()
    for i in range(2):
        for name in ('w1', 'b1', 'w2', 'b2'):
            state[f'layers.{i}.attn.prior.{name}'] = state[f'prior.{name}']
    own.load_state_dict({k: v for k, v in state.items() if not k.startswith('prior.')})
    x = torch.randn(1, 3, 24, 40, dtype=torch.float64)
    torch.testing.assert_close(network(x)[0], own(x)[0])


def test_network_prior_is_evaluated_once(monkeypatch):
    model = build(share_prior='network', num_spsa_layers=4)
    calls = []
    relation = model.prior.relation
    monkeypatch.setattr(
        model.prior, 'relation', lambda offsets: calls.append(1) or relation(offsets)
    )
    model(torch.randn(2, 3, 32, 32))
    assert len(calls) == 1


@pytest.mark.parametrize('share', ['none', 'network'])
@pytest.mark.parametrize(
    'constructor',
    ['DefaultOptimWrapperConstructor', 'LearningRateDecayOptimWrapperConstructor'],
)
def test_every_parameter_is_in_the_optimizer_once(share, constructor, mmpretrain_scope):
    from mmengine.optim import build_optim_wrapper

    model = build(share_prior=share)
    paramwise_cfg = dict(custom_keys={'prior': dict(decay_mult=0.5)})
    if constructor.startswith('Learning'):
        paramwise_cfg['layer_decay_rate'] = 0.5
        paramwise_cfg['norm_decay_mult'] = 0.0
    wrapper = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
            constructor=constructor,
            paramwise_cfg=paramwise_cfg,
        ),
    )
    ids = [id(p) for g in wrapper.optimizer.param_groups for p in g['params']]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    for group in wrapper.optimizer.param_groups:
        name = names[id(group['params'][0])]
        if 'prior' in name:
            assert group['weight_decay'] == pytest.approx(0.05)


def test_other_attention_takes_the_place():
    class Identity(nn.Module):
        def __init__(self, embed_dims, num_extra_tokens, grid, **kwargs):
            super().__init__()
            self.seen = (num_extra_tokens, grid)

        def forward(self, x, hw_shape, omega=None):
            assert x.shape[1] == self.seen[0] + hw_shape[0] * hw_shape[1]
            return torch.zeros_like(x)

    model = build(attn_cfg=dict(type=Identity), cls_token_layer=1)
    assert [model.layers[i].attn.seen for i in (0, 1)] == [(0, (4, 4)), (1, (4, 4))]
    model(torch.randn(1, 3, 16, 40))
    with pytest.raises(ValueError, match='`prior` and `share_prior` belong to'):
        build(attn_cfg=dict(type=Identity), share_prior='heads')


def test_the_output_of_a_pegs_convolution_stays_as_a_hook_saw_it():
    model = build(with_peg=True).eval()
    seen = []
    model.layers[0].peg.proj.register_forward_hook(
        lambda module, args, out: seen.append((out, out.clone()))
    )
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    ((kept, before),) = seen
    assert torch.equal(kept, before)


def test_any_size():
    model = build(with_peg=True).eval()
    for size in [(1, 1), (8, 8), (7, 100), (100, 9), (64, 64)]:
        assert model(torch.randn(1, 3, *size))[0].shape == (1, 24)


@pytest.mark.parametrize(
    'attn_cfg',
    [
        None,
        dict(combine='add'),
        dict(type='RotaryPositionAttention'),
        dict(type='GatedPositionalAttention', init='random'),
    ],
)
def test_runs_on_the_meta_device(attn_cfg):
    with torch.device('meta'):
        model = build(attn_cfg=attn_cfg, arch=dict(ARCH, num_heads=2))
        assert model(torch.randn(1, 3, 32, 40))[0].shape == (1, 24)


def test_numpy_integers_are_integers():
    model = build(
        num_spsa_layers=np.int64(1),
        cls_token_layer=np.int64(1),
        out_indices=np.int64(2),
    )
    assert (model.num_spsa_layers, model.cls_token_layer) == (1, 1)
    assert model.out_indices == [2]


def test_attention_config_without_a_type():
    attn = build(attn_cfg=dict(attn_impl='eager')).layers[0].attn
    assert type(attn) is SpatialPriorAttention
    assert attn.attn_impl == 'eager'


@pytest.mark.parametrize(
    'stem', ['conv', dict(type='ConvStem', stem_channels=8, patch_size=16)]
)
def test_patch_cfg_wins_over_the_stem(stem):
    model = build(stem=stem, patch_cfg=dict(stem_channels=12, patch_size=4))
    assert model.patch_embed.conv1.conv.out_channels == 12
    assert model.patch_resolution == (8, 8)
    assert model(torch.randn(1, 3, 32, 32))[0].shape == (1, 24)


def test_no_position_embedding():
    model = build(pos_embed=None)
    model.init_weights()
    assert 'pos_embed' not in dict(model.named_parameters())
    loss_of(model(torch.randn(1, 3, 32, 40))[0]).backward()


def test_activation_checkpointing_changes_nothing():
    model = randomize(build(share_prior='network'))
    recomputing = build(share_prior='network', with_cp=True)
    recomputing.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for net in (model, recomputing):
        loss_of(net(x)[0]).backward()
    theirs = dict(model.named_parameters())
    for name, param in recomputing.named_parameters():
        torch.testing.assert_close(param.grad, theirs[name].grad)


def test_copies_and_pickles():
    model = randomize(build(share_prior='heads', drop_path_rate=0.1)).eval()
    x = torch.randn(1, 3, 32, 40)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x)[0], model(x)[0])
        other = build(share_prior='heads', img_size=64)
        clone.load_state_dict(other.state_dict())  # its own load hook, at its own grid
        assert clone.pos_embed.shape == (1, 16, 24)


def test_out_indices_of_the_caller_stay_untouched():
    indices = [-1, 2]
    model = build(out_indices=indices, cls_token_layer=0)
    assert indices == [-1, 2]
    assert model.out_indices == [3, 2]


# ------------------------------------------------------------------ training


@pytest.mark.parametrize('stem', ['patch', 'conv'])
@pytest.mark.parametrize('out_type', ['cls_token', 'avg_featmap', 'featmap', 'raw'])
def test_every_trained_parameter_gets_a_gradient(out_type, stem):
    """So that DDP needs no find_unused_parameters."""
    model = build(out_type=out_type, stem=stem, with_peg=True, drop_path_rate=0.1)
    loss_of(model(torch.randn(2, 3, 32, 48))[0]).backward()
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and p.grad is None
    ]
    assert without == []
    fixed = [n for n, p in model.named_parameters() if not p.requires_grad]
    # the class token passes the last PEG untouched
    last_peg = [f'layers.3.peg.proj.{n}' for n in ('weight', 'bias')]
    assert fixed == (last_peg if out_type == 'cls_token' else [])


@pytest.mark.parametrize('final_norm', [True, False])
@pytest.mark.parametrize(
    'kwargs',
    [
        dict(out_indices=[2], out_type='cls_token'),
        dict(out_indices=[0, 1], out_type='featmap'),  # before the class token
        dict(out_indices=[2, 0], out_type='raw', cls_token_layer=0),
        dict(out_indices=1, out_type='avg_featmap', with_cls_token=False),
    ],
)
def test_no_gradient_is_awaited_behind_the_last_output(kwargs, final_norm):
    model = build(with_peg=True, final_norm=final_norm, **kwargs)
    calls = []
    model.layers[3].register_forward_hook(lambda *_: calls.append(3))
    outs = model(torch.randn(2, 3, 32, 48))
    assert len(outs) == len(model.out_indices)
    assert calls == []
    sum(loss_of(out) for out in outs).backward()
    for name, param in model.named_parameters():
        assert param.requires_grad == (param.grad is not None), name


@pytest.mark.parametrize('frozen_stages', [1, 4])
def test_frozen_stages(frozen_stages):
    model = build(
        frozen_stages=frozen_stages, stem='conv', share_prior='network', drop_rate=0.5
    )
    assert model.train() is model
    for name, param in model.named_parameters():
        match = re.match(r'layers\.(\d+)', name)
        stem = name.startswith(('patch_embed', 'pos_embed', 'prior'))
        frozen = stem or (match is not None and int(match[1]) < frozen_stages)
        # The class token joins before layer 2.
        frozen = frozen or (frozen_stages == 4 and name == 'cls_token')
        frozen = frozen or (frozen_stages == 4 and name.startswith('ln1'))
        assert param.requires_grad is not frozen, name
    assert not model.patch_embed.training
    assert [layer.training for layer in model.layers] == [
        i >= frozen_stages for i in range(4)
    ]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(4, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layer_depth():
    model = build(share_prior='network', with_peg=True, pre_norm=True)
    depth = {n: model.get_layer_depth('backbone.' + n, 'backbone.')
             for n, _ in model.named_parameters()}  # fmt: skip
    assert {d[1] for d in depth.values()} == {6}
    for name in ('cls_token', 'pos_embed', 'prior.w1', 'patch_embed.projection.weight'):
        assert depth[name][0] == 0
    assert depth['layers.0.attn.qkv.weight'][0] == 1
    assert depth['layers.3.peg.proj.weight'][0] == 4
    assert depth['ln1.weight'][0] == 5
    assert depth['pre_norm.weight'][0] == 5
    assert model.get_layer_depth('head.weight', 'backbone.') == (5, 6)
    own = build().get_layer_depth('layers.1.attn.prior.w1')
    assert own == (2, 6)


def test_drop_path_rates_are_plain_floats():
    model = build(drop_path_rate=0.3)
    rates = [layer.attn.out_drop.drop_prob for layer in model.layers]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    assert all(type(rate) is float for rate in rates)


@pytest.mark.parametrize('share', ['none', 'network'])
def test_compiles_as_one_graph_without_recompilation(share):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend('aot_eager')
    model = build(drop_path_rate=0.1, with_peg=True, share_prior=share)
    compiled = torch.compile(model, backend=counter, fullgraph=WHOLE_GRAPH)
    x = torch.randn(2, 3, 32, 48)
    for mode in (True, False):
        model.train(mode)
        compiled(x)
        count = counter.frame_count
        for _ in range(2):
            out = compiled(torch.randn(2, 3, 32, 48))[0]
            if mode:
                loss_of(out).backward()
        assert counter.frame_count == count
    torch.testing.assert_close(compiled(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dtype', AUTOCAST_DTYPES)
def test_mixed_precision_step(dtype):
    model = build(with_peg=True, pos_embed=None)
    with torch.autocast('cpu', dtype=dtype):
        out = model(torch.randn(2, 3, 32, 48))[0]
        loss_of(out).backward()
    assert torch.isfinite(out).all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# --------------------------------------------------------------- checkpoints


def test_state_dict_round_trip():
    model, other = randomize(build(with_peg=True)), build(with_peg=True)
    other.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 40, 32)
    assert torch.equal(model.eval()(x)[0], other.eval()(x)[0])


def expected_pos(pos, src, dst):
    pos = pos.reshape(1, *src, -1).permute(0, 3, 1, 2)
    pos = nn.functional.interpolate(pos, dst, mode='bicubic', align_corners=False)
    return pos.flatten(2).transpose(1, 2)


@pytest.mark.parametrize('cls_token_layer', [0, 2])
def test_position_resizes_from_a_grid_that_is_not_square(cls_token_layer):
    kwargs = dict(cls_token_layer=cls_token_layer)
    source = randomize(build(img_size=(16, 64), **kwargs))  # 2 x 8 = 16 = 4 x 4
    target = build(img_size=(32, 32), **kwargs)
    target.load_state_dict(source.state_dict(), strict=True)
    extra = 1 if cls_token_layer == 0 else 0
    want = expected_pos(source.pos_embed[:, extra:], (2, 8), (4, 4))
    torch.testing.assert_close(target.pos_embed[:, extra:], want)
    assert torch.equal(target.pos_embed[:, :extra], source.pos_embed[:, :extra])
    assert target.train_grid.tolist() == [4, 4]


def test_plain_checkpoints_are_taken_for_square():
    plain = randomize(VisionTransformer(**SMALL))
    target = SPViT(**{**SMALL, 'img_size': (24, 48)}, num_spsa_layers=0)
    target.load_state_dict(plain.state_dict(), strict=True)
    want = expected_pos(plain.pos_embed[:, 1:], (4, 4), (3, 6))
    torch.testing.assert_close(target.pos_embed[:, 1:], want)


@pytest.mark.parametrize('size', [(24, 40), (16, 64)])  # 2 x 8 = 4 x 4 patches
def test_plain_checkpoint_of_the_same_oblong_size(size):
    kwargs = {**SMALL, 'img_size': size}
    plain = randomize(VisionTransformer(**kwargs))
    plain.eval()
    model = SPViT(**kwargs, num_spsa_layers=0).eval()
    model.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(1, 3, *size)
    assert torch.equal(model(x)[0], plain(x)[0])


def test_class_position_is_folded_into_a_late_class_token():
    source = randomize(build(cls_token_layer=0))
    target = build(cls_token_layer=2)
    target.load_state_dict(source.state_dict())
    want = source.cls_token + source.pos_embed[:, :1]
    assert torch.equal(target.cls_token, want)
    assert torch.equal(target.pos_embed, source.pos_embed[:, 1:])
    assert torch.equal(source.state_dict()['cls_token'], source.cls_token)


def test_late_checkpoint_into_an_early_model():
    source, target = randomize(build(cls_token_layer=2)), build(cls_token_layer=0)
    target.load_state_dict(source.state_dict())
    assert target.pos_embed[:, 0].eq(0).all()
    assert torch.equal(target.pos_embed[:, 1:], source.pos_embed)


def test_class_token_can_be_dropped():
    source = randomize(build(cls_token_layer=0))
    target = build(with_cls_token=False, out_type='featmap')
    keys = target.load_state_dict(source.state_dict(), strict=False)
    assert keys.unexpected_keys == ['cls_token']
    assert keys.missing_keys == []
    assert torch.equal(target.pos_embed, source.pos_embed[:, 1:])


def test_checkpoint_with_position_into_a_model_without():
    source, target = randomize(build()), build(pos_embed=None)
    target.load_state_dict(source.state_dict(), strict=True)


def test_distilled_checkpoint_is_refused_with_the_reason():
    state = build(cls_token_layer=0).state_dict()
    state['pos_embed'] = torch.zeros(1, 18, 24)
    with pytest.raises(ValueError, match='18 entries for a grid of 4 x 4'):
        build(cls_token_layer=0).load_state_dict(state)


def test_dense_prior_learns_the_training_grid_from_a_classifier():
    prior = dict(type='MLPSpatialPrior', coords='clamped')
    target = build(img_size=(64, 128), prior=prior)
    assert target.layers[0].attn.prior.train_grid.tolist() == [8, 16]
    target.load_state_dict(build().state_dict(), strict=True)
    assert target.layers[0].attn.prior.train_grid.tolist() == [4, 4]


def test_a_new_prior_keeps_its_grid_beside_a_checkpoint_without_priors():
    prior = dict(type='MLPSpatialPrior', coords='clamped')
    target = build(img_size=(64, 128), prior=prior)
    target.load_state_dict(build(num_spsa_layers=0).state_dict(), strict=False)
    assert target.layers[0].attn.prior.train_grid.tolist() == [8, 16]


@pytest.mark.parametrize('kind', ['Pretrained', PretrainedInit])
def test_a_pretrained_file_among_others_is_not_drawn_over(kind, tmp_path):
    source = randomize(build(start='released'))
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'vit.pth')
    drawn = dict(type='TruncNormal', layer='Linear', std=0.02)
    loaded = dict(type=kind, checkpoint=str(tmp_path / 'vit.pth'))
    for init_cfg in ([drawn, loaded], loaded):
        model = build(start='released', init_cfg=init_cfg)
        model.init_weights()
        for name in ('pos_embed', 'cls_token'):
            assert torch.equal(getattr(model, name), getattr(source, name))
    model = build(start='released', init_cfg=[drawn])
    model.init_weights()
    assert model.cls_token.abs().max() > 0


def test_a_class_token_behind_the_frozen_layers_learns():
    for layer, learns in ((0, False), (1, True), (2, True)):
        model = build(frozen_stages=1, cls_token_layer=layer).train()
        assert model.cls_token.requires_grad == learns
        assert not model.pos_embed.requires_grad


def test_pretrained_init_cfg_loads_a_file(tmp_path):
    source = randomize(VisionTransformer(**SMALL))
    state = {'backbone.' + k: v for k, v in source.state_dict().items()}
    torch.save({'state_dict': state}, tmp_path / 'vit.pth')
    init_cfg = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'vit.pth'), prefix='backbone.'
    )
    model = build(cls_token_layer=0, img_size=48, init_cfg=init_cfg)
    model.init_weights()
    want = expected_pos(source.pos_embed[:, 1:], (4, 4), (6, 6))
    torch.testing.assert_close(model.pos_embed[:, 1:], want)
    assert torch.equal(
        model.layers[0].attn.qkv.weight, source.layers[0].attn.qkv.weight
    )


def test_load_checkpoint_of_mmengine(tmp_path):
    source = randomize(build(img_size=64))
    torch.save({'state_dict': source.state_dict()}, tmp_path / 'spvit.pth')
    model = build()
    load_checkpoint(model, str(tmp_path / 'spvit.pth'), strict=True)
    torch.testing.assert_close(
        model.pos_embed, expected_pos(source.pos_embed, (8, 8), (4, 4))
    )


def test_outputs_at_the_training_size_survive_other_sizes():
    model = randomize(build(with_peg=True)).eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x)[0]
    for size in [(64, 16), (8, 80)]:
        model(torch.randn(1, 3, *size))
    assert torch.equal(model(x)[0], before)


# -------------------------------------------------------------- neutral start


def test_model_with_deits_init_cfg_starts_neutral(mmpretrain_scope):
    classifier = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='SPViT', **SMALL),
            head=dict(type='VisionTransformerClsHead', num_classes=3, in_channels=24),
            init_cfg=[dict(type='TruncNormal', layer='Linear', std=0.5)],
        )
    )
    classifier.init_weights()
    for layer in classifier.backbone.layers[:2]:
        assert isinstance(layer, SPViTLayer)
        assert layer.attn.prior((3, 4)).eq(1).all()


def released_start(model):
    """Every start of the released code's backbone, measured by kind of parameter."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.2), name
            assert module.weight.abs().max() < 0.15, name
            assert module.bias is None or module.bias.eq(0).all(), name
        elif isinstance(module, nn.Conv2d):
            # torch's nn.Conv2d: uniform within fan_in ** -0.5
            bound = module.weight[0].numel() ** -0.5
            assert module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(
                bound / 3**0.5, rel=0.2
            ), name
        elif isinstance(module, (nn.LayerNorm, _BatchNorm)):
            assert module.weight.eq(1).all(), name
            assert module.bias.eq(0).all(), name
    for name in ('cls_token', 'pos_embed'):
        assert getattr(model, name).std().item() == pytest.approx(0.02, rel=0.2), name
    for layer in model.layers[: model.num_spsa_layers]:
        assert layer.attn.prior((3, 4)).eq(1).all()


@pytest.mark.parametrize('in_a_classifier', [True, False])
def test_start_of_the_released_archs(in_a_classifier, mmpretrain_scope):
    arch = dict(SPViT.arch_zoo['spvit-small'], num_layers=2, num_heads=6)
    backbone = dict(type='SPViT', arch=arch, img_size=64, num_spsa_layers=1)
    if in_a_classifier:
        head = dict(type='VisionTransformerClsHead', num_classes=3, in_channels=384)
        # what mmpretrain's configs of ViTs say
        init_cfg = [
            dict(type='TruncNormal', layer='Linear', std=0.02),
            dict(type='Constant', layer='LayerNorm', val=1.0, bias=0.0),
        ]
        cfg = dict(
            type='ImageClassifier', backbone=backbone, head=head, init_cfg=init_cfg
        )
        model = MODELS.build(cfg)
    else:
        model = MODELS.build(backbone)
    model.init_weights()
    released_start(model.backbone if in_a_classifier else model)


def test_other_archs_start_as_mmpretrains():
    """Unless asked: the FFN with Xavier, the class token at 0."""
    arch = dict(embed_dims=96, num_layers=2, num_heads=3, feedforward_channels=384)
    model = build(arch=arch)
    model.init_weights()
    xavier = (2 / (96 + 384)) ** 0.5
    weight = model.layers[0].ffn.layers[1].weight
    assert weight.std().item() == pytest.approx(xavier, rel=0.1)
    assert model.cls_token.eq(0).all()
    model = build(arch=arch, start='released')
    model.init_weights()
    assert model.layers[0].ffn.layers[1].weight.std().item() == pytest.approx(
        0.02, rel=0.1
    )
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ('kwargs', 'error', 'message'),
    [
        (dict(arch='deit-huge'), AssertionError, 'not in default archs'),
        (dict(arch=dict(embed_dims=8)), AssertionError, 'needs a dict with keys'),
        (
            dict(arch=dict(ARCH, num_heads=5)),
            ValueError,
            'embed_dims=24 and num_heads=5',
        ),
        (dict(num_spsa_layers=5), ValueError, 'in 0..4'),
        (dict(num_spsa_layers=-1), ValueError, 'in 0..4'),
        (dict(num_spsa_layers=True), ValueError, 'in 0..4 .* got True'),
        (dict(cls_token_layer=True), ValueError, 'in 0..3, got True'),
        (dict(frozen_stages=True), ValueError, 'in -1..4 .* got True'),
        (dict(img_size=True), ValueError, '`img_size` .* got True'),
        (dict(out_indices=True), AssertionError, 'must by a sequence or int'),
        (dict(out_indices=[True]), AssertionError, 'Invalid out_indices True'),
        (dict(out_indices=['3']), AssertionError, "Invalid out_indices '3'"),
        (dict(attn_cfg='eager'), ValueError, "`attn_cfg` must be .* got 'eager'"),
        (dict(out_indices=4), AssertionError, 'Invalid out_indices 4'),
        (dict(out_indices=[-5]), AssertionError, 'Invalid out_indices -5'),
        (dict(out_indices='3'), AssertionError, 'must by a sequence or int'),
        (dict(out_type='tokens'), ValueError, 'Unsupported `out_type`'),
        (dict(with_cls_token=False), ValueError, 'with_cls_token must be True'),
        (dict(out_indices=0), ValueError, r'layers \[0\], but it joins before layer 2'),
        (dict(cls_token_layer=4), ValueError, 'in 0..3'),
        (
            dict(cls_token_layer=1, with_cls_token=False, out_type='featmap'),
            ValueError,
            'no class token to join',
        ),
        (dict(img_size=0), ValueError, '`img_size` must be a positive integer'),
        (dict(patch_size=(4, 0)), ValueError, '`patch_size` must be a positive'),
        (dict(skip_scale=0), ValueError, '`skip_scale` must be above 0'),
        (dict(drop_path_rate=1.5), ValueError, r'`drop_path_rate` .* in \[0, 1\)'),
        (dict(interpolate_mode='no'), ValueError, "'bilinear', 'bicubic'"),
        (dict(stem='convs'), ValueError, "'patch', 'conv' or the config"),
        (dict(share_prior='all'), ValueError, "'none', 'heads', 'network'"),
        (dict(pos_embed='sincos'), ValueError, "'learned' or None"),
        (dict(frozen_stages=5), ValueError, r'-1..4'),
        (dict(layer_cfgs=[{}]), ValueError, 'one for each of the 4 layers, got 1'),
        (dict(stem='conv', patch_size=7), ValueError, 'must be even'),
        (dict(stem=dict(type='NoStem')), ValueError, "'NoStem', which is not"),
        (dict(prior=dict(type='NoPrior')), ValueError, "'NoPrior', which is not"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        SPViT(**{**SMALL, **kwargs})


def test_freeze_all_but_priors():
    model = SPViT(
        arch='spvit-small',
        img_size=32,
        num_spsa_layers=2,
        freeze_all_but_priors=True,
        drop_path_rate=0.5,
    ).train()
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {
        n
        for n, _ in model.named_parameters()
        if n.startswith('layers.') and 'prior' in n
    }
    assert len(learning) > 0
    # Batch norm, stochastic depth and the like behave as in evaluation.
    x = torch.randn(2, 3, 32, 32)
    out = model(x)[0]
    loss_of(out).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.eval()(x)[0], out)

    shared = SPViT(
        arch='deit-tiny', img_size=32, share_prior='network', freeze_all_but_priors=True
    )
    learning = [n for n, p in shared.named_parameters() if p.requires_grad]
    assert learning
    assert all(n.startswith('prior.') for n in learning)


def test_freeze_all_but_priors_needs_a_prior():
    with pytest.raises(ValueError, match='no spatial prior'):
        SPViT(arch='deit-tiny', num_spsa_layers=0, freeze_all_but_priors=True)
    with pytest.raises(ValueError, match='exclude each other'):
        SPViT(arch='deit-tiny', frozen_stages=2, freeze_all_but_priors=True)

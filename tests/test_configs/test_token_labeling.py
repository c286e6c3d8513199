"""Token labeling has the paper's size; fine-tuning learns what its config says."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmpretrain.registry import MODELS

from .small import read, shrink

# REFERENCE: with both heads, 1000 classes, at 224 pixels.
PARAMETERS = {
    'spvit-small_8xb128-tokenlabel-300e_in1k': 26_234_468,
    'spvit-medium_8xb128-tokenlabel-300e_in1k': 55_969_440,
    'spvit-large_8xb100-tokenlabel-300e_in1k': 150_273_368,
}


def build_small(cfg):
    model = MODELS.build(shrink(cfg).model)
    model.init_weights()
    return model


@pytest.mark.parametrize(('name', 'expected'), PARAMETERS.items())
def test_parameters(name, expected, mmpretrain_scope):
    cfg = read(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_digits_and_their_label_maps_lie_in_one_folder():
    dataset = read('spvit-mini_1xb64-tokenlabel-20e_digits').train_dataloader.dataset
    assert dataset.dataset.data_prefix == 'data/digits/train'
    assert dataset.label_root == 'data/digits/token_labels'


def test_fine_tuning_resizes_the_position_embedding(mmpretrain_scope):
    small = read('spvit-small_8xb128-tokenlabel-300e_in1k')
    large = read('spvit-small_8xb32-tokenlabel-ft-30e_in1k-384px')
    source, target = build_small(small), build_small(large)
    torch.nn.init.normal_(source.backbone.pos_embed)
    target.load_state_dict(source.state_dict())
    assert target.backbone.pos_embed.shape[1] == 24 * 24
    assert target.backbone.pos_embed.std() > 0.5


FINE_TUNING = 'sp-deit-small_1xb64-ft-50e_custom'


def test_fine_tuning_decays_the_learning_rate_by_depth(mmpretrain_scope):
    cfg = read(FINE_TUNING)
    model = MODELS.build(cfg.model)
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    rates = {id(p): group['lr'] for group in groups for p in group['params']}

    def rate(name):
        return rates[id(model.get_parameter(name))]

    assert rate('head.layers.head.weight') == pytest.approx(5e-4)
    prior = [
        n for n, _ in model.named_parameters() if '.layers.3.' in n and 'prior' in n
    ]
    assert rate(prior[0]) == pytest.approx(rate('backbone.layers.3.attn.qkv.weight'))
    assert rate('backbone.layers.3.attn.qkv.weight') == pytest.approx(
        5e-4 * 0.75 ** (12 - 3)
    )


def test_fine_tuning_of_the_priors_alone(mmpretrain_scope):
    cfg = read(FINE_TUNING)
    cfg.merge_from_dict({'model.backbone.freeze_all_but_priors': True})
    model = build_small(cfg)
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    assert learning
    assert all('prior' in n or n.startswith('head.') for n in learning)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    in_optimizer = sum(
        p.numel()
        for group in wrapper.optimizer.param_groups
        for p in group['params']
        if p.requires_grad
    )
    assert in_optimizer == sum(model.get_parameter(n).numel() for n in learning)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    for _ in range(2):  # w2 starts at 0, so W1 learns from the second step on
        images = torch.randn(2, 3, 64, 96)
        loss = model.head(model.backbone(images)).pow(2).sum() + sum(
            model.head(model.backbone(images)).sum(1)
        )
        wrapper.update_params(loss)
    for name, param in model.named_parameters():
        if name not in learning:
            assert torch.equal(param, before[name]), name

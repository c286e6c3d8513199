"""Data-parallel training of SPViT in two processes (gloo, on the CPU)."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from spvit_mm.models import SPViT

from . import loss_of

ARCH = dict(embed_dims=12, num_layers=3, num_heads=2, feedforward_channels=24)
# patch stem and no drop path: the gradients must be those of the joined batch
PLAIN = dict(arch=ARCH, img_size=16, patch_size=4, share_prior='network', with_peg=True)
FULL = dict(
    arch=ARCH,
    img_size=16,
    patch_size=4,
    stem='conv',
    with_peg=True,
    skip_scale=2,
    drop_rate=0.1,
    drop_path_rate=0.3,
    with_cp=True,
)


def build(cfg):
    torch.manual_seed(0)
    model = SPViT(**cfg)
    model.init_weights()
    for name, param in model.named_parameters():
        if '.w2' in name:
            torch.nn.init.normal_(param, std=0.1)
    return model


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    images = torch.load(f'{folder}/images.pt')[rank * 4 : rank * 4 + 4]

    model = DistributedDataParallel(build(PLAIN), find_unused_parameters=False)
    loss_of(model(images)[0]).backward()
    grads = {n: p.grad for n, p in model.module.named_parameters()}

    model = DistributedDataParallel(build(FULL), find_unused_parameters=False)
    torch.manual_seed(rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model(images)[0]).backward()
        optimizer.step()
    weights = {n: p.detach() for n, p in model.module.named_parameters()}
    torch.save(dict(grads=grads, weights=weights), f'{folder}/rank{rank}.pt')
    dist.barrier()
    # gloo's threads have been seen to keep a process from ending.
    os._exit(0)


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ddp')
    images = torch.randn(8, 3, 16, 24)
    torch.save(images, folder / 'images.pt')
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return images, [torch.load(folder / f'rank{rank}.pt') for rank in range(2)]


def test_gradients_are_those_of_the_joined_batch(ranks):
    images, (first, second) = ranks
    model = build(PLAIN)
    loss_of(model(images)[0]).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(first['grads'][name], second['grads'][name])
        if param.requires_grad:
            torch.testing.assert_close(first['grads'][name], param.grad)


def test_both_ranks_end_with_equal_weights(ranks):
    first, second = (rank['weights'] for rank in ranks[1])
    start = dict(build(FULL).named_parameters())
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        if start[name].requires_grad:
            assert not torch.equal(weight, start[name]), name

"""Run by test_classifiers.py under torchrun: token labeling on two processes."""

import os
import os.path as osp
import sys

import numpy as np
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel

sys.path.insert(0, osp.dirname(osp.abspath(__file__)))
from test_classifiers import build, make_batch  # noqa: E402


def mean_over_ranks(value):
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()


def set_drop_path(model, rate):
    for module in model.modules():
        if hasattr(module, 'drop_prob'):
            module.drop_prob = rate


def freeze_batch_norm(model):
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()


def main():
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    rank = dist.get_rank()
    images, samples = make_batch(8)
    mine = slice(4 * rank, 4 * rank + 4)

    # All that is random off: the same as one process on the joined batch.
    joined = build(mix=0.0)
    freeze_batch_norm(joined)
    expected = joined.loss(images, samples)
    sum(expected.values()).backward()

    split = build(mix=0.0)
    freeze_batch_norm(split)
    parallel = MMDistributedDataParallel(split, broadcast_buffers=False)
    losses = parallel(images[mine], samples[mine], mode='loss')
    sum(losses.values()).backward()
    for name, value in losses.items():
        torch.testing.assert_close(mean_over_ranks(value), expected[name])
    for (name, param), other in zip(
        split.named_parameters(), joined.parameters(), strict=True
    ):
        torch.testing.assert_close(
            param.grad, other.grad, rtol=1e-4, atol=1e-5, msg=f'gradient of {name}'
        )
    if rank == 0:
        print('same loss and gradients', {k: float(v) for k, v in expected.items()})

    # All on, each process with its own random numbers: the weights stay equal.
    model = build(mix=1.0)
    set_drop_path(model, 0.3)
    parallel = MMDistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    np.random.seed(rank)
    torch.manual_seed(rank)
    before = model.head.aux_head.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        sum(parallel(images[mine], samples[mine], mode='loss').values()).backward()
        optimizer.step()
    assert not torch.equal(before, model.head.aux_head.weight)
    for name, param in model.named_parameters():
        both = [torch.empty_like(param) for _ in range(2)]
        dist.all_gather(both, param.detach())
        assert torch.equal(*both), f'{name} differs between the processes'
    if rank == 0:
        print('equal weights')
    dist.barrier()
    # gloo's threads have been seen to keep a process from ending.
    sys.stdout.flush()
    os._exit(0)


if __name__ == '__main__':
    main()

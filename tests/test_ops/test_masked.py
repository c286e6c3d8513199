import math

import numpy as np
import pytest
import torch

from spvit_mm.ops import spatial_prior_attention
from spvit_mm.ops.flex import make_block_mask, why_not_flex
from spvit_mm.ops.masked import masked_prior_attention

HEADS = 3
CASES = [((3, 4), 0), ((2, 3), 1), ((1, 5), 2), ((1, 1), 0)]


def inputs(hw, extra, dtype=torch.float64):
    length = extra + hw[0] * hw[1]
    q, k, v = (torch.randn(2, HEADS, length, 4, dtype=dtype) for _ in range(3))
    prior = torch.randn(HEADS, 2 * hw[0] - 1, 2 * hw[1] - 1, dtype=dtype)
    keep = torch.rand(prior.shape) < 0.4
    keep[:, hw[0] - 1, hw[1] - 1] = True
    return q, k, v, prior, keep


def naive(q, k, v, prior, keep, hw, extra):
    q, k, v, prior, keep = (t.numpy() for t in (q, k, v, prior, keep))
    out = np.zeros_like(v)
    for b, h, i in np.ndindex(*q.shape[:3]):
        weights = np.zeros(q.shape[2])
        for j in range(q.shape[2]):
            score = q[b, h, i] @ k[b, h, j] / math.sqrt(q.shape[-1])
            if i >= extra and j >= extra:
                p, r = i - extra, j - extra
                dy = r // hw[1] - p // hw[1] + hw[0] - 1
                dx = r % hw[1] - p % hw[1] + hw[1] - 1
                if not keep[h, dy, dx]:
                    continue
                score *= prior[h, dy, dx]
            weights[j] = math.exp(score)
        out[b, h, i] = weights / weights.sum() @ v[b, h]
    return out


@pytest.mark.parametrize(('hw', 'extra'), CASES)
def test_dense_mask_is_the_formula(hw, extra):
    args = inputs(hw, extra)
    out = masked_prior_attention(*args, hw, num_extra_tokens=extra, impl='dense')
    np.testing.assert_allclose(out.numpy(), naive(*args, hw, extra), rtol=1e-10)


@pytest.mark.parametrize(('hw', 'extra'), [((2, 3), 1), ((1, 3), 0)])
def test_gradients(hw, extra):
    q, k, v, prior, keep = inputs(hw, extra)
    given = [t.requires_grad_() for t in (q, k, v, prior)]
    assert torch.autograd.gradcheck(
        lambda *x: masked_prior_attention(*x, keep, hw, num_extra_tokens=extra),
        given,
        fast_mode=True,
    )


def test_keeping_everything_is_spsa():
    q, k, v, prior, keep = inputs((3, 4), 1)
    out = masked_prior_attention(
        q, k, v, prior, torch.ones_like(keep), (3, 4), num_extra_tokens=1
    )
    expected = spatial_prior_attention(q, k, v, prior, (3, 4), num_extra_tokens=1)
    torch.testing.assert_close(out, expected)


def _no_flex():
    q = torch.randn(1, 1, 4, 4)
    return why_not_flex(q, q, False, 0.0)


@pytest.mark.skipif(_no_flex() is not None, reason=str(_no_flex()))
@pytest.mark.parametrize(('hw', 'extra'), CASES[:3])
@pytest.mark.parametrize('heads', [1, HEADS])
@torch.no_grad()
def test_block_mask_is_the_dense_one(hw, extra, heads):
    q, k, v, prior, keep = inputs(hw, extra, torch.float32)
    args = (q, k, v, prior[:heads], keep[:heads], hw)
    dense = masked_prior_attention(*args, num_extra_tokens=extra, impl='dense')
    block = masked_prior_attention(*args, num_extra_tokens=extra, impl='block')
    torch.testing.assert_close(block, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(_no_flex() is not None, reason=str(_no_flex()))
def test_block_mask_leaves_out_whole_blocks():
    hw = (16, 32)  # blocks of 128 tokens are four rows
    keep = torch.zeros(1, 31, 63, dtype=torch.bool)
    keep[:, 15, :] = True  # the query's own row
    mask = make_block_mask(keep, hw)
    assert mask.sparsity() == pytest.approx(75)


def test_bad_arguments():
    q, k, v, prior, keep = inputs((2, 3), 0)
    with pytest.raises(ValueError, match="'auto', 'dense', 'block'"):
        masked_prior_attention(q, k, v, prior, keep, (2, 3), impl='sparse')
    with pytest.raises(ValueError, match='`keep` must have the shape'):
        masked_prior_attention(q, k, v, prior, keep[:, 1:], (2, 3))
    with pytest.raises(ValueError, match='keep the zero offset'):
        masked_prior_attention(q, k, v, prior, torch.zeros_like(keep), (2, 3))
    with pytest.raises(ValueError, match=r"impl='block' cannot run here"):
        masked_prior_attention(q, k, v, prior, keep, (2, 3), impl='block')

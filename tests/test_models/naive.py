"""The formulas of the paper, written pair by pair in float64."""

import math

import numpy as np


def mlp_prior(x, y, w1, b1, w2, b2):
    """f(r) = w2 . ReLU(W1 r + b1) + b2 of one head, for one offset (x, y)."""
    hidden = np.maximum(w1 @ np.array([x, y], dtype=np.float64) + b1, 0)
    return float(w2 @ hidden + b2)


def pair_prior(prior, hw, head):
    """Omega (N, N) of one head of an MLPSpatialPrior with one hidden layer."""
    height, width = hw
    n = height * width
    heads = prior.num_heads
    head = head if heads > 1 else 0
    w1 = prior.w1.detach().double().numpy().reshape(heads, -1, 2)[head]
    b1 = prior.b1.detach().double().numpy().reshape(heads, -1)[head]
    w2 = prior.w2.detach().double().numpy().reshape(heads, -1)[head]
    b2 = float(prior.b2.detach().double()[head])
    omega = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            dx, dy = j % width - i % width, j // width - i // width
            omega[i, j] = mlp_prior(dx, dy, w1, b1, w2, b2)
    return omega


def spsa(x, attn, hw, omegas):
    """SP-SA on tokens x (B, T, C), with a given Omega (N, N) for each head.

    The pairs of extra tokens in front take prior 1.
    """
    batch, length, dims = x.shape
    heads = attn.num_heads
    d = dims // heads
    extra = length - hw[0] * hw[1]
    weight = attn.qkv.weight.detach().double().numpy()
    bias = 0 if attn.qkv.bias is None else attn.qkv.bias.detach().double().numpy()
    out = np.zeros((batch, length, dims))
    for b in range(batch):
        qkv = x[b] @ weight.T + bias
        for h in range(heads):
            q, k, v = (
                qkv[:, part * dims + h * d : part * dims + (h + 1) * d]
                for part in range(3)
            )
            for i in range(length):
                scores = np.empty(length)
                for j in range(length):
                    score = q[i] @ k[j] / math.sqrt(d)
                    if i >= extra and j >= extra:
                        score *= omegas[h][i - extra, j - extra]
                    scores[j] = score
                a = np.exp(scores - scores.max())
                out[b, i, h * d : (h + 1) * d] = (a / a.sum()) @ v
    proj = attn.proj
    bias = 0 if proj.bias is None else proj.bias.detach().double().numpy()
    return out @ proj.weight.detach().double().numpy().T + bias

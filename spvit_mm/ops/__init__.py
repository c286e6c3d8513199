import torch, torch.nn.functional as F
def expand_prior(table, hw):
    H, W = hw
    return table.unfold(1, H, 1).unfold(2, W, 1).flip(1, 2).reshape(table.shape[0], H*W, H*W)
def spatial_prior_attention(q, k, v, prior, hw, *, scale=None, num_extra_tokens=0, dropout_p=0.0, attn_impl='auto'):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if prior is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale)
    e = num_extra_tokens
    omega = F.pad(expand_prior(prior, hw), (e, 0, e, 0), value=1.0)
    s = (q @ k.transpose(-2, -1)) * (omega * scale)
    a = s.softmax(-1)
    if dropout_p: a = F.dropout(a, dropout_p)
    return (a.to(v.dtype) @ v).to(q.dtype)

"""Attention with its logsumexp through torch's fused kernels.

torch's public attention returns no logsumexp. Its operation for the CPU does, and so serves there; elsewhere, and where that
operation is missing or does not take the call, a key is added for the logsumexp to be read from.
"""

import torch
import torch.nn.functional as F

_UNIT = 256.0  # in place of 1 in the added channel: small weights then do not underflow in half precision
_CPU = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def attention_and_logsumexp(q, k, v, bias, scale):
    """softmax(scale * q k^T + bias) v of rows `[R, D]`, in q's dtype, and the logits' logsumexp, fp32 `[R]`.

    bias: fp32 `[keys]` or None. With no key, zero and -inf.
    """
    if len(k) == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:1], -torch.inf, dtype=torch.float32)
    mask = None if bias is None else bias.to(q.dtype).expand(1, 1, len(q), len(k))
    if q.is_cpu and _CPU is not None and all(x.stride(-1) == 1 for x in (q, k, v)):
        out, logsumexp = _CPU(q[None, None], k[None, None], v[None, None], 0.0, False, attn_mask=mask, scale=scale)
        return out[0, 0], logsumexp.view(-1).float()
    if q.dtype == torch.float16:  # the added key's weight can underflow
        out, logsumexp = by_an_added_key(*(x.float() for x in (q, k, v)), bias, scale)
        return out.to(q.dtype), logsumexp
    return by_an_added_key(q, k, v, bias, scale)


def by_an_added_key(q, k, v, bias, scale):
    """The same from public attention alone.

    One key more, of value zero, and one channel more in the values, 1 at that key and 0 at all others: the answer's last channel
    is the added key's softmax weight w. With its logit l, exp(logsumexp) = exp(l) (1 - w) / w. The key is the keys' mean and
    gets log(number of keys) on top: then l is the logsumexp or less (Jensen), and w keeps its digits at any size of the logits.
    """
    count, d = k.shape
    mean = k.float().mean(0).to(k.dtype)
    log_count = q.new_tensor(count).log()
    added_logit = scale * (q.float() @ mean.float()) + log_count.float()
    padding = -(d + 1) % 8 + 1  # fused kernels want a multiple of eight
    added = F.pad(v.new_full((1, 1), _UNIT), (d, padding - 1))
    k, v = F.pad(torch.cat([k, mean[None]]), (0, padding)), torch.cat([F.pad(v, (0, padding)), added])
    mask = q.new_zeros(count + 1) if bias is None else F.pad(bias.to(q.dtype), (0, 1))
    mask[-1] = log_count
    out = F.scaled_dot_product_attention(
        F.pad(q, (0, padding))[None, None], k[None, None], v[None, None], attn_mask=mask.expand(1, 1, len(q), -1), scale=scale
    )[0, 0].float()
    share = out[:, d] / _UNIT
    remainder = (1 - share).clamp_min(torch.finfo(torch.float32).tiny)
    logsumexp = added_logit + remainder.log() - share.clamp_min(torch.finfo(torch.float32).tiny).log()
    return (out[:, :d] / remainder[:, None]).to(q.dtype), logsumexp

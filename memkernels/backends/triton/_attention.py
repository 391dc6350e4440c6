"""What the attention kernels share: which keys a query sees, dropout, and the host's view of a call."""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import precision, refuse, tanh

MASK_STRIDES = ("mask_stride_b", "mask_stride_h", "mask_stride_q", "mask_stride_k")


@triton.jit
def entry(lengths_ptr, b, K, low, high, pull):
    """(keys, low, high) of batch entry b. `pull`: 1 where the last query stands at the last key of its entry, else 0."""
    if lengths_ptr is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), K)
        low += (length - K) * pull
        high += (length - K) * pull
        K = length
    return K, low, high


@triton.jit
def capped(logit, softcap):
    """softcap tanh(logit / softcap), and its slope: not 1 - tanh^2, which keeps few digits of a GPU's own exponential and division."""
    bent = logit / softcap
    e = tl.exp(-2 * tl.abs(bent))
    return softcap * tanh(bent, False), 4 * e / ((1 + e) * (1 + e))


@triton.jit
def join_sink(sink_ptr, head, top, total):
    """The sink of a head joins the softmax of its rows: (maximum, sum, what older sums must be multiplied by)."""
    sink = tl.load(sink_ptr + head).to(tl.float32)
    new_top = tl.maximum(top, sink)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp(top - shift)
    return new_top, total * shrink + tl.exp(sink - shift), shrink


@triton.jit
def masked(logit, i, k, mask_ptr, mask_stride_q, mask_stride_k, Q, K, low, high, WINDOWED: tl.constexpr):
    """Scores with the float mask added, -inf where query i does not see key k (one of the two is a row, one a column)."""
    seen = (i < Q) & (k < K)
    if WINDOWED:
        seen = seen & (k - i >= low) & (k - i <= high)
    if mask_ptr is not None:
        mask = tl.load(mask_ptr + i * mask_stride_q + k * mask_stride_k, mask=seen, other=0)
        if mask.dtype == tl.int1:
            seen = seen & (mask != 0)
        else:
            mask = mask.to(tl.float32)
            seen = seen & (mask != float("-inf"))
            logit += mask
    return tl.where(seen, logit, float("-inf"))


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def dropout(seed, head, i, k, threshold, inverse):
    """0 or 1 / (1 - p) for each weight: the hash of backends/reference/_dropout.py."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a = _mix(_mix(low + i.to(tl.uint32) * 0x9E3779B9) + head.to(tl.uint32) * 0x9E3779B9)
    c = _mix(a ^ high)
    x = a + k.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = x ^ c
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = x ^ (x >> 16)
    return tl.where(x >= tl.cast(threshold, tl.int64).to(tl.uint32), inverse, 0.0)


def supports(query, key, value, attn_mask, sink, lengths_k, seed, scale, softcap, dropout_p, left, right, causal):
    width = max(query.shape[3], value.shape[3])
    if width > _launch.MAX_WIDTH:
        return f"a head of {width} elements is over the limit of {_launch.MAX_WIDTH}"
    return refuse(query)


def mask_arguments(attn_mask, batch):
    """(batch entries that share a mask entry, strides with 0 where the mask broadcasts)."""
    if attn_mask is None:
        return 1, 0, 0, 0, 0
    strides = (0 if size == 1 else stride for size, stride in zip(attn_mask.shape, attn_mask.stride(), strict=True))
    return max(batch // max(attn_mask.shape[0], 1), 1), *strides


def limits(queries, keys, left, right, causal):
    """Key minus query is between these two: the window, or what can occur anyway."""
    offset = keys - queries if causal == "bottom-right" else 0
    return (offset - left if left >= 0 else -queries), (offset + right if right >= 0 else keys)


def pull(causal):
    """See entry()."""
    return int(causal == "bottom-right")


def contiguous(tensor):
    """Of the few numbers of a sink or of lengths."""
    return None if tensor is None else tensor.contiguous()


def dropout_arguments(dropout_p):
    """(threshold of the hash, factor of what is kept); with p = 1 everything is kept and multiplied by 0."""
    return (0, 0.0) if dropout_p >= 1 else (int(dropout_p * 2**32), 1 / (1 - dropout_p))


def tiles(launch, dtype, left, right, softcap):
    return dict(
        CAPPED=softcap > 0, WINDOWED=left >= 0 or right >= 0,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_D=launch.block_d, BLOCK_V=launch.block_v,
        PRECISION="ieee" if precision(dtype) == "tf32x3" else precision(dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip

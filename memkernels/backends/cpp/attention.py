"""attention on the CPU (csrc/cpu/attention.cpp)."""

from memkernels._C import attention as _forward
from memkernels._C import attention_backward as _backward
from memkernels._C import inner_contiguous


def supports(query, key, value, attn_mask, seed, scale, dropout_p, left, right, causal):
    return None


def forward(out, lse, query, key, value, attn_mask, seed, *options):
    _forward(out, lse, *inner_contiguous(query, key, value, attn_mask), seed, *_numbers(query, key, *options))


def backward(dquery, dkey, dvalue, dattn_mask, dout, dlse, query, key, value, attn_mask, seed, out, lse, *options):
    tensors = inner_contiguous(dout, query, key, value, attn_mask, out)
    dout, inputs, out = tensors[0], tensors[1:-1], tensors[-1]
    _backward(dquery, dkey, dvalue, dattn_mask, dout, dlse, *inputs, seed, out, lse, *_numbers(query, key, *options))


def _numbers(query, key, scale, dropout_p, left, right, causal):
    """The options as the kernels take them: the corner becomes the key at which query 0 stands."""
    return scale, dropout_p, left, right, key.shape[2] - query.shape[2] if causal == "bottom-right" else 0

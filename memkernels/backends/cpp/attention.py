"""attention on the CPU (csrc/cpu/attention.cpp)."""

from memkernels._C import attention as _forward
from memkernels._C import attention_backward as _backward


def supports(query, key, value, attn_mask, seed, scale, dropout_p, left, right, causal):
    return None


def forward(out, lse, stats, query, key, value, attn_mask, seed, scale, dropout_p, left, right, causal):
    shift = 0 if causal == "top-left" else _shift(query, key)
    _forward(out, lse, stats, query, key, value, attn_mask, seed, scale, dropout_p, left, right, shift)


def backward(dquery, dkey, dvalue, dattn_mask, dout, dlse, query, key, value, *rest):
    *others, causal = rest  # attn_mask, seed, out, stats, scale, dropout_p, left, right
    shift = 0 if causal == "top-left" else _shift(query, key)
    _backward(dquery, dkey, dvalue, dattn_mask, dout, dlse, query, key, value, *others, shift)


def _shift(query, key):
    """The key at which query 0 stands if the last query stands at the last key."""
    return key.shape[2] - query.shape[2]

"""attention on the CPU (csrc/cpu/attention.cpp)."""

from memkernels._C import attention as _forward
from memkernels._C import attention_backward as _backward


def supports(query, key, value, attn_mask, sink, lengths_k, seed, scale, softcap, dropout_p, left, right, causal):
    return None


def forward(
    out, lse, stats, query, key, value, attn_mask, sink, lengths_k, seed, scale, softcap, dropout_p, left, right, causal
):  # fmt: skip
    at_end = causal == "bottom-right"
    _forward(out, lse, stats, query, key, value, attn_mask, sink, lengths_k, seed, scale, softcap, dropout_p, left, right, at_end)


def backward(
    dquery, dkey, dvalue, dattn_mask, dsink, dout, dlse, query, key, value, attn_mask, sink, lengths_k, seed, out, stats, scale, softcap,
    dropout_p, left, right, causal,
):  # fmt: skip
    _backward(
        dquery, dkey, dvalue, dattn_mask, dsink, dout, dlse, query, key, value, attn_mask, sink, lengths_k, seed, out, stats, scale,
        softcap, dropout_p, left, right, causal == "bottom-right",
    )  # fmt: skip

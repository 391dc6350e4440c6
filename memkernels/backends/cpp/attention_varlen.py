"""attention_varlen on the CPU (csrc/cpu/attention_varlen.cpp)."""

from memkernels._C import attention_varlen as _forward
from memkernels._C import attention_varlen_backward as _backward


def supports(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal):
    return None


def forward(out, lse, stats, query, key, value, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal):
    _forward(out, lse, stats, query, key, value, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal == "bottom-right")


def backward(dquery, dkey, dvalue, dout, dlse, query, key, value, *rest):
    *others, causal = rest  # cu_seqlens_q, cu_seqlens_k, out, stats, scale, softcap, left, right
    _backward(dquery, dkey, dvalue, dout, dlse, query, key, value, *others, causal == "bottom-right")

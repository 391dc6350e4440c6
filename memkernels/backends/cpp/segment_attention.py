"""segment_attention on the CPU (csrc/cpu/segment_attention.cpp)."""

from memkernels._C import segment_attention as _forward
from memkernels._C import segment_attention_backward as _backward


def supports(query, key, value, ptr, index, edge_bias, scale, saving):
    return None


def forward(out, lse, stats, exact, query, key, value, ptr, index, edge_bias, scale, saving):
    _forward(out, lse, stats, exact, query, key, value, ptr, index, edge_bias, scale)


def backward(*arguments):
    _backward(*arguments[:-1])  # the last one, `saving`, is about forward

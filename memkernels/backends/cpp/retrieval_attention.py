"""retrieval_attention on the CPU (csrc/cpu/retrieval_attention.cpp)."""

from memkernels._C import retrieval_attention as forward
from memkernels._C import retrieval_attention_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(query, key, value, memory_key, memory_value, index, memory_bias, scale, left, right):
    return None

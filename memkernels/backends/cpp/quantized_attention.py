"""quantized_attention on the CPU (csrc/cpu/quantized_attention.cpp)."""

from memkernels._C import quantized_attention as forward
from memkernels._C import quantized_attention_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(query, key, value, key_scale, value_scale, lengths_k, scale):
    return None

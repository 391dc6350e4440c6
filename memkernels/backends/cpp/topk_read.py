"""topk_read on the CPU (csrc/cpu/topk_read.cpp)."""

from memkernels._C import topk_read as forward
from memkernels._C import topk_read_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(query, key, value, mask, k, similarity, scale, few):
    return None

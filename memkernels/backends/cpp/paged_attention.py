"""paged_attention on the CPU (csrc/cpu/paged_attention.cpp)."""

from memkernels._C import paged_attention as forward
from memkernels._C import paged_attention_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(query, key_pages, value_pages, page_table, lengths, scale, is_causal):
    return None

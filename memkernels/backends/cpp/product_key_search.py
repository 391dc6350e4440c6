"""product_key_search on the CPU (csrc/cpu/product_key_search.cpp)."""

from memkernels._C import product_key_search as forward
from memkernels._C import product_key_search_backward as backward

__all__ = ["backward", "forward", "supports"]

MOST = 65535  # subkeys whose pairs 32 bits number


def supports(query, subkeys, k):
    return f"{subkeys.shape[2]} subkeys are over the limit of {MOST}" if subkeys.shape[2] > MOST else None

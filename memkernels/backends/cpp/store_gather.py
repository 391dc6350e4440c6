"""store_gather on the CPU (csrc/cpu/store_rows.cpp)."""

from memkernels._C import store_gather as forward

__all__ = ["forward", "supports"]


def supports(chunks, firsts, rows):
    return None

"""store_scatter_ on the CPU (csrc/cpu/store_rows.cpp)."""

from memkernels._C import store_scatter_ as forward

__all__ = ["forward", "supports"]


def supports(chunks, firsts, rows, values):
    return None

"""store_items on the CPU (csrc/cpu/store_table.cpp)."""

from memkernels._C import store_items as forward

__all__ = ["forward", "supports"]


def supports(table, begin, end):
    return None

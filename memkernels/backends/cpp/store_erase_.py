"""store_erase_ on the CPU (csrc/cpu/store_table.cpp)."""

from memkernels._C import store_erase_ as forward

__all__ = ["forward", "supports"]


def supports(table, keys, spans, arena, data, offsets, second):
    return None

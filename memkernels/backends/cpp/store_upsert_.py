"""store_upsert_ on the CPU (csrc/cpu/store_table.cpp)."""

from memkernels._C import store_upsert_ as forward

__all__ = ["forward", "supports"]


def supports(table, keys, rows, mode, spans, arena, data, offsets, second):
    return None

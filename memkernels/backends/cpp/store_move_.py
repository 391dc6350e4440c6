"""store_move_ on the CPU (csrc/cpu/store_move.cpp)."""

from memkernels._C import store_move_ as forward

__all__ = ["forward", "supports"]


def supports(old, table, begin, end):
    return None

"""usage on the CPU (csrc/cpu/usage.cpp)."""

from memkernels._C import usage as forward
from memkernels._C import usage_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(usage, write_weights, read_weights, free_gate):
    return None

"""location_address on the CPU (csrc/cpu/location_address.cpp)."""

from memkernels._C import location_address as forward
from memkernels._C import location_address_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(content, previous, gate, shift, sharpen):
    return None

"""memory_read in plain torch: read = weights @ memory."""

from memkernels.backends.reference._math import compute


def forward(memory, weights):
    return ((compute(weights) @ compute(memory)).to(memory.dtype),)


def backward(dread, memory, weights):
    dtype, dread, memory, weights = memory.dtype, compute(dread), compute(memory), compute(weights)
    return (weights.mT @ dread).to(dtype), (dread @ memory.mT).to(dtype)

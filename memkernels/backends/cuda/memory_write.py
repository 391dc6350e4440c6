"""memory_write on CUDA devices (csrc/cuda/memory_write.cu)."""

from memkernels import _C_cuda
from memkernels.backends._layout import inner_contiguous
from memkernels.backends.cuda import refuse_device, scratch


def supports(memory, weights, erase, add):
    return refuse_device(memory.device)


def forward(written, memory, weights, erase, add):
    # memory_write_ passes the memory itself as the output; the kernel writes contiguous tensors.
    target = written if written.is_contiguous() else written.new_empty(written.shape)
    _C_cuda.memory_write(target, inner_contiguous(memory), weights, inner_contiguous(erase), inner_contiguous(add))
    if target is not written:
        written.copy_(target)


def backward(dmemory, dweights, derase, dadd, dwritten, memory, weights, erase, add):
    sums = None
    if derase is not None or dadd is not None:
        b, n, w = memory.shape
        sums = scratch(_C_cuda.memory_write_scratch(b, n, w, weights.shape[1]), memory)
    inputs = (inner_contiguous(dwritten), inner_contiguous(memory), weights, inner_contiguous(erase), inner_contiguous(add))
    _C_cuda.memory_write_backward(dmemory, dweights, derase, dadd, *inputs, sums)

"""Broken backends of real ops: each is the reference with one bug that kernels really have had. test_harness.py says what catches it."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from cases import Case

from memkernels import _backends, _registry
from memkernels.testing import specs

PARENT = os.getpid()
SHARED = {"scratch": torch.zeros(0)}
LEAKED = []


def case_of(sample="typical", dtype=torch.float32, op="memory_read", backend="cpp"):
    return Case(specs()[op], backend, dtype, specs()[op].sample(sample))


def aligned(args):
    """In memory of their own: torch's products see where their operands lie, where MKL's do (AMD)."""
    return [t.clone() if isinstance(t, torch.Tensor) else t for t in args]


class Sound:
    """The reference behind the interface of a kernel backend: outputs passed in, every element written."""

    def __init__(self, op: str):
        self.op, self.reference = _registry.OPS[op], _backends.reference(op)

    def supports(self, *args):
        return None

    def forward(self, *args):
        n = len(self.op.outputs)
        self.store(args[:n], self.reference.forward(*aligned(args[n:])))

    def backward(self, *args):
        n = len(self.op.differentiable)
        self.store(args[:n], self.reference.backward(*aligned(args[n:])))

    def store(self, places, values):
        for place, value in zip(places, values):
            if place is not None:
                place.copy_(value)


def as_contiguous(t):
    """The memory of `t` read as if it were contiguous: the next elements, whatever they are, NaN beyond the end."""
    storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())[t.storage_offset() :]
    beyond = torch.full((max(t.numel() - storage.numel(), 0),), float("nan"), dtype=t.dtype)
    return torch.cat([storage, beyond])[: t.numel()].reshape(t.shape)


class IgnoresGradientStride(Sound):
    def backward(self, dmemory, dweights, dread, memory, weights):
        super().backward(dmemory, dweights, as_contiguous(dread), memory, weights)


class IgnoresInputStride(Sound):
    def forward(self, read, memory, weights):
        super().forward(read, as_contiguous(memory), weights)


class DropsTail(Sound):
    def forward(self, read, memory, weights):
        n = memory.shape[1] // 4 * 4
        super().forward(read, memory[:, :n], weights[:, :, :n])


class ReadsPastTheEnd(Sound):
    def forward(self, read, memory, weights):
        ctypes.string_at(memory.data_ptr() + memory.numel() * memory.element_size(), 32)
        super().forward(read, memory, weights)


class Offset32(Sound):
    def forward(self, read, memory, weights):
        flat = memory.as_strided((memory.untyped_storage().nbytes() // memory.element_size(),), (1,), 0)
        rows = [memory.storage_offset() + (b * memory.stride(0)) % 2**31 for b in range(memory.shape[0])]
        inner = memory.stride()[1:]
        wrapped = [flat.as_strided(memory.shape[1:], inner, offset) for offset in rows]
        super().forward(read, torch.stack(wrapped), weights)


class NoZeroInit(Sound):
    def backward(self, dmemory, dweights, dread, memory, weights):
        right = self.reference.backward(dread, memory, weights)
        if dmemory is not None:
            dmemory += right[0]
        self.store((dweights,), right[1:])


class ForgetsEmptyReduction(Sound):
    def forward(self, read, memory, weights):
        if memory.shape[1]:
            super().forward(read, memory, weights)


class Races(Sound):
    def forward(self, read, memory, weights):
        order = torch.randperm(memory.shape[1])
        super().forward(read, memory[:, order].cumsum(1)[:, -1:], torch.ones_like(weights[:, :, :1])) if memory.shape[1] else None
        super().forward(read, memory[:, order], weights[:, :, order])


class DependsOnThreads(Sound):
    def forward(self, read, memory, weights):
        parts = [w @ m for w, m in zip(weights.chunk(torch.get_num_threads(), -1), memory.chunk(torch.get_num_threads(), 1))]
        read.copy_(sum(parts[1:], parts[0]))


class DependsOnBatch(Sound):
    def forward(self, read, memory, weights):
        half = memory.shape[1] // 2 if memory.shape[0] > 2 else 0
        read.copy_(weights[:, :, :half] @ memory[:, :half] + weights[:, :, half:] @ memory[:, half:])


class LeaksRows(Sound):
    def forward(self, read, memory, weights):
        super().forward(read, memory, weights)
        read += 0 * memory.sum()


class IgnoresMask(Sound):
    def forward(self, *args):
        at = len(self.op.outputs) + [a.name for a in self.op.inputs].index("mask")
        super().forward(*args[:at], None, *args[at + 1 :])


class HalfSums(Sound):
    def forward(self, read, memory, weights):
        total = torch.zeros_like(read)
        for n in range(memory.shape[1]):
            total = total + weights[:, :, n, None] * memory[:, n, None]
        read.copy_(total)


class WritesItsInput(Sound):
    def forward(self, read, memory, weights):
        super().forward(read, memory, weights)
        weights.mul_(0.5)


class WritesTheGradient(Sound):
    def backward(self, dmemory, dweights, dread, memory, weights):
        super().backward(dmemory, dweights, dread, memory, weights)
        dread.mul_(0.5)


class NeedsBothGradients(Sound):
    def backward(self, dmemory, dweights, dread, memory, weights):
        super().backward(dmemory, dweights, dread, memory, weights)
        if dmemory is None and dweights is not None:
            dweights.zero_()


class ScalesByTheFirst(Sound):
    """Reads only the first element of the gradient: right for ones."""

    def backward(self, dmemory, dweights, dread, memory, weights):
        first = dread.reshape(-1)[:1].reshape(()).expand(dread.shape) if dread.numel() else dread
        super().backward(dmemory, dweights, first, memory, weights)


class KeepsOutputs(Sound):
    def forward(self, read, memory, weights):
        super().forward(read, memory, weights)
        LEAKED.append(read)


class HangsAfterFork(Sound):
    def forward(self, read, memory, weights):
        while os.getpid() != PARENT:
            time.sleep(1)
        super().forward(read, memory, weights)


class SharesScratch(Sound):
    def forward(self, read, memory, weights):
        SHARED["scratch"] = weights @ memory
        time.sleep(1e-4 if threading.current_thread() is not threading.main_thread() else 0)
        read.copy_(SHARED["scratch"])


@contextmanager
def planted(module: Sound) -> Iterator[None]:
    """Inside, `module` is the C++ backend of its op."""
    kernel = _backends.kernel

    def with_planted(name, op):
        return module if (name, op) == ("cpp", module.op.name) else kernel(name, op)

    with mock.patch.object(_backends, "kernel", with_planted):
        yield


@contextmanager
def output_is_an_input(op: str) -> Iterator[None]:
    """The first output is the first input."""
    declared = _registry.OPS[op]
    with mock.patch.object(declared, "allocate", lambda *args: (args[0],)):
        yield


@contextmanager
def wrong_strides(op: str) -> Iterator[None]:
    """The real output is transposed in memory; the fake one is contiguous."""
    declared = _registry.OPS[op]
    allocate = declared.allocate

    def transposed(*args):
        return tuple(t if type(t) is not torch.Tensor or t.is_meta else t.mT.contiguous().mT for t in allocate(*args))

    with mock.patch.object(declared, "allocate", transposed):
        yield


@contextmanager
def reference_backward(op: str, change) -> Iterator[None]:
    """The reference's gradients, changed."""
    module = _backends.reference(op)
    backward = module.backward
    with mock.patch.object(module, "backward", lambda *args: tuple(change(g) for g in backward(*args))):
        yield


@contextmanager
def rolled_vmap(op: str) -> Iterator[None]:
    """vmap gives the results of the mapped calls in another order."""
    function = _registry.OPS[op].function
    rule = function.vmap

    def rolled(*args):
        outputs, dims = rule(*args)
        return (
            (outputs.roll(1, dims), dims)
            if isinstance(outputs, torch.Tensor)
            else (tuple(t.roll(1, d) for t, d in zip(outputs, dims)), dims)
        )

    with mock.patch.object(function, "vmap", staticmethod(rolled)):
        yield

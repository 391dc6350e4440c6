"""Tensors that end, or start, at a page nobody may touch: one element read or written too far ends the process."""

from __future__ import annotations

import ctypes
import mmap

import checks
import fuzz
import torch
from cases import Case, select
from flat import backward_arguments, flat_call

from memkernels import _backends
from memkernels.testing import compare, inputs, specs
from memkernels.testing.spec import Tensors

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(t: torch.Tensor, side: str) -> torch.Tensor:
    """A copy of `t` with its strides, whose last byte (side "end") or first byte ("start") borders on a forbidden page."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) if t.numel() else 0
    size = extent * t.element_size()
    if not size:
        return t.clone()
    pages = -(-size // PAGE) + 2
    block = mmap.mmap(-1, pages * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    for page in (0, pages - 1):
        if libc.mprotect(address + page * PAGE, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(block, dtype=torch.uint8, count=size, offset=(pages - 1) * PAGE - size if side == "end" else PAGE).view(t.dtype)
    view = flat.as_strided(t.shape, t.stride())
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())  # torch refuses to write an element twice
    view[once].copy_(t[once])
    return view


def check_guarded(case: Case, side: str, given: Tensors | None = None, module=None) -> None:
    """The kernels of one backend, forward and backward, stay inside every tensor they are given, and write all of each output."""
    op, args = flat_call(case, case.inputs() if given is None else given)
    module = module or _backends.kernel(case.backend.partition(":")[0], op.name)
    near = [guarded(a.detach(), side) if isinstance(a, torch.Tensor) else a for a in args]
    plain = op.allocate(*args)
    outputs = [t if t is None else guarded(inputs.garbage(t, t.shape), side) for t in plain]
    with compare.using(case.backend):
        module.forward(*plain, *args)
        module.forward(*outputs, *near)
        for i, (a, b) in enumerate(zip(outputs, plain)):
            assert a is None or checks.same_bits(a, b), f"output {i} differs next to a page border"
        *flat, needs = backward_arguments(op, args, plain)
        upstream = [g if g is None else guarded(g, side) for g in flat[: op.end_douts]]
        gradients = [
            [
                torch.empty_like(args[i], memory_format=torch.contiguous_format) if need else None
                for i, need in zip(op.differentiable, needs)
            ]
        ]
        gradients.append([None if g is None else guarded(inputs.garbage(g, g.shape), side) for g in gradients[0]])
        module.backward(*gradients[0], *flat)
        module.backward(*gradients[1], *upstream, *near[: len(op.inputs)], *(outputs[i] for i in op.saved_outputs), *args[len(op.inputs) :])
    for i, (a, b) in enumerate(zip(*gradients)):
        assert a is None or checks.same_bits(a, b), f"gradient {i} differs next to a page border"


def run_all(backend: str, thorough: bool) -> int:
    """Every case of one backend label; the name of each is printed before it runs, so that the last line of a crash names it."""
    count = 0
    for parameter in select(levels="all", kernels_only=True, empty=thorough):
        case = parameter.values[0]
        if case.backend != backend or case.device != "cpu":
            continue
        strided = ("inner_stride", "transposed", "expanded") if thorough else ("inner_stride",) if case.dtype == torch.float32 else ()
        for layout in ("contiguous", *strided):
            for side in ("end", "start"):
                print(case, layout, side, flush=True)
                check_guarded(case, side, case.inputs(layout))
                count += 1
    print("done", count)
    return count


def run_drawn(op: str, examples: int, seed: int, backends: tuple[tuple[str, str], ...]) -> None:
    """Drawn calls, next to forbidden pages; each is printed before it runs."""

    def check(call: fuzz.Call) -> bool:
        given = fuzz.runnable(call)
        if given is None:
            return False
        print(call, flush=True)
        for side in ("end", "start"):
            check_guarded(call.case, side, given)
        return True

    fuzz.run(specs()[op], examples, seed, backends, wider=True, check=check)
    print("done")

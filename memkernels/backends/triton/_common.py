"""What the Triton kernels share: device functions, launching, reasons to refuse, and signatures for ahead-of-time compilation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from memkernels import _config
from memkernels.backends.triton._launch import Device, ceil_div

INTERPRETED = _config.triton_interpret()  # Triton reads the same switch when a kernel is defined

INTERPRET = tl.constexpr(INTERPRETED)


def device(function: Any) -> Any:
    """triton.jit for a function that kernels call; the interpreter would patch all of triton.language anew for every such call."""
    made = triton.jit(function)
    return (lambda *args, **kwargs: made.rewrite()(*args, **kwargs)) if INTERPRETED else made


@device
def lanes(size: tl.constexpr):
    """0 .. size-1 in int64: offsets beyond 2^31 elements must not wrap."""
    return tl.arange(0, size).to(tl.int64)


@device
def tanh(x, ROUNDED: tl.constexpr = True):
    """By one exponential, which the interpreter has too; exact limits at both ends, error 2 ulp around zero.

    ROUNDED: by an exact division; a GPU's own is off by up to 2 ulp, which float32 gates would show. It takes registers that a kernel which
    holds more than gates does not have.
    """
    e = tl.exp(-2 * tl.abs(x))
    if ROUNDED:
        large = tl.math.div_rn(1 - e, 1 + e)
    else:
        large = (1 - e) / (1 + e)
    square = x * x
    small = tl.abs(x) * (1 + square * (-0.33333333 + square * (0.13333333 + square * (-0.05396825 + square * 0.02186949))))
    magnitude = tl.where(tl.abs(x) < 0.25, small, large)
    return tl.where(x < 0, -magnitude, magnitude)


@device
def sigmoid(x, ROUNDED: tl.constexpr = True):
    """ROUNDED as in tanh."""
    e = tl.exp(-tl.abs(x))
    if ROUNDED:
        return tl.math.div_rn(tl.where(x < 0, e, 1.0), 1 + e)
    else:
        return tl.where(x < 0, e, 1.0) / (1 + e)


@device
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a @ b in float32: of two equal 16-bit tiles at their own speed, else widened (the interpreter has no right bfloat16 dot)."""
    if a.dtype == b.dtype and not INTERPRET:
        return tl.dot(a, b, total, input_precision=PRECISION)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)


@device
def rounded(value, dtype: tl.constexpr):
    """float32 to the nearest value of a dtype; the interpreter would cut bfloat16 off."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            value = value.to(tl.float32)
            bits = value.to(tl.uint32, bitcast=True)
            nearest = ((bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000).to(tl.float32, bitcast=True)
            value = tl.where(value == value, nearest, value)
    return value.to(dtype)


@device
def store(ptr, value, mask=None):
    tl.store(ptr, rounded(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_splits_kernel(out_ptr, part_ptr, items, splits, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = sum over s of part[s, i], in an order that depends on nothing but the number of splits."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + lanes(BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + lanes(BLOCK_S)
        tile = (s < splits)[:, None] & (item < items)[None, :]
        total += tl.sum(tl.load(part_ptr + s[:, None] * items + item[None, :], mask=tile, other=0.0), 0)
    store(out_ptr + item, total, mask=item < items)


def sum_splits(out: torch.Tensor, part: torch.Tensor) -> None:
    """out = part.sum(0) for a contiguous out."""
    items = out.numel()
    run(sum_splits_kernel, (ceil_div(items, 128),), out, part, items, part.shape[0], BLOCK_S=32, BLOCK=128, num_warps=4)


# No contraction, as in the C++ kernels: where forward subtracts the maximum from a rounded product and backward fuses the two, they do not
# have the same weights. Dots are fused as before.
OPTIONS = {"enable_fp_fusion": False}


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch on the device of the tensors; an empty grid is nothing to do."""
    if 0 in grid:
        return
    device = next(a for a in args if isinstance(a, torch.Tensor)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options, **OPTIONS)
    else:
        kernel[grid](*args, **options, **OPTIONS)


def refuse(tensor: torch.Tensor) -> str | None:
    """Why no kernel here takes this tensor, or None."""
    if tensor.dtype == torch.float64:
        return "float64 is not supported"
    if tensor.device.type != "cuda" and not INTERPRETED:
        return "no CUDA tensors, and TRITON_INTERPRET was not set when the kernels were loaded"
    if not INTERPRETED and device_of(tensor.device).capability < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    return None


def device_of(device: torch.device) -> Device:
    """Properties of a device; the interpreter stands in for a Hopper."""
    return Device((9, 0), 232448) if device.type != "cuda" else _device_of(device)


@cache
def _device_of(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    return Device((found.major, found.minor), found.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def tf32_allowed() -> bool:
    """torch's own switch for float32 products; its older name, allow_tf32, raises once a user has set this one."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(dtype: torch.dtype) -> str:
    """Of float32 dots of widened tiles: exact products unless torch's own switch allows less.

    A 16-bit value is exact in tf32, so three tf32 products lose nothing of it, and split the other operand in two.
    """
    if dtype != torch.float32:
        return "tf32x3"
    return "tf32" if tf32_allowed() else "ieee"


def strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


SIZES = frozenset((*"NWVDKQHMP", "DH", "DP"))  # multiples of 16 in a typical call, which lets loads be vectors
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


AOT_DTYPES = (torch.float32, torch.bfloat16)  # float16 compiles to the same code as bfloat16 but for the type; attention has all three


@dataclass(frozen=True)
class Aot:
    """One kernel with the argument types of a typical call, to be compiled without a GPU."""

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...]  # multiples of 16: aligned pointers, SIZES, strides
    num_warps: int
    num_stages: int
    expect: tuple[str, ...] = ()  # what must be in the PTX for sm_90 (or what comes after it alone), e.g. "wgmma"
    capabilities: tuple[int, ...] = (80, 90, 100)
    # Bytes. ptxas sometimes parks a value or two there to reach the next step of occupancy; a real spill is an order of magnitude more, and
    # only the largest tiles may have one.
    stack: int = 32


def aot(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    constants: Mapping[str, Any],
    types: Mapping[str, str] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
    expect: tuple[str, ...] = (),
) -> Aot:
    """Types follow the names: `*_ptr` points to `dtype`, every other argument is an int32, unless `types` says otherwise."""
    types = dict(types or {})
    signature = {
        a: "constexpr" if a in constants else types.get(a, f"*{NAMES[dtype]}" if a.endswith("_ptr") else "i32") for a in kernel.arg_names
    }
    divisible = tuple(a for a, t in signature.items() if t[0] == "*" or (t != "constexpr" and ("stride" in a or a in SIZES)))
    return Aot(f"{name}_{NAMES[dtype]}", kernel, signature, dict(constants), divisible, num_warps, num_stages, expect)

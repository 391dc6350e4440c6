"""Erase from and add to the rows of a memory."""

from __future__ import annotations

import torch

from memkernels._checks import Signature, fail
from memkernels._compat import forward_ad_active, functorch_active
from memkernels._registry import Arg, Out, Product, define_inplace, define_op, empty_like


def memory_write(memory: torch.Tensor, weights: torch.Tensor, erase: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
    """Write to a memory: every write head erases a part of each row and adds to it.

    Formula:
        ``written[b, n, w] = memory[b, n, w] * prod_h(1 - weights[b, h, n] * erase[b, h, w]) + sum_h weights[b, h, n] * add[b, h, w]``

    Args:
        memory: "B N W", float64, float32, bfloat16 or float16; any strides.
        weights: "B H N", same dtype and device; usually in [0, 1]. Any number of write heads H, 0 too (the memory is copied).
        erase: "B H W", same dtype and device; usually in [0, 1].
        add: "B H W", same dtype and device.

    Returns:
        written: "B N W", same dtype, contiguous, a new tensor.

    Gradients:
        To all four arguments, of any order; exact where a factor of the product is zero.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64; rounded once, at the end. Heads are taken in order.
        Deterministic; a batch row does not depend on the other rows.

    Raises:
        ValueError: a size differs from what another argument says.
        TypeError: a dtype or device differs or is not a floating one.

    Source:
        Graves, Wayne and Danihelka, Neural Turing Machines (2014), equations 3 and 4; several heads as in Graves et al. (2016).

    Example:
        >>> import torch, memkernels as mk
        >>> memory, one = torch.ones(1, 2, 2), torch.ones(1, 1, 2)
        >>> mk.memory_write(memory, torch.tensor([[[1.0, 0.0]]]), one, 5 * one)
        tensor([[[5., 5.],
                 [1., 1.]]])
    """
    SIGNATURE(memory, weights, erase, add)
    (written,) = OP(memory, weights, erase, add)
    return written


def memory_write_(memory: torch.Tensor, weights: torch.Tensor, erase: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
    """Write to a memory in place: `memory_write` without a second copy of the memory, for inference.

    Formula:
        ``memory[b, n, w] <- memory[b, n, w] * prod_h(1 - weights[b, h, n] * erase[b, h, w]) + sum_h weights[b, h, n] * add[b, h, w]``

    Args:
        memory: "B N W", float64, float32, bfloat16 or float16; any strides, but no two elements in the same place.
        weights: "B H N", same dtype and device.
        erase: "B H W", same dtype and device.
        add: "B H W", same dtype and device.

    Returns:
        memory, the same tensor.

    Gradients:
        None: `memory_write` is the differentiable form.

    Numerics:
        The same bits as `memory_write`.

    Raises:
        RuntimeError: grad mode is on and an argument requires grad; inside a torch.func transform or forward-mode AD.
        ValueError: a size differs from what another argument says, or the memory overlaps itself (from ``expand``).
        TypeError: a dtype or device differs or is not a floating one.

    Source:
        Graves, Wayne and Danihelka, Neural Turing Machines (2014), equations 3 and 4.

    Example:
        >>> import torch, memkernels as mk
        >>> memory, one = torch.ones(1, 2, 2), torch.ones(1, 1, 2)
        >>> mk.memory_write_(memory, torch.tensor([[[1.0, 0.0]]]), one, 5 * one) is memory
        True
        >>> memory[0, 0]
        tensor([5., 5.])
    """
    SIGNATURE_INPLACE(memory, weights, erase, add)
    for name, tensor in dict(memory=memory, weights=weights, erase=erase, add=add).items():
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise RuntimeError(
                f"memory_write_: {name}: expected a tensor that needs no gradient, got one with requires_grad=True; "
                "use memory_write, or torch.no_grad()"
            )
    if functorch_active() or forward_ad_active():
        raise RuntimeError("memory_write_: expected a call outside torch.func transforms and forward-mode AD; use memory_write there")
    if _overlaps_itself(memory):
        fail("memory_write_", "memory", "every element in a place of its own", f"strides {memory.stride()} for shape {tuple(memory.shape)}")
    if not torch.compiler.is_compiling() and memory.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "memory_write_: memory: expected a normal tensor outside inference mode, got an inference tensor; clone it first"
        )
    others = (_apart(tensor, memory) for tensor in (weights, erase, add))
    OP_INPLACE(memory, *others)
    return memory


def _overlaps_itself(tensor):
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride()) if size > 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += stride * (size - 1)
    return False


def _apart(tensor, memory):
    """A kernel must not read what it has just written, so an argument in the storage of the memory is copied first."""
    if torch.compiler.is_compiling() or tensor.untyped_storage()._cdata != memory.untyped_storage()._cdata:
        return tensor
    return tensor.clone()


def _allocate(memory, weights, erase, add):
    return (empty_like(memory),)


def _products(memory, weights, erase, add):
    return (Product(weights.numel() * memory.shape[2], "weights", "add"),)


_DIMS = dict(memory="B N W", weights="B H N", erase="B H W", add="B H W")
SIGNATURE, SIGNATURE_INPLACE = Signature("memory_write", **_DIMS), Signature("memory_write_", **_DIMS)
OP = define_op(
    "memory_write",
    inputs=(Arg("memory"), Arg("weights"), Arg("erase"), Arg("add")),
    outputs=(Out("written"),),
    allocate=_allocate,
    autocast="float32",
    products=_products,
)
OP_INPLACE = define_inplace("memory_write_", OP)

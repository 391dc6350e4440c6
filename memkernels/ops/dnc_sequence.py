"""A Differentiable Neural Computer over a whole sequence: controller, interface and memory for all steps in one call."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memkernels._checks import Signature, check_choice, check_flag, check_number, check_tensor, fail
from memkernels._compat import register_namedtuple
from memkernels._registry import Arg, Out, Product, define_op, new_empties
from memkernels.ops.dnc_step import COSINES, DNCState

STRENGTHS = ("oneplus", "softplus")


class DNCController(NamedTuple):
    """The LSTM that asks the memory: its state, what was read last, its weights and those of the interface. Shapes at `dnc_sequence`."""

    reads: Tensor
    hidden: Tensor
    cell: Tensor
    weight_ih: Tensor
    weight_rh: Tensor
    weight_hh: Tensor
    bias: Tensor
    weight_interface: Tensor
    bias_interface: Tensor


register_namedtuple(DNCController)


def dnc_sequence(
    input: Tensor,
    state: DNCState,
    controller: DNCController | None = None,
    *,
    key_mask: bool = False,
    sharpen_links: bool = False,
    deallocate: bool = False,
    write_gradient: bool = False,
    strength: str = "oneplus",
    cosine: str = "roots",
    bounded: bool = False,
    clip: float | None = None,
    return_weights: bool = False,
) -> tuple[Any, ...]:
    """A Differentiable Neural Computer over a whole sequence: LSTM controller, interface and memory for all steps in one call.

    Formula, at each step:
        - with a controller: ``h, c = LSTM([x, reads'], (h', c'))``, gates i, f, g, o; ``vector = W_xi h + b_xi``; without: ``vector = x``
        - the vector is cut into the parts of `DNCInterface`, in its order: keys and add as they are, strengths 1 + softplus, modes
          softmax, the rest sigmoid; ``write_mask, read_mask`` only with `key_mask`, ``link_sharpness`` (1 + softplus) only with
          `sharpen_links`
        - ``reads, state = dnc_step(state', interface)``

    Args:
        input: "T B I", float64, float32, bfloat16 or float16; any strides. Without a controller the interface vectors, I = P.
        state: `DNCState`: memory "B N W", usage "B N", link "B U N N", precedence "B U N", write_weights "B U N", read_weights "B R N".
        controller: None, or a `DNCController`: reads "B R W", hidden "B H", cell "B H"; weight_ih "4H I", weight_rh "4H R W",
            weight_hh "4H H", bias "4H"; weight_interface "P H", bias_interface "P" with P the length of an interface vector,
            ``R W + 3 U W + 2 R + 3 U + R (2 U + 1)``, and ``(R + U) W`` more with `key_mask`, ``2 R`` more with `sharpen_links`.
        key_mask, sharpen_links: the options of Csordas and Schmidhuber (2019) that need more of the interface.
        deallocate, write_gradient, cosine: as `dnc_step`.
        strength: "oneplus" or "softplus": the activation of the strengths.
        bounded: keys and add go through tanh.
        clip: the controller's cell is clamped to [-clip, clip] before the next step; None: not.
        return_weights: also return the weights of every head at every step.

    Returns:
        (reads "T B R W", state), with a controller (reads, state, hidden "T B H", cell "B H"); with `return_weights` at the end the weights
        "T B R+U N" of the read, then the write heads: which rows each read came from.

    Gradients:
        To input, state, and all of the controller, of any order. Backward keeps weights, usage, interface and controller of every step and
        computes memories and links again, from about 2 sqrt(T) checkpoints.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64; rounded at the end, so the state of a half type carries
        float32 between steps. Deterministic; a batch row does not depend on the others. Rows whose usage differs by less than a dtype
        resolves are allocated in another order in another dtype, see `allocation`.

    Raises:
        ValueError: a size differs from what another argument says, an unknown strength or cosine, `clip` that is not positive.
        TypeError: a dtype or device differs or is not a floating one; a flag is no bool.

    Source:
        Graves et al., Hybrid computing using a neural network with dynamic external memory (2016), Methods; Csordas and Schmidhuber,
        Improving Differentiable Neural Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness Control (2019).

    Example:
        >>> import torch, memkernels as mk
        >>> T, B, N, W, R, U = 7, 2, 8, 4, 2, 1
        >>> link, write = torch.zeros(B, U, N, N), torch.zeros(B, U, N)
        >>> state = mk.DNCState(torch.zeros(B, N, W), torch.zeros(B, N), link, write, write, torch.zeros(B, R, N))
        >>> vectors = torch.randn(T, B, R * W + 3 * U * W + 2 * R + 3 * U + R * (2 * U + 1))
        >>> reads, state = mk.dnc_sequence(vectors, state)
        >>> reads.shape, state.link.shape
        (torch.Size([7, 2, 2, 4]), torch.Size([2, 1, 8, 8]))
    """
    flags = dict(key_mask=key_mask, sharpen_links=sharpen_links, deallocate=deallocate, write_gradient=write_gradient)
    for name, flag in (*flags.items(), ("bounded", bounded)):
        if flag.__class__ is not bool:
            check_flag("dnc_sequence", name, flag)
    check_choice("dnc_sequence", "strength", strength, STRENGTHS)
    check_choice("dnc_sequence", "cosine", cosine, COSINES)
    limit = 0.0  # none; AOTInductor cannot read an infinite option from its package
    if clip is not None:
        limit = check_number("dnc_sequence", "clip", clip)
        if not limit > 0:
            fail("dnc_sequence", "clip", "a positive number or None", clip)
        limit = 0.0 if limit == math.inf else limit
    old, asks = DNCState(*state), (None,) * 9 if controller is None else DNCController(*controller)
    if controller is not None:
        for name, tensor in zip(DNCController._fields, asks):
            if tensor is None:  # which only all of them may be
                check_tensor("dnc_sequence", name, tensor)
    tensors = (input, *old, *asks)
    sizes = SIGNATURE(*tensors)
    readers, writers, width = sizes["R"], sizes["U"], sizes["W"]
    wanted, got = interface_size(readers, writers, width, key_mask, sharpen_links), sizes["I" if controller is None else "P"]
    if got != wanted:
        what, dims = ("input", "[T B I] with I") if controller is None else ("weight_interface", "[P H] with P")
        fail("dnc_sequence", what, f"{dims}={wanted}, the interface of this memory", got)
    reads, hidden, memory, used, link, precedence, weights, cell, *_ = OP(*tensors, *flags.values(), strength, cosine, bounded, limit)
    found: tuple[Any, ...] = (reads, DNCState(memory, used, link, precedence, *_last(weights, old)))
    found += () if controller is None else (hidden, cell)
    return (*found, weights.to(memory.dtype)) if return_weights else found


def _last(weights: Tensor, old: DNCState) -> tuple[Tensor, Tensor]:
    """The weights of write and read heads after the last step."""
    read, write = old.read_weights, old.write_weights
    if weights.shape[0]:  # len() would fix the number of steps where a graph is traced with any
        read, write = weights[-1].to(read.dtype).split((read.shape[1], write.shape[1]), 1)
    return write.clone(memory_format=torch.contiguous_format), read.clone(memory_format=torch.contiguous_format)


def interface_size(readers: int, writers: int, width: int, key_mask: bool, sharpen_links: bool) -> int:
    """The length of an interface vector: the sum of what `interface_shapes` lists, without making the list for every call."""
    found = readers * (width + 2 * writers + 3) + 3 * writers * (width + 1)
    found += (readers + writers) * width if key_mask else 0  # torch 2.11 cannot multiply a symbol by a bool
    return found + (2 * readers if sharpen_links else 0)


def interface_shapes(readers: int, writers: int, width: int, key_mask: bool, sharpen_links: bool) -> dict[str, tuple[int, ...]]:
    """Sizes of the parts of an interface vector, in the order of `DNCInterface`."""
    reads, writes = (readers, width), (writers, width)
    found: dict[str, tuple[int, ...]] = dict(
        read_keys=reads, read_strengths=(readers,), write_keys=writes, write_strengths=(writers,), erase=writes, add=writes,
        free_gate=(readers,), allocation_gate=(writers,), write_gate=(writers,), read_modes=(readers, 2 * writers + 1),
    )  # fmt: skip
    if key_mask:
        found |= dict(write_mask=writes, read_mask=reads)
    return found | dict(link_sharpness=(readers, 2)) if sharpen_links else found


def _allocate(input, memory, usage, link, precedence, write, read, reads, h, c, weight_ih, *weights_and_options):
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    (steps, batch, features), readers, writers = input.shape, read.shape[1], write.shape[1]
    rows, width = memory.shape[1:]
    interface = weights_and_options[4]
    asked = features if interface is None else interface.shape[0]
    n = None if h is None else h.shape[1]
    return new_empties(
        input,
        (steps, batch, readers, width), None,
        None if n is None else (steps, batch, n), None,
        memory.shape, None,
        usage.shape, None,
        link.shape, None,
        precedence.shape, None,
        (steps, batch, readers + writers, rows), wide,
        None if c is None else c.shape, None,
        (steps, batch, asked), wide,
        (steps, batch, rows), wide,
        (steps, batch, writers, rows), wide,
        (steps, batch, 2, readers, writers, rows), wide,
        None if n is None else (steps + 1, batch, features + readers * width + n), wide,
        None if n is None else (steps, batch, 4 * n), wide,
        None if n is None else (steps, batch, n), wide,
    )  # fmt: skip


def _products(
    input, memory, usage, link, precedence, write, read, reads, h, c, weight_ih, weight_rh, weight_hh, bias, interface, bias_interface,
    key_mask, *_,
):  # fmt: skip
    (_, rows, width), steps = memory.shape, input.shape[0] * input.shape[1]
    readers, writers = read.shape[1], write.shape[1]
    weights = dict(weight_ih=weight_ih, weight_rh=weight_rh, weight_hh=weight_hh, weight_interface=interface)
    controller = (Product(steps * w.numel(), "input" if name == "weight_ih" else "*", name) for name, w in weights.items() if w is not None)
    norms = readers + writers if key_mask else 0  # a key mask makes the norms of the rows a product too
    memory_products = Product(steps * (2 * (readers + writers) + norms) * rows * width)  # similarities, what is written, reads
    return *controller, memory_products, Product(steps * 2 * readers * writers * rows * rows)


_STATE = dict(memory="B N W", usage="B N", link="B U N N", precedence="B U N", write_weights="B U N", read_weights="B R N")
_CARRIED = dict(reads="B R W | None", hidden="B H | None", cell="B H | None")
_WEIGHTS = dict(weight_ih="4H I | None", weight_rh="4H R W | None", weight_hh="4H H | None", bias="4H | None")
_INTERFACE = dict(weight_interface="P H | None", bias_interface="P | None")
SIGNATURE = Signature("dnc_sequence", input="T B I", **_STATE, **_CARRIED, **_WEIGHTS, **_INTERFACE)
# Saved in the accumulation type: `asked` the interface after its activations; usage and precedence after each step; `followed` what
# following the links forward and backward gives, before it is sharpened; of the controller `rows`, what enters it at each step and after
# the last one, [x, reads', h'], its gates, and its cells before the clamp.
OP = define_op(
    "dnc_sequence",
    inputs=(
        Arg("input", batch=1),
        *map(Arg, _STATE),
        *(Arg(name, optional=True) for name in _CARRIED),
        *(Arg(name, optional=True, batch=None) for name in (*_WEIGHTS, *_INTERFACE)),
    ),
    outputs=(
        *(Out("all_reads", batch=1), Out("all_hidden", batch=1), Out("last_memory"), Out("last_usage"), Out("last_link")),
        *(Out("last_precedence"), Out("weights", save=True, batch=1), Out("last_cell")),
        *(Out(n, differentiable=False, save=True, batch=1) for n in ("asked", "usages", "precedences", "followed")),
        *(Out(n, differentiable=False, save=True, batch=1) for n in ("rows", "gates", "cells")),
    ),
    options="bool key_mask, bool sharpen_links, bool deallocate, bool write_gradient, str strength, str cosine, bool bounded, float clip",
    allocate=_allocate,
    autocast="float32",
    products=_products,
)

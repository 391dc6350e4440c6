"""A Neural Turing Machine over a whole sequence: controller, heads and memory for all steps in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from memkernels._checks import Signature, check_choice
from memkernels._compat import register_namedtuple
from memkernels._registry import Arg, Out, Product, define_op, new_empties

FORMS = ("graves", "pytorch-ntm")


class NTMState(NamedTuple):
    """What is carried from one step to the next: the memory, the weights of the heads, what was read, and the controller's state."""

    memory: torch.Tensor  # B N W
    read_weights: torch.Tensor  # B R N
    write_weights: torch.Tensor  # B U N
    reads: torch.Tensor  # B R W
    hidden: torch.Tensor  # B H
    cell: torch.Tensor  # B H

    def detach(self) -> NTMState:
        """The same values without their history: between the windows of truncated back-propagation."""
        return NTMState(*(t.detach() for t in self))


register_namedtuple(NTMState)


def ntm_sequence(
    input: torch.Tensor,
    state: NTMState,
    weight_ih: torch.Tensor,
    weight_rh: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor,
    read_key: torch.Tensor,
    read_scalars: torch.Tensor,
    write_key: torch.Tensor,
    write_scalars: torch.Tensor,
    write_vectors: torch.Tensor,
    *,
    form: str = "graves",
    return_weights: bool = False,
) -> tuple[Any, ...]:
    """A Neural Turing Machine over a whole sequence: LSTM controller, read and write heads and memory for all steps in one call.

    Formula, at each step, with M' and w' from the step before:
        - controller: ``h, c = LSTM([x, reads'], (h', c'))``, gates i, f, g, o
        - every head is linear in ``[h, 1]``: key k, strength b, gate g = sigmoid, sharpen y = 1 + softplus, shift s = softmax
        - ``w = location_address(softmax(b cos(k, M')), w', g, s, y)`` with ``cos = k.m / (sqrt(|k|^2 + eps) sqrt(|m|^2 + eps))``
        - ``M = memory_write(M', w of the write heads, e, a)`` with e = sigmoid

        ``form="graves"``: b = 1 + softplus, a = tanh, eps = 1e-6, and the read heads read M. ``form="pytorch-ntm"`` (the formulas of
        loudinthecloud/pytorch-ntm): b = softplus, a is linear, eps = 1e-16, and so much is added to the sum of
        powers that sharpening divides by (weights may sum to less than 1), and the read heads read M'.

    Args:
        input: "T B I", float64, float32, bfloat16 or float16; any strides.
        state: `NTMState`: memory "B N W", read_weights "B R N", write_weights "B U N", reads "B R W", hidden "B H", cell "B H".
        weight_ih, weight_rh, weight_hh, bias: "4H I", "4H R W", "4H H", "4H": of the controller for x, reads' and h'.
        read_key, write_key: "R W H+1", "U W H+1"; the last column is the bias, here and below.
        read_scalars, write_scalars: "R 2S+4 H+1", "U 2S+4 H+1": rows strength, gate, sharpen, then the 2S+1 taps of the shift.
        write_vectors: "2 U W H+1": erase, then add.
        form: "graves" or "pytorch-ntm".
        return_weights: also return the weights of every head at every step.

    Returns:
        (hidden "T B H", reads "T B R W", state), and with `return_weights` the weights "T B R+U N" of the read, then the write heads:
        which rows each read came from.

    Gradients:
        To input, state and all weights, of any order. Backward keeps the weights and the controller of every step and computes the
        memories again, from about sqrt(T) of them at a time.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64; rounded at the end, so the state of a half type carries
        float32 between steps. Weights keep their mass as `location_address` says. Deterministic; a batch row does not depend on the others.

    Raises:
        ValueError: a size differs from what another argument says, or an unknown form.
        TypeError: a dtype or device differs or is not a floating one.

    Source:
        Graves, Wayne and Danihelka, Neural Turing Machines (2014), equations 2 to 9.

    Example:
        >>> import torch, memkernels as mk
        >>> B, I, H, N, W = 2, 3, 5, 8, 4
        >>> start = torch.zeros(B, 1, N).index_fill(2, torch.tensor([0]), 1.0)
        >>> state = mk.NTMState(torch.rand(B, N, W), start, start, torch.zeros(B, 1, W), torch.zeros(B, H), torch.zeros(B, H))
        >>> shapes = (4 * H, I), (4 * H, 1, W), (4 * H, H), (4 * H,), (1, W, H + 1), (1, 6, H + 1), (1, W, H + 1), (1, 6, H + 1)
        >>> weights = [0.1 * torch.randn(shape) for shape in (*shapes, (2, 1, W, H + 1))]
        >>> hidden, reads, state = mk.ntm_sequence(torch.randn(7, B, I), state, *weights)
        >>> hidden.shape, reads.shape, state.memory.shape
        (torch.Size([7, 2, 5]), torch.Size([7, 2, 1, 4]), torch.Size([2, 8, 4]))
    """
    if form not in FORMS:
        check_choice("ntm_sequence", "form", form, FORMS)
    heads = (read_key, read_scalars, write_key, write_scalars, write_vectors)
    tensors = (input, *state, weight_ih, weight_rh, weight_hh, bias, *heads)
    SIGNATURE(*tensors)
    hidden, reads, memory, weights, cell, *_ = OP(*tensors, form)
    carried: Any = state[1:5]
    if hidden.shape[0]:  # len() would fix the number of steps where a graph is traced with any
        heads = weights[-1].to(memory.dtype).split((read_key.shape[0], write_key.shape[0]), 1)
        carried = (*heads, reads[-1], hidden[-1])
    last = NTMState(*[memory, *(t.clone(memory_format=torch.contiguous_format) for t in carried), cell])
    return (hidden, reads, last, weights.to(memory.dtype)) if return_weights else (hidden, reads, last)


def _allocate(input, memory, read_weights, write_weights, reads, h, c, weight_ih, weight_rh, weight_hh, bias, *heads_and_form):
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    (steps, batch, features), (_, heads, width), hidden = input.shape, reads.shape, h.shape[1]
    read_scalars, writers = heads_and_form[1], write_weights.shape[1]
    every = heads + writers
    projected = every * (width + read_scalars.shape[1] + 2) + 2 * writers * width
    return new_empties(
        input,
        (steps, batch, hidden), None,
        (steps, batch, heads, width), None,
        memory.shape, None,
        (steps, batch, every, memory.shape[1]), wide,
        c.shape, None,
        (steps + 1, batch, features + heads * width + hidden), wide,
        (steps, batch, 4 * hidden), wide,
        (steps, batch, hidden), wide,
        (steps, batch, projected), wide,
    )  # fmt: skip


def _products(input, memory, read_weights, write_weights, reads, h, c, weight_ih, weight_rh, weight_hh, bias, *heads_and_form):
    (_, rows, width), steps = memory.shape, input.shape[0] * input.shape[1]
    readers, writers = read_weights.shape[1], write_weights.shape[1]
    controller = (Product(steps * w.numel(), left, name) for w, left, name in (
        (weight_ih, "input", "weight_ih"), (weight_rh, "*", "weight_rh"), (weight_hh, "*", "weight_hh"),
    ))  # fmt: skip
    features = h.shape[1]  # the last column of the heads' weights is a bias
    heads = (Product(steps * w.numel() // (features + 1) * features, "*", name) for w, name in zip(heads_and_form, _HEADS))
    similar_written_read = Product(steps * 2 * (readers + writers) * rows * width)
    return *controller, *heads, similar_written_read


_WEIGHTS = dict(weight_ih="4H I", weight_rh="4H R W", weight_hh="4H H", bias="4H")
_HEADS = dict(read_key="R W H+1", read_scalars="R 2S+4 H+1", write_key="U W H+1", write_scalars="U 2S+4 H+1", write_vectors="2 U W H+1")
_STATE = dict(memory="B N W", read_weights="B R N", write_weights="B U N", reads="B R W", hidden="B H", cell="B H")
SIGNATURE = Signature("ntm_sequence", input="T B I", **_STATE, **_WEIGHTS, **_HEADS)
# Saved in the accumulation type: `rows` what enters the controller at each step, and after the last one, [x, reads', h']; `gates` and
# `cells` of the controller; `heads` all that is linear in h after its activation: keys, scalars, erase, add; then the `stats` of
# location_address.
OP = define_op(
    "ntm_sequence",
    inputs=(Arg("input", batch=1), *map(Arg, _STATE), *(Arg(name, batch=None) for name in (*_WEIGHTS, *_HEADS))),
    outputs=(
        *(Out("all_hidden", batch=1), Out("all_reads", batch=1), Out("last_memory"), Out("weights", save=True, batch=1), Out("last_cell")),
        *(Out(name, differentiable=False, save=True, batch=1) for name in ("rows", "gates", "cells", "heads")),
    ),
    options="str form",
    allocate=_allocate,
    autocast="float32",
    products=_products,
)

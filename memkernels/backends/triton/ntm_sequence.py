"""ntm_sequence on Triton: a program walks through all steps of a batch row, see _ntm_fwd and _ntm_bwd; what spans all steps is products.

Bytes a row and step: forward 4 (6 H + 3 (R + U) N + 2 N W) and the controller's weights from the L2 cache, backward about four times that.
float32 inside; the memories of backward are computed again from about sqrt(T) of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from memkernels.backends.triton import _launch, _matmul
from memkernels.backends.triton._common import AOT_DTYPES, aot, refuse, run
from memkernels.backends.triton._ntm_bwd import ntm_bwd_kernel
from memkernels.backends.triton._ntm_fwd import ntm_fwd_kernel

FLOAT = torch.float32  # what the products of two float32 factors are asked for as, whatever the dtype of the call


class Call(NamedTuple):
    """The inputs of the op, or their gradients (None where nobody needs one)."""

    input: torch.Tensor
    memory: torch.Tensor
    read_weights: torch.Tensor
    write_weights: torch.Tensor
    reads: torch.Tensor
    hidden: torch.Tensor
    cell: torch.Tensor
    weight_ih: torch.Tensor
    weight_rh: torch.Tensor
    weight_hh: torch.Tensor
    bias: torch.Tensor
    read_key: torch.Tensor
    read_scalars: torch.Tensor
    write_key: torch.Tensor
    write_scalars: torch.Tensor
    write_vectors: torch.Tensor

    @property
    def heads(self):
        """What is linear in h, in the order of its rows."""
        return self.read_key, self.write_key, self.read_scalars, self.write_scalars, self.write_vectors


def supports(*call):
    return _launch.refuse_rows(1, call[1].shape[2]) or refuse(call[0])


class Run:
    """The sizes of a call and its weights as the kernels want them."""

    def __init__(self, call: Call, form: str):
        self.call = call
        (self.steps, self.batch, self.features), (_, self.count, self.width) = call.input.shape, call.memory.shape
        self.hidden, self.readers, self.writers = call.hidden.shape[1], len(call.read_key), len(call.write_key)
        self.share = call.read_scalars.shape[1]
        self.every, self.rows = self.readers + self.writers, self.steps * self.batch
        self.inner = self.readers * self.width + self.hidden
        heads = torch.cat([t.flatten(0, -2) for t in call.heads])
        self.bias, self.matrix = heads[:, -1].contiguous(), heads[:, :-1].contiguous()
        self.controller = torch.cat([call.weight_rh.flatten(1), call.weight_hh], 1)
        self.first = torch.cat([call.read_weights, call.write_weights], 1).float().contiguous()
        self.c0 = call.cell.float().contiguous()
        self.sizes = dict(T=self.steps, B=self.batch, H=self.hidden, N=self.count, W=self.width, R=self.readers, U=self.writers)
        self.form = form

    def options(self, backward):
        tile = _launch.machine(self.count, self.width, self.share - 3, self.hidden, backward)
        return dict(share=self.share, GRAVES=self.form == "graves", **_blocks(tile))

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.call.input.device)

    def scratch(self):
        """Room for the similarities and the weights by content of a step."""
        return [self.empty(self.batch, self.every, self.count) for _ in range(2)]


def _blocks(tile):
    return {f"BLOCK_{n.upper()}": getattr(tile, f"block_{n}") for n in "nwvsjk"} | dict(num_warps=tile.num_warps)


def forward(hidden, reads, last_memory, weights, last_cell, rows, gates, cells, heads, *flat):
    call = Call(*flat[:-1])
    made = Run(call, flat[-1])
    start, middle = made.features, made.features + made.readers * made.width
    rows[:-1, :, :start] = call.input
    rows[-1, :, :start] = 0
    rows[0, :, start:middle] = call.reads.flatten(1)
    rows[0, :, middle:] = call.hidden
    projected, memory = made.empty(made.rows, 4 * made.hidden), made.empty(*call.memory.shape).copy_(call.memory)
    _matmul.matmul(projected, call.input.reshape(made.rows, start), call.weight_ih.mT, call.input.dtype, call.bias)
    run(
        ntm_fwd_kernel, (made.batch,), rows, weights, gates, cells, heads, memory, *made.scratch(), projected, made.first, made.c0,
        made.controller, made.matrix, made.bias, I=start, **made.sizes, **made.options(False),
    )  # fmt: skip
    hidden.copy_(rows[1:, :, middle:])
    reads.flatten(2).copy_(rows[1:, :, start:middle])
    last_memory.copy_(memory)
    last_cell.copy_(cells[-1] if made.steps else call.cell)


def backward(*flat):
    want, upstream, call, saved = Call(*flat[:16]), flat[16:21], Call(*flat[21:37]), flat[37:42]
    dhidden, dreads, dmemory, dweights, dcell = (None if t is None else t.contiguous() for t in upstream)
    weights, rows, gates, cells, heads = saved
    made = Run(call, flat[42])
    entered, left = (t.reshape(made.rows, rows.shape[2]) for t in (rows[:-1], rows[1:]))
    h, middle = left[:, rows.shape[2] - made.hidden :], made.every * made.width
    raw = made.empty(made.rows, made.every * made.share)
    scalars = slice(middle, middle + raw.shape[1])
    _matmul.matmul(raw, h, made.matrix[scalars].mT, FLOAT, made.bias[scalars])
    segment = max(1, math.isqrt(max(made.steps - 1, 0)) + 1)
    segments = _launch.ceil_div(made.steps, segment)
    memories = made.empty(made.batch, segments + segment, made.count, made.width)
    memories[:, 0] = call.memory
    dstate = made.empty(made.batch, made.inner).zero_()
    before, dprevious = made.empty(*call.memory.shape), torch.zeros_like(made.first)
    dcell_state = torch.zeros_like(made.c0) if dcell is None else dcell.to(torch.float32, copy=True)
    before.zero_() if dmemory is None else before.copy_(dmemory)
    dgates, draws = torch.empty_like(gates), made.empty(made.rows, len(made.matrix))
    slope, dlogit = (made.empty(made.batch, made.count) for _ in range(2))
    run(
        ntm_bwd_kernel, (made.batch,), before, dprevious, dstate, dcell_state, dgates, draws, memories, *made.scratch(), slope, dlogit,
        dhidden, dreads, dweights, weights, gates, cells, heads, raw, made.first, made.c0, made.controller, made.matrix,
        segment=segment, segments=segments, **made.sizes, **made.options(True),
    )  # fmt: skip
    dread, dwrite = dprevious.split((made.readers, made.writers), 1)
    dgates, at = dgates.view(made.rows, 4 * made.hidden), made.readers * made.width
    found = (before, dread, dwrite, dstate[:, :at].view(call.reads.shape), dstate[:, at:], dcell_state)
    for gradient, value in zip(want[1:7], found, strict=True):
        if gradient is not None:
            gradient.copy_(value)
    controller_gradients(made, want, dgates, entered)
    _head_gradients(made, want, draws, h)


def controller_gradients(made, want, dgates, entered):
    if want.input is not None:
        _matmul.matmul(want.input.view(made.rows, made.features), dgates, made.call.weight_ih, made.call.input.dtype)
    first = 0
    for gradient, width in ((want.weight_ih, made.features), (want.weight_rh, made.inner - made.hidden), (want.weight_hh, made.hidden)):
        if gradient is not None:
            _matmul.matmul(gradient.view(4 * made.hidden, width), dgates.mT, entered[:, first : first + width], FLOAT)
        first += width
    if want.bias is not None:
        want.bias.copy_(dgates.sum(0))


def _head_gradients(made, want, draws, h):
    sizes = [t.shape[:-1].numel() for t in made.call.heads]
    for gradient, d in zip(want.heads, draws.split(sizes, 1), strict=True):
        if gradient is not None:
            both = gradient.view(d.shape[1], made.hidden + 1)
            _matmul.matmul(both[:, :-1], d.mT, h, FLOAT)
            both[:, -1] = d.sum(0)


NARROW = ("controller_ptr", "matrix_ptr", "bias_ptr", "dhidden_ptr", "dreads_ptr")  # of the dtype of the call, all else is float32


def _aot(kernel, dtype, form, backward):
    types = {a: "*fp32" for a in kernel.arg_names if a.endswith("_ptr") and a not in NARROW}
    constants = {k: v for k, v in _blocks(_launch.machine(1024, 64, 3, 128, backward)).items() if k.isupper()} | dict(
        GRAVES=form == "graves"
    )
    if backward and form == "graves":
        constants["upstream_ptr"] = None
    return aot(f"ntm_sequence_{form}_{'bwd' if backward else 'fwd'}", kernel, dtype, constants, types, 8)


AOT = [
    _aot(kernel, dtype, form, kernel is ntm_bwd_kernel)
    for dtype in AOT_DTYPES
    for form in ("graves", "pytorch-ntm")
    for kernel in (ntm_fwd_kernel, ntm_bwd_kernel)
]

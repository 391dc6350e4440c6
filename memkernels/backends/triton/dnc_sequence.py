"""dnc_sequence on Triton: a program walks through all steps of a batch row, see _dnc_fwd and _dnc_bwd; what spans all steps is products.

Bytes a row and step: forward 8 U N^2 + 20 N W + about 16 R U N and the controller's weights from the L2 cache, backward about four times
that. float32 inside; memories and links of backward are computed again from about 2 sqrt(T) of them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from memkernels.backends.triton import _launch, _matmul
from memkernels.backends.triton._common import aot, refuse, run
from memkernels.backends.triton._dnc_bwd import dnc_bwd_kernel
from memkernels.backends.triton._dnc_fwd import dnc_fwd_kernel
from memkernels.backends.triton.ntm_sequence import FLOAT, controller_gradients

MAX_ROWS, MAX_READERS = 1024, 32


class Call(NamedTuple):
    """The inputs of the op, or their gradients (None where nobody needs one)."""

    input: Any
    memory: Any
    usage: Any
    link: Any
    precedence: Any
    write: Any
    read: Any
    reads: Any
    hidden: Any
    cell: Any
    weight_ih: Any
    weight_rh: Any
    weight_hh: Any
    bias: Any
    interface: Any
    bias_interface: Any


class Options(NamedTuple):
    key_mask: bool
    sharpen_links: bool
    deallocate: bool
    write_gradient: bool
    strength: str
    cosine: str
    bounded: bool
    clip: float  # 0: none

    def limit(self) -> float:
        return self.clip or math.inf

    def constants(self, backward: bool) -> dict[str, Any]:
        named = dict(MASK=self.key_mask, SHARPEN=self.sharpen_links, DEALLOCATE=self.deallocate, COSINE=self.cosine, BOUNDED=self.bounded)
        return named | (dict(WRITE_GRADIENT=self.write_gradient) if backward else dict(ONEPLUS=self.strength == "oneplus"))


def supports(*call):
    _, rows, width = call[1].shape
    readers = call[6].shape[1]
    if rows > MAX_ROWS:
        return f"{rows} rows are over the limit of {MAX_ROWS}"
    if readers > MAX_READERS:
        return f"{readers} read heads are over the limit of {MAX_READERS}"
    return _launch.refuse_rows(1, width) or refuse(call[0])


class Run:
    """The sizes of a call, its weights as the kernels want them, and the state before its first step."""

    def __init__(self, call: Call, options: Options):
        self.call, self.options, self.controller = call, options, call.hidden is not None
        (self.steps, self.batch, features), (_, self.count, self.width) = call.input.shape, call.memory.shape
        self.readers, self.writers, self.rows = call.read.shape[1], call.write.shape[1], self.steps * self.batch
        self.features = features if self.controller else 0
        self.hidden = call.hidden.shape[1] if self.controller else 0
        self.asked = len(call.interface) if self.controller else features
        self.inner = self.readers * self.width + self.hidden
        self.first = torch.cat([call.read, call.write], 1).float().contiguous()
        self.usage, self.precedence = call.usage.float().contiguous(), call.precedence.float().contiguous()
        self.recurrent: Any = None
        self.matrix: Any = None
        self.bias: Any = None
        if self.controller:
            self.recurrent = torch.cat([call.weight_rh.flatten(1), call.weight_hh], 1)
            self.matrix, self.bias = call.interface.contiguous(), call.bias_interface.contiguous()

    def constants(self, backward):
        return _constants(self.count, self.width, self.readers, self.writers, self.hidden, self.controller, self.options, backward)

    def sizes(self):
        sizes = dict(T=self.steps, B=self.batch, H=self.hidden, N=self.count, W=self.width, R=self.readers, U=self.writers, P=self.asked)
        return sizes | dict(clip=self.options.limit())

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.call.input.device)

    def scratch(self, backward):
        """Room for the vectors of a step, and how many rows of N elements that is of one batch row."""
        every, ways = self.readers + self.writers, 2 * self.readers * self.writers
        blocks = _launch.ceil_div(self.count, _launch.link(self.count, self.readers, backward).block_m)
        rows = 2 * every + 2 * self.writers + blocks * self.readers
        if backward:
            rows = 3 * every + 4 * self.writers + 3 + ways + (blocks + 1) * (self.readers + 2)
            rows += self.width * self.options.deallocate
        rows += 2 * ways * self.options.sharpen_links
        return self.empty(self.batch, rows * self.count), rows

    def scalars(self, h):
        """Strengths and link sharpness before their activations, whose slopes need them, "T*B 3R+U"."""
        r, u, w = self.readers, self.writers, self.width
        write = r * w + r + u * w
        places = [slice(r * w, r * w + r), slice(write, write + u), slice(self.asked - 2 * r * self.options.sharpen_links, self.asked)]
        if not self.controller:
            return torch.cat([self.call.input[..., p] for p in places], 2).to(FLOAT, memory_format=torch.contiguous_format)
        matrix, bias = (torch.cat([t[p] for p in places]) for t in (self.matrix, self.bias))
        raw = self.empty(self.rows, len(bias))
        _matmul.matmul(raw, h, matrix.mT, FLOAT, bias)
        return raw


def _constants(rows, width, readers, writers, hidden, controller, options, backward):
    tile = _launch.machine(rows, width, 2 * writers + 1, hidden, backward)
    link = _launch.link(rows, readers, backward)
    blocks = {f"BLOCK_{n.upper()}": getattr(tile, f"block_{n}") for n in "nwvsjk"}
    blocks |= dict(BLOCK_M=link.block_m, BLOCK_C=link.block_n, BLOCK_R=link.block_r, BLOCK_A=_launch.power_of_two(rows, 2))
    return blocks | options.constants(backward) | dict(CONTROLLER=controller, num_warps=tile.num_warps, num_stages=1)


def _state(out, initial, like):
    """Where a state, or its gradient, goes through all steps in float32: the output itself if it can."""
    state = out if out is not None and out.dtype == FLOAT else torch.empty(like.shape, dtype=FLOAT, device=like.device)
    return state.zero_() if initial is None else state.copy_(initial)


def forward(*flat):
    (all_reads, all_hidden, last_memory, last_usage, last_link, last_precedence, weights, last_cell), saved = flat[:8], flat[8:15]
    asked, usages, precedences, followed, rows, gates, cells = saved
    call, options = Call(*flat[15:31]), Options(*flat[31:])
    made = Run(call, options)
    start, middle, cell = made.features, made.features + made.readers * made.width, None
    memory, link = _state(last_memory, call.memory, call.memory), _state(last_link, call.link, call.link)
    if made.controller:
        rows[:-1, :, :start] = call.input
        rows[-1, :, :start] = 0
        rows[0, :, start:middle] = call.reads.flatten(1)
        rows[0, :, middle:] = call.hidden
        projected, cell = made.empty(made.rows, 4 * made.hidden), _state(last_cell, call.cell, call.cell)
        _matmul.matmul(projected, call.input.reshape(made.rows, start), call.weight_ih.mT, call.input.dtype, call.bias)
    else:
        projected, rows = call.input.contiguous(), made.empty(made.steps, made.batch, middle)
    scratch, scratch_rows = made.scratch(False)
    run(
        dnc_fwd_kernel, (made.batch,), rows, weights, asked, usages, precedences, followed, gates, cells, memory, link, cell, scratch,
        projected, made.usage, made.precedence, made.first, made.recurrent, made.matrix, made.bias, I=start, scratch_rows=scratch_rows,
        **made.sizes(), **made.constants(False),
    )  # fmt: skip
    all_reads.flatten(2).copy_(rows[1:, :, start:middle] if made.controller else rows)
    ends = (usages[-1], precedences[-1]) if made.steps else (call.usage, call.precedence)
    values = (memory, link, cell, *ends, rows[1:, :, middle:] if made.controller else None)
    for out, value in zip((last_memory, last_link, last_cell, last_usage, last_precedence, all_hidden), values, strict=True):
        if out is not None and out is not value:
            out.copy_(value)


def backward(*flat):
    want, upstream, call, saved, options = Call(*flat[:16]), flat[16:24], Call(*flat[24:40]), flat[40:48], Options(*flat[48:])
    dreads, dhidden, dmemory, dusage, dlink, dprecedence, dweights, dcell = (None if t is None else t.contiguous() for t in upstream)
    weights, asked, usages, precedences, followed, rows, gates, cells = saved
    made = Run(call, options)
    segment = max(1, math.isqrt(max(made.steps - 1, 0)) + 1)
    segments = _launch.ceil_div(made.steps, segment)
    memories = made.empty(made.batch, segments + segment, *call.memory.shape[1:])
    links = made.empty(made.batch, segments + segment, *call.link.shape[1:])
    memories[:, 0], links[:, 0] = call.memory, call.link
    given = (dmemory, dusage, dlink, dprecedence)
    carried = [_state(out, d, like) for out, d, like in zip(want[1:5], given, call[1:5], strict=True)]
    dprevious, dstate = torch.zeros_like(made.first), made.empty(made.batch, made.inner).zero_()
    draws, h, entered, dcell_state = made.empty(made.rows, made.asked), None, None, None
    dgates: Any = None
    if made.controller:
        h = rows[1:].reshape(made.rows, rows.shape[2])[:, rows.shape[2] - made.hidden :]
        entered = torch.cat([call.cell[None].float(), cells[:-1].clamp(-options.limit(), options.limit())])
        dcell_state, dgates = _state(want.cell, dcell, call.cell), torch.empty_like(gates)
    scratch, scratch_rows = made.scratch(True)
    run(
        dnc_bwd_kernel, (made.batch,), *carried, dprevious, dstate, dcell_state, dgates, draws, memories, links, scratch,
        dreads, dhidden, dweights, weights, asked, usages, precedences, followed, gates, cells, entered, made.scalars(h),
        made.usage, made.precedence, made.first, made.recurrent, made.matrix, segment=segment, segments=segments,
        scratch_rows=scratch_rows, **made.sizes(), **made.constants(True),
    )  # fmt: skip
    dread, dwrite = dprevious.split((made.readers, made.writers), 1)
    at = made.readers * made.width
    dreads, dhidden = (
        (dstate[:, :at].view(call.read.shape[0], made.readers, made.width), dstate[:, at:]) if made.controller else (None, None)
    )
    found = (None if made.controller else draws.view(call.input.shape), *carried, dwrite, dread, dreads, dhidden, dcell_state)
    for gradient, value in zip(want[:10], found, strict=True):
        if gradient is not None and value is not None and gradient is not value:
            gradient.copy_(value)
    if made.controller:
        controller_gradients(made, want, dgates.view(made.rows, 4 * made.hidden), rows[:-1].reshape(made.rows, rows.shape[2]))
        if want.interface is not None:
            _matmul.matmul(want.interface, draws.mT, h, FLOAT)
        if want.bias_interface is not None:
            want.bias_interface.copy_(draws.sum(0))


NARROW = ("controller_ptr", "matrix_ptr", "bias_ptr", "dhidden_ptr", "dreads_ptr")  # of the dtype of the call, all else is float32
# Bytes: addresses and sizes that all parts of a step share are more than the registers hold beside a tile; they are read once a part, or
# once a pass over blocks, not in the loops within one.
STACK = {dnc_fwd_kernel: 160, dnc_bwd_kernel: 1280}


def _aot(kernel, dtype, name, options, controller):
    backward = kernel is dnc_bwd_kernel
    narrow = NARROW if controller else (*NARROW, "projected_ptr")
    types = {a: "*fp32" for a in kernel.arg_names if a.endswith("_ptr") and a not in narrow} | dict(clip="fp32")
    constants = _constants(512, 64, 4, 1, 256, controller, options, backward)
    constants = {name: value for name, value in constants.items() if name.isupper()}
    if not controller:
        absent = ("controller", "matrix", "bias", "cell", "gates", "cells", "entered", "dcell", "dgates", "dhidden")
        constants |= {a: None for a in kernel.arg_names if a.removesuffix("_ptr") in absent}
    entry = aot(f"dnc_sequence_{name}_{'bwd' if backward else 'fwd'}", kernel, dtype, constants, types, 8, 1)
    return replace(entry, stack=STACK[kernel])


EVERY = Options(True, True, True, True, "oneplus", "product", True, 0.0)
AOT = [
    _aot(kernel, dtype, name, options, controller)
    for dtype, name, options, controller in (
        (torch.float32, "plain", Options(False, False, False, False, "softplus", "roots", False, 0.0), True),
        (torch.bfloat16, "options", EVERY, False),
    )
    for kernel in (dnc_fwd_kernel, dnc_bwd_kernel)
]

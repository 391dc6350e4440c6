"""The host side of the recurrent layers: launches over time, the states that entered the steps, gradients of weights.

Nothing here waits for the device or allocates by its data, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _cells, _launch, _matmul
from memkernels.backends.triton import _recurrence_bwd as bwd
from memkernels.backends.triton import _recurrence_fwd as fwd
from memkernels.backends.triton._cells import before, drop, enter, restarts, rows_of
from memkernels.backends.triton._common import INTERPRETED, device_of, lanes, rounded, run, store
from memkernels.backends.triton._random import threshold

GATES = {_cells.LSTM.value: 4, _cells.GRU.value: 3, _cells.TANH.value: 1, _cells.RELU.value: 1}


@triton.jit
def entering_kernel(
    out_ptr, all_ptr, first_ptr, reset_ptr, fresh_ptr, lengths_ptr, seed_ptr, T, B, N, reset_stride_t, reset_stride_b,
    fresh_stride_t, fresh_stride_b, fresh_stride_h, dropped, keep_scale,
    REVERSE: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The state that entered every step, after resets and dropout; zero past the end of a row."""
    blocks = tl.cdiv(B, BLOCK_B)
    t, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    b, inside, length = rows_of(block * BLOCK_B + lanes(BLOCK_B), None, lengths_ptr, T, B)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + lanes(BLOCK_N)
    running = t < length
    tile = inside[:, None] & (n < N)[None, :]
    alive = tile & running[:, None]
    starts = restarts(reset_ptr, t, b, running, reset_stride_t, reset_stride_b)
    state = before(all_ptr, first_ptr, t, b, n, length, alive, B, N, REVERSE)
    state = enter(state, starts, fresh_ptr, t, b, n, tile, fresh_stride_t, fresh_stride_b, fresh_stride_h)
    state = rounded(drop(state, seed_ptr, b, n, dropped, keep_scale, DROPOUT), state.dtype)
    store(out_ptr + (t * B + b)[:, None] * N + n[None, :], tl.where(running[:, None], state, 0.0), mask=tile)


@dataclass(frozen=True)
class Layer:
    """One call: sizes, small parameters and states as the kernels want them (contiguous), how rows run, what is drawn."""

    cell: int
    steps: int
    batch: int
    hidden: int
    state: int
    heads: int
    dtype: torch.dtype
    weight: torch.Tensor
    h0: torch.Tensor
    reverse: bool
    reset: torch.Tensor | None
    reset_h: torch.Tensor | None
    lengths: torch.Tensor | None
    c0: torch.Tensor | None = None
    reset_c: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    zoneout: tuple[float, float] = (0.0, 0.0)
    expected: bool = False
    dropout: float = 0.0
    peephole: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    weight_co: torch.Tensor | None = None
    weight_hr: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """A step needs all of a row."""
        return any(t is not None for t in (self.norm_weight, self.weight_co, self.weight_hr))

    def launch(self, backward: bool) -> _launch.Recurrence:
        more = sum(t is not None for t in (self.weight_co, self.weight_hr))
        device = device_of(self.weight.device)
        units, state = self.hidden // self.heads, self.state // self.heads
        if self.whole and self.heads > 1:
            units = state = _launch.MAX_WIDTH  # no program holds a row
        return _launch.recurrence(
            units, state, GATES[self.cell], more, self.norm_weight is not None, self.weight.element_size(), backward, device.shared_bytes,
            INTERPRETED,
        )  # fmt: skip

    def drawn(self) -> dict[str, Any]:
        dropping = self.dropout > 0
        return dict(seed_ptr=self.seed, dropped=threshold(self.dropout), keep_scale=1 / (1 - self.dropout), DROPOUT=dropping)

    def fresh(self) -> dict[str, Any]:
        names = ("reset_h_stride_t", "reset_h_stride_b", "reset_h_stride_h")
        return dict(zip(names, self.reset_h.stride(), strict=True)) if self.reset_h is not None else dict.fromkeys(names, 0)

    def arguments(self) -> dict[str, Any]:
        """What both kernels take."""
        reset_t, reset_b = (0, 0) if self.reset is None else self.reset.stride()
        c_strides = (0, 0, 0) if self.reset_c is None else self.reset_c.stride()
        mode = 0 if self.zoneout == (0.0, 0.0) else 2 if self.expected else 1
        return dict(
            h0_ptr=self.h0, reset_ptr=self.reset, reset_h_ptr=self.reset_h, reset_c_ptr=self.reset_c, lengths_ptr=self.lengths,
            order_ptr=None if self.lengths is None else self.lengths.argsort(descending=True, stable=True),
            T=self.steps, B=self.batch, H=self.hidden, P=self.state, reset_stride_t=reset_t, reset_stride_b=reset_b, **self.fresh(),
            reset_c_stride_t=c_strides[0], reset_c_stride_b=c_strides[1], reset_c_stride_h=c_strides[2],
            zoned_h=threshold(self.zoneout[0]), zoned_c=threshold(self.zoneout[1]), zoneout_h=self.zoneout[0], zoneout_c=self.zoneout[1],
            weight_ptr=self.weight, peephole_ptr=self.peephole, norm_weight_ptr=self.norm_weight, norm_bias_ptr=self.norm_bias,
            CELL=self.cell, REVERSE=self.reverse, ZONEOUT=mode, PRECISION=_matmul.product_precision(self.dtype), **self.drawn(),
        )  # fmt: skip

    def zeroed(self, *tensors: torch.Tensor | None) -> None:
        """What the kernels skip: steps past the end of a row."""
        if self.lengths is not None:
            for t in tensors:
                if t is not None:
                    t.zero_()

    def entered(self, states: torch.Tensor, first: torch.Tensor, fresh: torch.Tensor | None, dropout: bool) -> torch.Tensor:
        """The state that entered every step, "TB N"."""
        width = first.shape[1]
        out = states.new_empty(self.steps * self.batch, width)
        rows = _launch.pointwise(width)
        grid = self.steps * _launch.ceil_div(self.batch, rows.block_n), _launch.ceil_div(width, rows.block_w)
        reset_strides = (0, 0) if self.reset is None else self.reset.stride()
        fresh_strides = (0, 0, 0) if fresh is None else fresh.stride()
        drawn = self.drawn() | (dict(DROPOUT=False) if not dropout else {})
        run(
            entering_kernel, grid, out, states, first, self.reset, fresh, self.lengths, drawn.pop("seed_ptr"), self.steps, self.batch,
            width, *reset_strides, *fresh_strides, **drawn, REVERSE=self.reverse, BLOCK_B=rows.block_n, BLOCK_N=rows.block_w, num_warps=4,
        )  # fmt: skip
        return out


def state_of(given: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A float32 state for a kernel to update."""
    if given is None:
        return torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
    return given.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


class Launcher:
    """Launches one of the two kernels of a layer: all steps, or a stage of one step."""

    def __init__(self, layer: Layer, kernel: Any, backward: bool, tensors: dict[str, Any]):
        self.layer, self.kernel, self.steps = layer, kernel, layer.launch(backward)
        self.arguments = layer.arguments() | dict.fromkeys(("weight_co_ptr", "weight_hr_ptr")) | tensors
        self.rows = _launch.recurrence_rows(layer.hidden, layer.norm_weight is not None)

    def resident(self, stage: int) -> None:
        """All steps; a program holds a head."""
        layer, tile = self.layer, self.steps
        heads = dict(DH=layer.hidden // layer.heads, DP=layer.state // layer.heads)
        weights = dict(weight_co_ptr=layer.weight_co, weight_hr_ptr=layer.weight_hr)
        grid = _launch.ceil_div(layer.batch, tile.block_b), layer.heads
        self._run(grid, tile, 0, layer.steps, heads | weights | dict(SOURCE=fwd.RESIDENT, STAGE=stage))

    def product(self, step: int, stage: int, share: int, **tensors: Any) -> None:
        """A stage of a step with the product with weight_hh, tiles over `share` units of each head."""
        layer, tile = self.layer, self.steps
        heads = dict(DH=layer.hidden // layer.heads, DP=layer.state // layer.heads)
        grid = _launch.ceil_div(layer.batch, tile.block_b), layer.heads * _launch.ceil_div(share, tile.block_h)
        self._run(grid, tile, step, step + 1, heads | tensors | dict(SOURCE=fwd.LOOP, STAGE=stage))

    def pointwise(self, first: int, last: int, stage: int, **tensors: Any) -> None:
        """Steps without products, heads do not matter."""
        tile = self.rows
        grid = _launch.ceil_div(self.layer.batch, tile.block_b), _launch.ceil_div(self.layer.hidden, tile.block_h)
        heads = dict(DH=self.layer.hidden, DP=self.layer.state)
        self._run(grid, tile, first, last, heads | dict(SOURCE=fwd.SCRATCH) | tensors | dict(STAGE=stage))

    def _run(self, grid: tuple[int, int], tile: _launch.Recurrence, first: int, last: int, arguments: dict[str, Any]) -> None:
        blocks = dict(BLOCK_B=tile.block_b, BLOCK_H=tile.block_h, BLOCK_P=tile.block_p, BLOCK_K=tile.block_k, AHEAD=tile.ahead)
        arguments = self.arguments | arguments
        tensors = [n for n in self.kernel.arg_names if n.endswith("_ptr")]
        rest = {k: v for k, v in arguments.items() if k not in tensors}
        run(self.kernel, grid, *(arguments[n] for n in tensors), **rest, first=first, last=last, **blocks, num_warps=tile.num_warps)


def forward(layer: Layer, output: torch.Tensor, h_n: torch.Tensor, projected: torch.Tensor, **tensors: Any) -> None:
    """All steps; h_n and, in tensors, c_state_ptr hold the initial states and then the final ones."""
    names = ("cells_ptr", "gates_ptr", "c_state_ptr", "hidden_ptr", "scratch_ptr", "gate_o_ptr", "bias_ptr")
    found = dict.fromkeys(names) | dict(output_ptr=output, h_state_ptr=h_n, projected_ptr=projected) | tensors
    layer.zeroed(output, found["cells_ptr"], found["gates_ptr"])
    launcher = Launcher(layer, fwd.recurrence_fwd_kernel, False, found)
    units = layer.hidden // layer.heads
    if launcher.steps.resident:
        launcher.resident(fwd.ALL)
    elif not layer.whole:
        for step in range(layer.steps):
            launcher.product(step, fwd.ALL, units)
    else:
        _staged_forward(layer, launcher, units, output, h_n)


def scan(layer: Layer, total: torch.Tensor, **tensors: Any) -> None:
    """Cells and gates of an LSTM whose gates' sums are known; that of o lacks what the new cell adds by weight_co."""
    names = ("output_ptr", "h_state_ptr", "hidden_ptr", "scratch_ptr", "gate_o_ptr", "bias_ptr")
    layer.zeroed(tensors["cells_ptr"], tensors["gates_ptr"])
    found = dict.fromkeys((*names, "norm_weight_ptr", "norm_bias_ptr")) | dict(projected_ptr=total) | tensors
    launcher = Launcher(layer, fwd.recurrence_fwd_kernel, False, found)
    launcher.pointwise(0, layer.steps, fwd.SCAN, SOURCE=fwd.NONE)


def _staged_forward(layer, launcher, units, output, h_n):
    hidden, scratch, gate_o = (
        h_n.new_empty(layer.batch, n * layer.hidden, dtype=torch.float32) for n in (4, 1, 1)
    )  # fmt: skip
    new = h_n.new_empty(layer.batch, layer.state, dtype=torch.float32)
    tensors = dict(hidden_ptr=hidden, scratch_ptr=scratch, gate_o_ptr=None if layer.weight_co is None else gate_o)
    for step in range(layer.steps):
        launcher.product(step, fwd.PRODUCT, units, hidden_ptr=hidden)
        if layer.weight_co is not None:
            launcher.pointwise(step, step + 1, fwd.CELL_STATE, **tensors)
            _matmul.matmul(gate_o, scratch, layer.weight_co.mT, layer.dtype)
        launcher.pointwise(step, step + 1, fwd.ALL if layer.weight_hr is None else fwd.MEMORY, **tensors)
        if layer.weight_hr is not None:
            _matmul.matmul(new, scratch, layer.weight_hr.mT, layer.dtype)
            _finish(layer, launcher.arguments, step, output, h_n, new)


def _finish(layer, arguments, step, output, h_n, new):
    tile = _launch.recurrence_rows(layer.state, False)
    grid = _launch.ceil_div(layer.batch, tile.block_b), _launch.ceil_div(layer.state, tile.block_h)
    kernel = fwd.finish_fwd_kernel
    rest = {k: arguments[k] for k in kernel.arg_names if k in arguments and k != "output_ptr"}
    rest |= dict(new_ptr=new, step=step, BLOCK_B=tile.block_b, BLOCK_P=tile.block_h)
    run(kernel, grid, output, **rest, num_warps=tile.num_warps)


def backward(layer: Layer, dz: torch.Tensor, dhidden: torch.Tensor, dh_state: torch.Tensor, doutput: Any, **tensors: Any) -> None:
    """Fills dz and dhidden (the same unless they differ) of all steps; the states' gradients become those of the initial states."""
    names = (
        "dc_state_ptr", "dnew_ptr", "dmemory_ptr", "dgate_o_ptr", "dnormed_ptr", "dcells_ptr", "dreset_h_ptr", "dreset_c_ptr",
        "cells_ptr", "gates_ptr", "c0_ptr", "raw_ptr",
    )  # fmt: skip
    found = dict.fromkeys(names) | dict(dz_ptr=dz, dhidden_ptr=dhidden, dh_state_ptr=dh_state, doutput_ptr=doutput) | tensors
    layer.zeroed(dz, None if dhidden is dz else dhidden, found["dnew_ptr"], found["dnormed_ptr"])
    for d in (found["dreset_h_ptr"], found["dreset_c_ptr"]):
        if d is not None:
            d.zero_()
    for name, d in (("doutput", doutput), ("dcells", found["dcells_ptr"])):
        found |= zip((f"{name}_stride_{a}" for a in "tbh"), (0, 0, 0) if d is None else d.stride())
    found["dnew_stride_t"] = 0 if found["dnew_ptr"] is None else layer.batch * layer.state
    launcher = Launcher(layer, bwd.recurrence_bwd_kernel, True, found)
    if launcher.steps.resident:
        launcher.resident(bwd.ALL)
    elif not layer.whole:
        for step in range(layer.steps + 1):
            launcher.product(step, bwd.ALL, layer.hidden // layer.heads)
    else:
        _staged_backward(layer, launcher, found["dnew_ptr"])


def _staged_backward(layer, launcher, dnew):
    state, units = (layer.batch, layer.state), (layer.batch, layer.hidden)
    one = dnew is None
    dnew = launcher.layer.h0.new_empty(1, *state, dtype=torch.float32) if one else dnew
    memory, gate_o, product = (dnew.new_empty(units) for _ in range(3))
    for step in range(layer.steps + 1):
        launcher.product(
            step, bwd.STATE, layer.state // layer.heads, dnew_ptr=dnew, dnew_stride_t=0 if one else launcher.arguments["dnew_stride_t"]
        )
        if step == layer.steps:
            break
        dm = dnew[0]
        if layer.weight_hr is not None:
            dm = memory
            _matmul.matmul(memory, dnew[step if layer.reverse else layer.steps - 1 - step], layer.weight_hr, layer.dtype)
        if layer.weight_co is not None:
            launcher.pointwise(step, step + 1, bwd.OUTPUT_GATE, dmemory_ptr=dm, dgate_o_ptr=gate_o)
            _matmul.matmul(product, gate_o, layer.weight_co, layer.dtype)
        launcher.pointwise(step, step + 1, bwd.REST, dmemory_ptr=dm, dgate_o_ptr=None if layer.weight_co is None else product)


def living(layer: Layer, input: torch.Tensor) -> torch.Tensor:
    """The input as "TB I", zero past the end of a row, where anything may stand, NaN included."""
    if layer.lengths is not None:
        past = torch.arange(layer.steps, device=input.device)[:, None] >= layer.lengths
        input = input.masked_fill(past[..., None], 0)
    return input.reshape(layer.steps * layer.batch, input.shape[2])


def total(gradient: torch.Tensor | None, d: torch.Tensor) -> None:
    """gradient = the sum of d over steps and rows."""
    if gradient is not None:
        gradient.copy_(d.sum(0))


def input_gradients(
    layer: Layer, dinput: torch.Tensor | None, dweight: torch.Tensor | None, d: torch.Tensor, seen: torch.Tensor, weight: torch.Tensor
) -> None:
    """Of the input and of as many first rows of weight_ih as d has columns; seen: the living input."""
    if dinput is not None:
        _matmul.matmul(dinput.view(d.shape[0], dinput.shape[2]), d, weight[: d.shape[1]], layer.dtype)
    if dweight is not None:
        dweight[d.shape[1] :].zero_()
        _matmul.matmul(dweight[: d.shape[1]], d.mT, seen, layer.dtype)

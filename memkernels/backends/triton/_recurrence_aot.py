"""Signatures of the recurrent kernels for ahead-of-time compilation: the usual call, and calls with the options `given`."""

from __future__ import annotations

from typing import Any

import torch

from memkernels.backends.triton import _launch, _matmul
from memkernels.backends.triton import _recurrence_bwd as bwd
from memkernels.backends.triton import _recurrence_fwd as fwd
from memkernels.backends.triton._cells import GRU, LSTM
from memkernels.backends.triton._common import Aot, aot
from memkernels.backends.triton._recurrence import GATES

SHARED = 166912  # bytes a program may have on an A100, the least of the devices compiled for
ALWAYS = "output h_state projected weight h0 dz dhidden dh_state doutput"
OF_CELL = {LSTM.value: "cells gates c_state dc_state c0", GRU.value: "gates bias"}
FLOATS = "c_state projected hidden scratch gate_o dz dhidden dh_state dc_state dnew dmemory dgate_o dnormed raw"
OTHERS = dict.fromkeys(("lengths_ptr", "order_ptr", "seed_ptr"), "*i64") | dict.fromkeys(("zoneout_h", "zoneout_c", "keep_scale"), "fp32")


def entry(name: str, cell: int, backward: bool, dtype: torch.dtype, hidden: int, given: str = "") -> Aot:
    """The kernel of a layer with `hidden` units and the tensors `given`."""
    kernel = bwd.recurrence_bwd_kernel if backward else fwd.recurrence_fwd_kernel
    present = {f"{n}_ptr" for n in (*ALWAYS.split(), *OF_CELL.get(cell, "").split(), *given.split())}
    more = len(present & {"weight_co_ptr", "weight_hr_ptr"})
    tile = _launch.recurrence(hidden, hidden, GATES[cell], more, "norm_weight_ptr" in present, dtype.itemsize, backward, SHARED)
    constants: dict[str, Any] = {}
    for a in kernel.arg_names:
        owner = a.split("_stride_")[0] + "_ptr"
        if a.endswith("_ptr") and a not in present:
            constants[a] = None
        elif "_stride_" in a and owner not in present:
            constants[a] = 0
        elif a.endswith("_stride_h"):
            constants[a] = 1
    constants |= dict(
        CELL=cell, REVERSE=False, ZONEOUT=1 if "seed_ptr" in present else 0, DROPOUT="seed_ptr" in present,
        SOURCE=fwd.RESIDENT.value if tile.resident else fwd.LOOP.value, STAGE=0, BLOCK_B=tile.block_b, BLOCK_H=tile.block_h,
        BLOCK_P=tile.block_p, BLOCK_K=tile.block_k, AHEAD=tile.ahead, PRECISION=_matmul.product_precision(dtype),
    )  # fmt: skip
    types = {f"{a}_ptr": "*fp32" for a in FLOATS.split()} | {"reset_ptr": "*i1"} | OTHERS
    return aot(f"{name}_{'bwd' if backward else 'fwd'}_H{hidden}", kernel, dtype, constants, types, tile.num_warps)

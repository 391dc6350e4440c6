"""The spec of `memory_read`."""

from __future__ import annotations

import torch

from memkernels.ops.memory_read import memory_read
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, distribution
from memkernels.testing.twists import READ_SIZES


def _eager(memory, weights):
    return torch.matmul(weights, memory)


def _wrong_rows(inputs, options):
    inputs["weights"] = inputs["weights"].new_zeros(2, 3, 6)


def _wrong_dtype(inputs, options):
    inputs["weights"] = inputs["weights"].long()


SPEC = OpSpec(
    name="memory_read",
    function=memory_read,
    inputs={"memory": Input("B N W"), "weights": Input("B R N", distribution)},
    samples=(
        Sample("typical", dict(B=2, N=5, W=4, R=3)),
        *READ_SIZES,
    ),
    bench=(Sample("B4_N65536", dict(B=4, N=65536, W=64, R=4)), Sample("B32_N128", dict(B=32, N=128, W=64, R=4))),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * (d["N"] * d["W"] + d["R"] * (d["N"] + d["W"])),
    bytes_backward=lambda d, s: s * d["B"] * (2 * d["N"] * d["W"] + d["R"] * (2 * d["N"] + d["W"])),
    errors=(
        ErrorCase("rows", _wrong_rows, ValueError, r"memory_read: weights: expected .*N=5.*got .*6"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"memory_read: weights: expected .*float64.*got .*int64"),
    ),
    rows=(("memory", 0), ("weights", 0)),
)

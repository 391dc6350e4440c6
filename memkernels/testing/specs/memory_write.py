"""The spec of `memory_write`."""

from __future__ import annotations

import torch

from memkernels.ops.memory_write import memory_write
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, distribution, unit


def _eager(memory, weights, erase, add):
    kept = torch.prod(1 - torch.einsum("bhn,bhw->bhnw", weights, erase), dim=1)
    return memory * kept + torch.einsum("bhn,bhw->bnw", weights, add)


def _full_erase(inputs):
    """Factors of the product that are exactly zero, in one head and in two."""
    weights, erase = inputs["weights"].clone(), inputs["erase"].clone()
    weights[:, 0, 0], weights[:, :2, 1], erase[:, :2] = 1, 1, 1
    return {**inputs, "weights": weights, "erase": erase}


def _wrong_heads(inputs, options):
    inputs["erase"] = inputs["erase"].new_zeros(2, 4, 4)


def _wrong_dtype(inputs, options):
    inputs["add"] = inputs["add"].long()


SPEC = OpSpec(
    name="memory_write",
    function=memory_write,
    inputs={
        "memory": Input("B N W"),
        "weights": Input("B H N", distribution),
        "erase": Input("B H W", unit),
        "add": Input("B H W"),
    },
    samples=(
        Sample("typical", dict(B=2, N=5, W=4, H=1)),
        Sample("heads", dict(B=2, N=5, W=4, H=3)),
        Sample("full_erase", dict(B=2, N=5, W=4, H=3), twist=_full_erase),
        Sample("one", dict(B=1, N=1, W=1, H=1)),
        Sample("odd", dict(B=3, N=37, W=19, H=2)),
        Sample("wide", dict(B=2, N=67, W=65, H=5)),
        Sample("many_heads", dict(B=1, N=4, W=3, H=19)),
        Sample("no_batch", dict(B=0, N=5, W=4, H=3)),
        Sample("no_rows", dict(B=2, N=0, W=4, H=3)),
        Sample("no_width", dict(B=2, N=5, W=0, H=3)),
        Sample("no_heads", dict(B=2, N=5, W=4, H=0)),
    ),
    bench=(
        Sample("H1_B4_N65536", dict(B=4, N=65536, W=64, H=1)),
        Sample("H4_B4_N65536", dict(B=4, N=65536, W=64, H=4)),
        Sample("H4_B32_N128", dict(B=32, N=128, W=64, H=4)),
    ),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * (2 * d["N"] * d["W"] + d["H"] * (d["N"] + 2 * d["W"])),
    bytes_backward=lambda d, s: s * d["B"] * (3 * d["N"] * d["W"] + d["H"] * (2 * d["N"] + 4 * d["W"])),
    errors=(
        ErrorCase("heads", _wrong_heads, ValueError, r"memory_write: erase: expected .*H=1.*got .*4"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"memory_write: add: expected .*float64.*got .*int64"),
    ),
    rows=(("memory", 0), ("weights", 0), ("erase", 0), ("add", 0)),
)

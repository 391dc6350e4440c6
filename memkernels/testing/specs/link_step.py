"""The spec of `link_step`."""

from __future__ import annotations

import torch

from memkernels.ops.link_step import link_step
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, distribution


def links(shape, dtype, generator):
    """Non-negative, rows and columns sum to less than 1, diagonal 0."""
    values = torch.rand(shape, dtype=torch.float64, generator=generator) * (1 - torch.eye(shape[-1]))
    return (values / max(1, shape[-1])).to(dtype)


def _eager(link, precedence, write_weights, read_weights):
    kept = 1 - write_weights[..., None] - write_weights[..., None, :]
    new = (kept * link + write_weights[..., None] * precedence[..., None, :]) * (1 - torch.eye(link.shape[-1], dtype=link.dtype))
    last = (1 - write_weights.sum(-1, keepdim=True)) * precedence + write_weights
    read = read_weights[:, None]
    return new, last, (read @ new.mT).transpose(1, 2), (read @ new).transpose(1, 2)


def _one_hot(inputs):
    """Heads that write and read single rows; a row that was written last and is written again; a diagonal that holds garbage."""
    link, last, write, read = (inputs[name].clone() for name in ("link", "precedence", "write_weights", "read_weights"))
    link.diagonal(dim1=-2, dim2=-1).fill_(torch.nan)
    for t, row in ((write, 1), (last, 1), (read, 0)):
        t[:, 0] = 0
        t[:, 0, row] = 1
    return dict(link=link, precedence=last, write_weights=write, read_weights=read)


def _wrong_link(inputs, options):
    inputs["link"] = inputs["link"][..., :3]


def _wrong_dtype(inputs, options):
    inputs["read_weights"] = inputs["read_weights"].half()


SPEC = OpSpec(
    name="link_step",
    function=link_step,
    inputs={
        "link": Input("B H N N", links),
        "precedence": Input("B H N", distribution),
        "write_weights": Input("B H N", distribution),
        "read_weights": Input("B R N", distribution),
    },
    samples=(
        Sample("typical", dict(B=2, H=2, N=5, R=3)),
        Sample("one_hot", dict(B=2, H=2, N=7, R=2), twist=_one_hot, hard=True),
        Sample("odd", dict(B=2, H=1, N=37, R=5)),
        Sample("no_reads", dict(B=2, H=1, N=5, R=0)),
        Sample("chunks", dict(B=1, H=2, N=150, R=1), hard=True),
    ),
    bench=(Sample("B8_N512", dict(B=8, H=1, N=512, R=4)), Sample("B32_N128", dict(B=32, H=1, N=128, R=4))),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * d["H"] * d["N"] * (2 * d["N"] + 3 + 2 * d["R"]),
    bytes_backward=lambda d, s: s * d["B"] * d["H"] * d["N"] * (3 * d["N"] + 5 + 2 * d["R"]),
    errors=(
        ErrorCase("link", _wrong_link, ValueError, r"link_step: link: expected .*N=5.*got .*3"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"link_step: read_weights: expected float64, got float16"),
    ),
    rows=(("link", 0), ("precedence", 0), ("write_weights", 0), ("read_weights", 0)),
)

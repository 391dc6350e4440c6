"""The spec of `link_read`."""

from __future__ import annotations

from memkernels.ops.link_read import link_read
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, distribution
from memkernels.testing.specs.link_step import links


def _eager(link, read_weights):
    read = read_weights[:, None]
    return (read @ link.mT).transpose(1, 2), (read @ link).transpose(1, 2)


def _wrong_rows(inputs, options):
    inputs["read_weights"] = inputs["read_weights"][..., :3]


SPEC = OpSpec(
    name="link_read",
    function=link_read,
    inputs={"link": Input("B H N N", links), "read_weights": Input("B R N", distribution)},
    samples=(
        Sample("typical", dict(B=2, H=2, N=5, R=3)),
        Sample("odd", dict(B=2, H=1, N=37, R=6)),
        Sample("no_reads", dict(B=2, H=1, N=5, R=0)),
    ),
    bench=(Sample("B8_N512", dict(B=8, H=1, N=512, R=4)),),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * d["H"] * d["N"] * (d["N"] + 3 * d["R"]),
    bytes_backward=lambda d, s: s * d["B"] * d["H"] * d["N"] * (2 * d["N"] + 4 * d["R"]),
    errors=(ErrorCase("rows", _wrong_rows, ValueError, r"link_read: read_weights: expected .*N=5.*got .*3"),),
    rows=(("link", 0), ("read_weights", 0)),
)

"""The spec of `weighted_bag`."""

from __future__ import annotations

import torch

from memkernels.ops.weighted_bag import weighted_bag
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample


def _eager(table, index, weight, sparse=False):
    if table.shape[0] == 0:
        raise NotImplementedError("K=0")
    absent = index < 0
    rows = torch.nn.functional.embedding(index.clamp(min=0), table, sparse=sparse).masked_fill(absent[..., None], 0)
    return (weight.masked_fill(absent, 0)[..., None] * rows).sum(1)


def _embedding_bag(table, index, weight, sparse=False):
    """torch's own bag, for calls where nothing is absent."""
    return torch.nn.functional.embedding_bag(index, table, mode="sum", per_sample_weights=weight, sparse=sparse)


def _draw_index(shape, dtype, generator):
    return torch.randint(2**40, shape, generator=generator)


def _in_range(inputs):
    """Rows of the table and, one time in K + 1, nothing."""
    return {**inputs, "index": inputs["index"] % (inputs["table"].shape[0] + 1) - 1}


def _all_there(inputs):
    return {**inputs, "index": inputs["index"] % inputs["table"].shape[0]}


def _twisted(change):
    return lambda inputs: change(_in_range(inputs))


def _hub(inputs):
    """Two places in three name row 1, and every bag names a row twice."""
    index, row = inputs["index"], min(1, inputs["table"].shape[0] - 1)
    index[:, ::3], index[:, 1::3] = row, row
    return inputs


def _nan_nobody_reads(inputs):
    """A bag without rows, absent places between, NaN in their weights and in rows that nobody names."""
    index, weight = inputs["index"], inputs["weight"]
    index[0], index[1:, 1] = -1, -1
    index[index == 2] = -1
    inputs["table"][2], weight[index < 0] = torch.nan, torch.nan
    return inputs


def _sizes(K=7, B=3, J=5, D=6):
    return dict(K=K, B=B, J=J, D=D)


def _sample(name, sizes, twist=None, hard=False):
    return Sample(name, sizes, {}, (), _in_range if twist is None else _twisted(twist), hard)


def _wrong_index(value):
    def change(inputs, options):
        inputs["index"][1, 2] = value

    return change


def _wrong_index_dtype(inputs, options):
    inputs["index"] = inputs["index"].short()


def _wrong_weight(inputs, options):
    inputs["weight"] = inputs["weight"].new_zeros(3, 4)


BENCH = _sizes(262_144, 1024, 128, 256)
SPEC = OpSpec(
    name="weighted_bag",
    function=weighted_bag,
    inputs={"table": Input("K D"), "index": Input("B J", _draw_index, torch.int64), "weight": Input("B J")},
    samples=(
        _sample("typical", _sizes()),
        _sample("odd", _sizes(K=19, B=9, J=21, D=37), _hub),
        _sample("wide", _sizes(K=40, B=3, J=35, D=530)),
        _sample("one", _sizes(1, 1, 1, 1)),
        _sample("unread", _sizes(B=4), _nan_nobody_reads, hard=True),
        _sample("no_rows", _sizes(K=0)),
        _sample("no_places", _sizes(J=0)),
    ),
    bench=(Sample("B1024_J128_K262144_D256", BENCH, {}, (), _all_there),),
    peers={"eager": _eager, "embedding_bag": _embedding_bag},
    bytes=lambda d, s: s * (d["B"] * d["J"] * (d["D"] + 1) + d["B"] * d["D"]) + 8 * d["B"] * d["J"],
    bytes_backward=lambda d, s: s * (d["B"] * d["J"] * (d["D"] + 2) + d["B"] * d["D"] + d["K"] * d["D"]) + 8 * d["B"] * d["J"],
    errors=(
        ErrorCase("index", _wrong_index(7), IndexError, r"weighted_bag: index: expected -1 or rows 0 to K-1=6, got .*7"),
        ErrorCase("negative", _wrong_index(-2), IndexError, r"weighted_bag: index: expected -1 .*got -2"),
        ErrorCase("index_dtype", _wrong_index_dtype, TypeError, r"weighted_bag: index: expected int64 or int32, got int16"),
        ErrorCase("weight", _wrong_weight, ValueError, r"weighted_bag: weight: expected .*J=5.*got .*4\)"),
        ErrorCase("sparse", lambda i, o: o.update(sparse=1), TypeError, r"weighted_bag: sparse: expected True or False, got 1"),
    ),
    rows=(("weight", 0),),
    gaps=("On a GPU, an index outside -1 .. K - 1 counts as absent instead of being refused.",),
)

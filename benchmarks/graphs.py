"""The speeds promised for attention along the edges of graphs (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from target import Target

from memkernels.bench.peers import invoke
from memkernels.bench.row import Row
from memkernels.bench.runner import Call, Case, alternating
from memkernels.testing.inputs import draw
from memkernels.testing.spec import specs


def graph_targets() -> Iterator[Target]:
    """Graph attention against the form that materialises every edge's rows; hubs must cost no more than as many edges elsewhere."""
    uniform, power_law = specs()["segment_attention"].bench
    for sample in (uniform, power_law):
        yield Target("segment_attention", sample, "fwd+bwd", dict(eager=8, torch_geometric=8), peers={"torch_geometric": _geometric})
        yield Target("segment_attention", sample, "fwd+bwd peak", dict(peak=0.2), rows=_peak)
    yield Target("segment_attention", power_law, "fwd+bwd", {"uniform degrees": 1 / 1.5}, rows=_against_uniform)


_graph: dict[str, Any] = {}


def _geometric(query, key, value, ptr, index, edge_bias):
    """The core of torch_geometric's TransformerConv; layer and list of edges are made once, as a model would."""
    from torch_geometric.nn import TransformerConv

    assert edge_bias is None, "TransformerConv has none"
    if _graph.get("index") is not index:
        heads, width = value.shape[1:]
        node = torch.repeat_interleave(torch.diff(ptr), output_size=index.shape[0])
        layer = TransformerConv(heads * width, width, heads=heads, root_weight=False)
        _graph.update(index=index, edges=torch.stack((index, node)), layer=layer)
    return _graph["layer"].propagate(_graph["edges"], query=query, key=key, value=value, edge_attr=None)


def _peak(case: Case, seconds: float) -> Iterable[Row]:
    """Peak memory beyond inputs, outputs and gradients, over that of eager; `ms` and `peer_ms` are megabytes here."""
    (row,) = case.rows(["fwd+bwd"], ["eager"], seconds)
    mine, theirs = row.extra_mb, row.peer_extra_mb
    ratio = None if mine is None or not theirs else mine / theirs
    numbers = dict(ms=mine or 0.0, peer_ms=theirs, ratio=ratio, gb_s=None, floor=None)
    yield dataclasses.replace(row, mode="fwd+bwd peak", peer="", note="MB, not ms", **numbers)


def _against_uniform(case: Case, seconds: float) -> Iterable[Row]:
    """`peer_ms` is the same number of edges spread evenly."""
    case.check()
    uniform, function = specs()["segment_attention"].bench[0], invoke(case.spec)
    calls = [Call(case.spec, function, s, draw(case.spec, s, case.dtype)) for s in (case.sample, uniform)]

    def both(call):
        return lambda: lambda: call.gradients(call.train())

    mine, even = alternating([both(call) for call in calls], seconds)
    yield dataclasses.replace(case.row("fwd+bwd", mine, "uniform degrees", even, ""), ratio=even / mine)

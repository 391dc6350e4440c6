"""The speeds promised for attention joined from parts, with retrieved memories and over an int8 memory (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from target import BF16, Target

import memkernels
from memkernels.bench.peers import invoke
from memkernels.bench.row import Row
from memkernels.bench.runner import Call, Case, interleaved
from memkernels.testing.inputs import draw
from memkernels.testing.spec import Sample, specs


def memory_targets() -> Iterator[Target]:
    """Rows of merge_attention, retrieval_attention and quantized_attention."""
    parts = dict(S=4, B=4, NH=8, Q=1024, V=64)
    yield Target("merge_attention", Sample("S4_B4_Q1024", parts), "fwd+bwd", dict(eager=3))
    yield Target("merge_attention", Sample("S4_B4_Q1024_list", parts, dict(form="sequences")), "fwd+bwd", dict(eager=1.5))
    sample = specs()["retrieval_attention"].sample("S512_k32_N65536")
    yield Target("retrieval_attention", sample, "fwd+bwd", dict(eager=10))
    yield Target("retrieval_attention", sample, "fwd+bwd peak", {"local peak": 1.2}, rows=_against_local)
    yield Target("retrieval_attention", sample, "forward", dict(eager=5))
    for queries, dtype in ((1, torch.float32), (4, torch.float32), (16, torch.float32), (4, BF16)):
        few = Sample(f"B1_Q{queries}_K65536", dict(B=1, NH=8, NHk=8, Q=queries, K=65536, D=64, V=64))
        for mode in ("forward", "fwd+bwd"):
            bars = dict(sdpa=2, attention=1.5)
            yield Target("quantized_attention", few, mode, bars, dtype, rows=partial(_widened_before, mode))


def _widened_before(mode: str, case: Case, seconds: float) -> Iterable[Row]:
    """Against attention on a memory of the query's dtype, made before: that is not timed. Gradients are the query's."""
    case.check()
    inputs = draw(case.spec, case.sample, case.dtype)
    memory = [(inputs[name] * inputs[f"{name}_scale"][..., None]).to(case.dtype) for name in ("key", "value")]
    peers = {"sdpa": F.scaled_dot_product_attention, "attention": memkernels.attention}

    def on_widened(function):
        return lambda given, options: function(given["query"], *memory)

    functions = [invoke(case.spec), *(on_widened(function) for function in peers.values())]
    calls = [Call(case.spec, function, case.sample, inputs) for function in functions]
    times = interleaved(calls, mode, "cpu", seconds)
    extra = [call.extra_mb(mode, "cpu") for call in calls]
    held, wide = (sum(t.nbytes for t in kept) * 1e-6 for kept in ([t for n, t in inputs.items() if n != "query" and t is not None], memory))
    for name, theirs, peer_extra in zip(peers, times[1:], extra[1:], strict=True):
        row = case.row(mode, times[0], name, theirs, f"memory of {held:.0f} MB, the peer's {wide:.0f} MB, widened before")
        yield dataclasses.replace(row, extra_mb=extra[0], peer_extra_mb=peer_extra)


def _against_local(case: Case, seconds: float) -> Iterable[Row]:
    """Peak memory beyond inputs, outputs and gradients, over that of the local attention alone; `ms` and `peer_ms` are megabytes here."""
    case.check()
    local, dims = specs()["attention"], {name: case.sample.dims[name] for name in ("B", "NH", "NHk", "Q", "K", "D", "V")}
    sizes = []
    for spec, sample in ((case.spec, case.sample), (local, Sample("local", dims, dict(is_causal=True)))):
        call = Call(spec, invoke(spec), sample, draw(spec, sample, case.dtype))
        call.gradients(call.train())
        sizes.append(call.extra_mb("fwd+bwd", "cpu"))
    mine, theirs = sizes
    ratio = None if mine is None or not theirs else mine / theirs
    row = case.row("fwd+bwd peak", mine or 0.0, "", theirs, "MB, not ms")
    yield dataclasses.replace(row, ms=mine or 0.0, peer_ms=theirs, ratio=ratio, gb_s=None, floor=None)

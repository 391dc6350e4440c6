"""The speeds promised for attention over ragged sequences and over pages (read by targets.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from target import BF16, Target

from memkernels.bench.peers import invoke
from memkernels.bench.row import Row
from memkernels.bench.runner import Call, Case, interleaved
from memkernels.testing.inputs import draw
from memkernels.testing.spec import specs


def sequence_targets() -> Iterator[Target]:
    """Rows of attention_varlen and paged_attention."""
    yield from _varlen()
    yield from _paged()


def _varlen() -> Iterator[Target]:
    """Ragged sequences, against a loop of torch's calls and against one call on padded rows with a mask."""
    for sample in specs()["attention_varlen"].bench:
        for dtype, loop, padded in ((torch.float32, 1.25, 3), (BF16, 1.5, 3)):
            yield Target("attention_varlen", sample, "forward", dict(sdpa=loop, padded=padded), dtype)
            yield Target("attention_varlen", sample, "fwd+bwd", dict(sdpa=loop, padded=padded), dtype)


def _paged() -> Iterator[Target]:
    """Decoding: one query a row."""
    for sample in specs()["paged_attention"].bench:
        for dtype in (torch.float32, BF16):
            yield Target("paged_attention", sample, "forward", {"sdpa": 1.5}, dtype, rows=gathered)


def gathered(case: Case, seconds: float) -> Iterable[Row]:
    """Against torch's attention on keys that were gathered from their pages before: that is not timed."""
    case.check()
    inputs = draw(case.spec, case.sample, case.dtype)
    rows = {n: inputs[n][inputs["page_table"]].flatten(1, 2).transpose(1, 2).contiguous() for n in ("key_pages", "value_pages")}

    def sdpa(query, key_pages, value_pages, page_table, lengths):
        return F.scaled_dot_product_attention(query, *rows.values(), enable_gqa=query.shape[1] != key_pages.shape[2])

    def invoke_sdpa(given, options):
        return sdpa(**given)

    calls = [Call(case.spec, function, case.sample, inputs) for function in (invoke(case.spec), invoke_sdpa)]
    mine, theirs = interleaved(calls, "forward", "cpu", seconds)
    yield case.row("forward", mine, "sdpa", theirs, "the peer is given gathered keys")

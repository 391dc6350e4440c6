"""The speeds promised for attention joined from parts and with retrieved memories (read by targets.py)."""

from __future__ import annotations

from collections.abc import Iterator

from target import Target

from memkernels.testing.spec import Sample, specs


def memory_targets() -> Iterator[Target]:
    """Rows of merge_attention and retrieval_attention."""
    parts = dict(S=4, B=4, NH=8, Q=1024, V=64)
    yield Target("merge_attention", Sample("S4_B4_Q1024", parts), "fwd+bwd", dict(eager=3))
    yield Target("merge_attention", Sample("S4_B4_Q1024_list", parts, dict(form="sequences")), "fwd+bwd", dict(eager=1.5))
    sample = specs()["retrieval_attention"].sample("S512_k32_N65536")
    yield Target("retrieval_attention", sample, "fwd+bwd", dict(eager=10))
    yield Target("retrieval_attention", sample, "forward", dict(eager=5))

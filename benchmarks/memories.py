"""The speeds promised for memories whose rows are retrieved, and for attention joined from parts (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from target import Target

from memkernels.testing.spec import Sample, specs


def memory_targets() -> Iterator[Target]:
    """Rows of merge_attention, retrieval_attention, weighted_bag and hopfield_retrieve."""
    parts = dict(S=4, B=4, NH=8, Q=1024, V=64)
    yield Target("merge_attention", Sample("S4_B4_Q1024", parts), "fwd+bwd", dict(eager=3))
    yield Target("merge_attention", Sample("S4_B4_Q1024_list", parts, dict(form="sequences")), "fwd+bwd", dict(eager=1.5))
    sample = specs()["retrieval_attention"].sample("S512_k32_N65536")
    yield Target("retrieval_attention", sample, "fwd+bwd", dict(eager=10))
    yield Target("retrieval_attention", sample, "forward", dict(eager=5))
    bag = specs()["weighted_bag"].bench[0]
    yield Target("weighted_bag", bag, "fwd+bwd", dict(embedding_bag=3))
    yield Target("weighted_bag", bag, "forward", dict(embedding_bag=2))
    sparse = dataclasses.replace(bag, name=f"{bag.name}_sparse", options=dict(sparse=True))
    yield Target("weighted_bag", sparse, "fwd+bwd", dict(embedding_bag=1))
    hopfield = specs()["hopfield_retrieve"].bench[0]
    yield Target("hopfield_retrieve", hopfield, "fwd+bwd", dict(eager=1.5, compile=1))
    yield Target("hopfield_retrieve", hopfield, "forward", dict(eager=1.5, compile=1))

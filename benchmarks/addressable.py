"""The speeds promised for addressable memories: the rows that an index or an association names (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from target import Target

from memkernels.testing.spec import specs


def addressable_targets() -> Iterator[Target]:
    """Rows of weighted_bag and hopfield_retrieve."""
    bag = specs()["weighted_bag"].bench[0]
    yield Target("weighted_bag", bag, "fwd+bwd", dict(embedding_bag=3))
    yield Target("weighted_bag", bag, "forward", dict(embedding_bag=2))
    sparse = dataclasses.replace(bag, name=f"{bag.name}_sparse", options=dict(sparse=True))
    yield Target("weighted_bag", sparse, "fwd+bwd", dict(embedding_bag=1))
    hopfield = specs()["hopfield_retrieve"].bench[0]
    yield Target("hopfield_retrieve", hopfield, "fwd+bwd", dict(eager=1.5, compile=1))
    yield Target("hopfield_retrieve", hopfield, "forward", dict(eager=1.5, compile=1))

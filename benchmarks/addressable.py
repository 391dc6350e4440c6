"""The speeds promised for addressable memories: their addresses and the rows they name (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from target import Target

from memkernels.testing.spec import specs


def addressable_targets() -> Iterator[Target]:
    """Rows of location_address and weighted_bag."""
    yield Target("location_address", specs()["location_address"].sample("B32_R4_N1024"), "fwd+bwd", dict(eager=6))
    bag = specs()["weighted_bag"].bench[0]
    yield Target("weighted_bag", bag, "fwd+bwd", dict(embedding_bag=3))
    yield Target("weighted_bag", bag, "forward", dict(embedding_bag=2))
    sparse = dataclasses.replace(bag, name=f"{bag.name}_sparse", options=dict(sparse=True))
    yield Target("weighted_bag", sparse, "fwd+bwd", dict(embedding_bag=1))

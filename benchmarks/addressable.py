"""The speeds promised for memories whose rows an index or an association names (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from target import Target

from memkernels.bench.peers import invoke, peer
from memkernels.bench.row import Row
from memkernels.bench.runner import Call, Case, alternating
from memkernels.testing.inputs import draw
from memkernels.testing.spec import specs


def addressable_targets() -> Iterator[Target]:
    """Rows of weighted_bag and hopfield_retrieve."""
    bag = specs()["weighted_bag"].bench[0]
    yield Target("weighted_bag", bag, "fwd+bwd", dict(embedding_bag=3))
    yield Target("weighted_bag", bag, "forward", dict(embedding_bag=2))
    yield Target("weighted_bag", bag, "fwd+bwd sparse", dict(embedding_bag=1), rows=_sparse_bag)
    hopfield = specs()["hopfield_retrieve"].bench[0]
    yield Target("hopfield_retrieve", hopfield, "fwd+bwd", dict(eager=1.5, compile=1))
    yield Target("hopfield_retrieve", hopfield, "forward", dict(eager=1.5, compile=1))


def _sparse_bag(case: Case, seconds: float) -> Iterable[Row]:
    """Sparse gradient of the table against the peer's dense one; the dense one is checked, tests hold the sparse one to it."""
    case.check()
    given = draw(case.spec, case.sample, case.dtype)
    sparse = dataclasses.replace(case.sample, options=dict(sparse=True))
    calls = [Call(case.spec, invoke(case.spec), sparse, given), Call(case.spec, peer(case.spec, "embedding_bag"), case.sample, given)]

    def both(call):
        return lambda: lambda: call.gradients(call.train())

    mine, theirs = alternating([both(call) for call in calls], seconds)
    yield dataclasses.replace(case.row("fwd+bwd sparse", mine, "embedding_bag", theirs, ""), ratio=theirs / mine)

"""A speed that this project promises, and how it is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from memkernels.bench.environment import ceilings
from memkernels.bench.row import Row
from memkernels.bench.runner import Case
from memkernels.testing.spec import OpSpec, Sample, specs

BF16 = torch.bfloat16
AT_MOST = ("us", "backward", "saved", "peak", "local peak")  # bars that a figure must not exceed; the others are to be reached
# Where a bar is not named after its peer.
PEERS = {"per token": "without lengths", "backward": "", "saved": "", "peak": "", "local peak": "", "us": "", "read": ""}


@dataclass(frozen=True)
class Target:
    """One op at one size and mode.

    `bars` maps a peer to the ratio to reach, "us" to microseconds not to exceed, "read" to the least part of the machine's read bandwidth,
    "per token" to the ratio per token to a batch of full rows; `peers` are compared with beside those of the spec; `rows` measures what
    `Case.rows` cannot.
    """

    op: str
    sample: Sample
    mode: str
    bars: Mapping[str, float]
    dtype: torch.dtype = torch.float32
    inputs: Mapping[str, Any] = field(default_factory=dict)  # other draws for some inputs of the spec
    rows: Callable[[Case, float], Iterable[Row]] | None = None
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.sample.name} {str(self.dtype).removeprefix('torch.')} {self.mode}"

    @property
    def spec(self) -> OpSpec:
        spec = specs()[self.op]
        inputs = {name: dataclasses.replace(i, draw=self.inputs.get(name, i.draw)) for name, i in spec.inputs.items()}
        return dataclasses.replace(spec, inputs=inputs, peers={**spec.peers, **self.peers})


def measure(target: Target, seconds: float) -> list[dict[str, Any]]:
    """One dict per bar: the row's fields, what it had to reach and whether it did."""
    case = Case(target.spec, target.sample, target.dtype)
    peers = [peer for name in target.bars if (peer := PEERS.get(name, name))]
    rows = list(target.rows(case, seconds) if target.rows else case.rows([target.mode], peers, seconds))
    found = []
    for name, bar in target.bars.items():
        row = next((r for r in rows if r.peer == PEERS.get(name, name)), rows[0])
        measured = _figure(name, row, target)
        reached = measured is not None and (measured <= bar if name in AT_MOST else measured >= bar)
        verdict = {"needed": bar, "at_most": name in AT_MOST, "measured": measured, "reached": reached}
        found.append({**dataclasses.asdict(row), "target": target.name, "bar": name, **verdict})
    return found


def _figure(name: str, row: Row, target: Target) -> float | None:
    if name == "us":
        return row.ms * 1e3
    if name == "read":
        return (row.gb_s or 0.0) / ceilings("cpu", torch.get_num_threads())["read_gb_s"]
    if name == "per token" and row.ratio is not None:
        return row.ratio * _tokens(target)
    return row.ratio


def _tokens(target: Target) -> float:
    """The part of a batch of full rows that the lengths of a sample leave."""
    d = target.sample.dims
    shape = {"input": torch.empty(d["T"], d["B"], 0)}
    return float(target.sample.twist(shape)["lengths"].sum()) / (d["T"] * d["B"])  # type: ignore[misc, union-attr]

"""Measuring ops one after the other, so that one that fails its check does not take the others with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memkernels import bench
from memkernels.testing.spec import specs

TORCHS_OWN = ("torch", "sdpa")  # what torch itself has for the same job: nn.LSTM, scaled_dot_product_attention
PEERS = ("eager", "compile", *TORCHS_OWN)


def measure(console: Console, ops: Sequence[str] | None, **options: Any) -> tuple[list[bench.Row], dict[str, str]]:
    """`bench.run` for each op, with a status line.

    Returns: all rows, and for every op whose result was wrong (it is not timed then) what was wrong.

    Raises: ValueError for an unknown op.
    """
    rows: list[bench.Row] = []
    failures: dict[str, str] = {}
    known = specs()
    for op in ops or ():
        if op not in known:
            raise ValueError(f"bench: ops: expected one of {', '.join(known)}, got {op!r}")
    with console.status("measuring") as status:
        for op in ops or known:
            status.update(f"measuring {op}")
            try:
                rows += bench.run([op], **options)
            except AssertionError as error:
                failures[op] = str(error)
    return rows, failures


def speed_table(rows: Sequence[bench.Row]) -> Table:
    """One line an op, size and mode: our time, the peers' times, and how many times faster we are."""
    table = Table(title=f"Median milliseconds, float32, {torch.get_num_threads()} threads (times faster than the peer)")
    for head in ("op", "size", "mode", "backend", "fused", "eager", "torch.compile", "torch's own", "of floor"):
        table.add_column(head, justify="left" if head in ("op", "size", "mode", "backend") else "right")
    for case in dict.fromkeys((row.op, row.size, row.mode) for row in rows):
        mine = {row.peer: row for row in rows if (row.op, row.size, row.mode) == case}
        first = next(iter(mine.values()))
        floor = "-" if first.floor is None else f"{first.floor:.0%}"
        own = next((mine[name] for name in TORCHS_OWN if name in mine), None)
        table.add_row(*case, first.backend, f"{first.ms:.3g}", *map(_peer, (mine.get("eager"), mine.get("compile"), own)), floor)
    return table


def _peer(row: bench.Row | None) -> str:
    if row is None:
        return "-"
    if row.peer_ms is None or row.ratio is None:
        return "failed, see below"
    return f"{row.peer_ms:.3g} ({row.ratio:.1f}x)"

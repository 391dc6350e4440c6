"""Rows as a table, as JSON with their environment, as plots."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memkernels.bench.environment import environment
from memkernels.bench.row import Row

HEAD = ("op", "size", "dtype", "mode", "ms", "peer", "peer ms", "ratio", "GB/s", "of floor", "extra MB", "peer extra MB")


def _cells(row: Row) -> tuple[str, ...]:
    def number(value: float | None, digits: str) -> str:
        return "-" if value is None else format(value, digits)

    head = (row.op, row.size, row.dtype, row.mode, number(row.ms, ".3g"), row.peer)
    speed = (number(row.peer_ms, ".3g"), number(row.ratio, ".2f"), number(row.gb_s, ".1f"), number(row.floor, ".0%"))
    return (*head, *speed, number(row.extra_mb, ".1f"), number(row.peer_extra_mb, ".1f"))


def table(rows: Sequence[Row], markdown: bool = False) -> str:
    """The rows as text columns, or as a Markdown table."""
    lines = [HEAD, *(_cells(row) for row in rows)]
    if markdown:
        body = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([body[0], "|" + "---|" * len(HEAD), *body[1:]])
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows with the environment they were measured in, ready for JSON."""
    device = rows[0].device if rows else "cpu"
    return {"environment": environment(device), "rows": [dataclasses.asdict(row) for row in rows]}


def write_json(path: str | os.PathLike[str], rows: Sequence[Row], **extra: Any) -> Path:
    """Write `report(rows)` and any extra entries; the file appears whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_text(json.dumps({**report(rows), **extra}, indent=1) + "\n")
    os.replace(beside, target)
    return target


def plot(rows: Sequence[Row], folder: str | os.PathLike[str]) -> list[Path]:
    """One PNG per mode: how many times faster than each peer, a line at 1. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("bench: plot: needs matplotlib, install memkernels[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for mode in dict.fromkeys(row.mode for row in rows):
        chosen = [row for row in rows if row.mode == mode and row.ratio is not None]
        if not chosen:
            continue
        labels = list(dict.fromkeys(f"{row.op} {row.size} {row.dtype}" for row in chosen))
        peers = list(dict.fromkeys(row.peer for row in chosen))
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(labels) * max(1, len(peers) / 2)))
        height = 0.8 / len(peers)
        for index, peer in enumerate(peers):
            points = [(labels.index(f"{r.op} {r.size} {r.dtype}"), r.ratio) for r in chosen if r.peer == peer]
            axes.barh(
                [i + (index - (len(peers) - 1) / 2) * height for i, _ in points], [ratio or 0.0 for _, ratio in points], height, label=peer
            )
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(range(len(labels)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("times faster than the peer (1 = equal)")
        axes.set_title(f"{mode}, {chosen[0].threads} threads, {chosen[0].device}")
        axes.legend(fontsize=8)
        figure.tight_layout()
        path = target / f"bench_{mode.replace('+', '_')}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written

"""`memkernels verify`: every op x backend x dtype against float64 on this machine, as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from memkernels._backends import NAMES
from memkernels.bench.environment import environment
from memkernels.cli.files import write_text
from memkernels.testing import compare


@dataclass
class Summary:
    """One op on one backend in one dtype."""

    op: str
    backend: str
    dtype: str
    cases: int = 0
    worst: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})
    limits: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)

    def add(self, row: compare.Row) -> None:
        if row.status == "unavailable":
            self.unavailable.append(row.reason)
            return
        self.cases += 1
        if row.status == "ok":
            self.worst[row.direction] = max(self.worst[row.direction], row.ratio)
            self.limits[row.direction] = row.limit
        else:
            self.failures.append(f"{row.sample} {row.direction}: {row.reason}")

    @property
    def status(self) -> str:
        return "FAIL" if self.failures else "ok" if self.cases else "not run"


def summarize(rows: Iterable[compare.Row]) -> list[Summary]:
    found: dict[tuple[str, str, str], Summary] = {}
    for row in rows:
        key = (row.op, row.backend, row.dtype)
        found.setdefault(key, Summary(*key)).add(row)
    return list(found.values())


Names = Sequence[str] | None


def backends() -> list[str]:
    """What --backend may name: every backend, here or not, and the instruction-set levels of the C++ one."""
    return [*NAMES, *(f"cpp:{level}" for level in compare.levels())]


def dtypes() -> list[str]:
    """What --dtype may name."""
    return [str(d).removeprefix("torch.") for d in compare.DTYPES]


def run(console: Console, ops: Names, backends: Names, dtypes: Names, device: str, json_path: Path | None) -> list[Summary]:
    """Verifies with a progress line, prints the table, writes the rows."""
    kinds = [getattr(torch, name) for name in dtypes] if dtypes else None
    rows = []
    with Progress(TextColumn("verifying {task.description}"), console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        for row in compare.verify(ops or None, backends or None, kinds, device):
            rows.append(row)
            progress.update(task, description=f"{row.op} on {row.backend} in {row.dtype} ({len(rows)} comparisons)")
    summaries = summarize(rows)
    show(console, summaries)
    if json_path is not None:
        write_text(json_path, json.dumps({"environment": environment(device), "rows": [row.json() for row in rows]}, indent=1) + "\n")
    return summaries


def show(console: Console, summaries: Sequence[Summary]) -> None:
    """One line an op and backend: the worst error of each dtype in units of the error that plain torch makes."""
    dtypes = list(dict.fromkeys(s.dtype for s in summaries))
    cells: dict[tuple[str, str], dict[str, Summary]] = {}
    for s in summaries:
        cells.setdefault((s.op, s.backend), {})[s.dtype] = s
    table = Table(title="Error against float64, worst of all cases, as a multiple of plain torch's own: forward / backward")
    for head in ("op", "backend"):
        table.add_column(head, no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    absent: dict[str, list[str]] = {}
    for (op, backend), by_dtype in cells.items():
        reasons = [reason for s in by_dtype.values() for reason in s.unavailable]
        if reasons and all(s.status == "not run" for s in by_dtype.values()):
            absent.setdefault(f"{backend}: {reasons[0]}", []).append(op)
            continue
        table.add_row(op, backend, *(_cell(by_dtype[d]) if d in by_dtype else "-" for d in dtypes))
    console.print(table)
    for reason, ops in absent.items():
        console.print(f"not run on {reason} ({', '.join(ops)})", highlight=False, markup=False)
    limits = next((s.limits for s in summaries if len(s.limits) == 2), {})
    if limits:
        console.print(f"allowed: {limits['forward']:g} / {limits['backward']:g}; {sum(s.cases for s in summaries)} comparisons")
    for s in summaries:
        for failure in s.failures[:3]:
            console.print(f"FAIL {s.op} on {s.backend} in {s.dtype}, {failure}", style="red", highlight=False, markup=False)


def _cell(s: Summary) -> str:
    if s.failures:
        return f"[red]FAIL {len(s.failures)}[/]"
    if not s.cases:
        return "not run"
    return f"{s.worst['forward']:.2f} / {s.worst['backward']:.2f}"


def plain(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """For a JSON report."""
    return [{"status": s.status, **asdict(s)} for s in summaries]

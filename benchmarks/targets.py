"""The speeds this project promises, each with its bar: `make bench` measures them all and says which are reached.

    python benchmarks/targets.py [--only REGEX] [--seconds S] [--threads N] [--results FILE] [--list]

Writes benchmarks/results/<date>-<cpu>.json; rows already in that file and not measured again stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from addressable import addressable_targets
from attention import attention_targets
from dnc import dnc_targets
from graphs import graph_targets
from memories import memory_targets
from ntm import ntm_targets
from recurrent import recurrent_targets
from search import search_targets
from sequences import sequence_targets
from store import StoreTarget, store_targets
from target import Target, measure

from memkernels import bench, cpu_level
from memkernels.bench.environment import binding_note, cpu_model
from memkernels.testing.spec import Sample, specs

RESULTS = Path(__file__).resolve().parent / "results"
AGAINST = {
    "us": "us a call",
    "read": "read bandwidth",
    "backward": "one backward",
    "saved": "saved by torch",
    "peak": "peak of eager",
    "local peak": "peak of attention",
}


def targets() -> Iterator[Target | StoreTarget]:
    """All of them, in the order of the table."""
    for b, n, bars in ((4, 65536, dict(eager=8, compile=4)), (16, 4096, dict(eager=5, compile=2.5)), (32, 128, dict(eager=1.5))):
        yield Target("content_read", Sample(f"B{b}_N{n}", dict(B=b, N=n, W=64, R=4, V=64)), "fwd+bwd", bars)
    yield Target("content_read", Sample("B4_N65536", dict(B=4, N=65536, W=64, R=4, V=64)), "forward", dict(eager=6, compile=3, read=0.5))
    for h, bars in ((1, dict(eager=4, compile=1.5)), (4, dict(eager=12, compile=5))):
        yield Target("memory_write", Sample(f"H{h}_B4_N65536", dict(B=4, N=65536, W=64, H=h)), "fwd+bwd", bars)
    yield from attention_targets()
    yield from sequence_targets()
    yield from memory_targets()
    yield from addressable_targets()
    yield from dnc_targets()
    yield from ntm_targets()
    yield from graph_targets()
    yield from search_targets()
    yield from recurrent_targets()
    yield from store_targets()
    for spec in specs().values():
        tiny = dataclasses.replace(spec.samples[0], name="tiny")
        yield Target(spec.name, tiny, "forward", dict(us=15))
        yield Target(spec.name, tiny, "training forward", dict(us=45))
        yield Target(spec.name, tiny, "fwd+bwd", dict(us=45))  # both calls together; torch.matmul's own pair takes as long here


def table(found: list[dict[str, Any]]) -> str:
    """The targets with what was measured."""
    lines = [f"{'target':<58} {'against':<16} {'ms':>9} {'peer ms':>9} {'needed':>8} {'measured':>9} {'extra MB':>9} {'peer':>6}"]
    for row in found:
        against = AGAINST.get(row["bar"], row["bar"])
        needed = ("<= " if row["at_most"] else ">= ") + format(row["needed"], ".3g")
        measured = "-" if row["measured"] is None else format(row["measured"], ".3g")
        peer_ms = "-" if row["peer_ms"] is None else format(row["peer_ms"], ".3g")
        extra, peers = (_megabytes(row.get(name)) for name in ("extra_mb", "peer_extra_mb"))
        verdict = "reached" if row["reached"] else "MISSED"
        note = f"  {row['note']}" if row["note"] else ""
        numbers = f"{row['ms']:>9.3g} {peer_ms:>9} {needed:>8} {measured:>9} {extra:>9} {peers:>6}"
        lines.append(f"{row['target']:<58} {against:<16} {numbers}  {verdict}{note}")
    return "\n".join([*lines, f"{sum(r['reached'] for r in found)} of {len(found)} reached"])


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def results_file() -> Path:
    model = re.sub(r"[^A-Za-z0-9]+", "-", f"{cpu_model().rsplit(' (', 1)[0]} {cpu_level() or ''}").strip("-").lower()
    return RESULTS / f"{datetime.date.today().isoformat()}-{model}.json"


def save(path: Path, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge into the file: a row measured again replaces the old one; the order is that of `targets`."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {(r["target"], r["bar"]): r for r in [*old, *found]}
    order = {(t.name, bar): i for i, (t, bar) in enumerate((t, bar) for t in targets() for bar in t.bars)}
    rows = sorted((r for key, r in merged.items() if key in order), key=lambda r: order[r["target"], r["bar"]])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps({"environment": bench.environment(), "rows": rows}, indent=1) + "\n")
    os.replace(beside, path)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="measure only targets whose name matches this regular expression")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on one target and peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, help="JSON file to write or merge into")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    chosen = [t for t in targets() if re.search(arguments.only, t.name)]
    if arguments.list:
        print("\n".join(t.name for t in chosen))
        return
    torch.set_num_threads(arguments.threads)
    if note := binding_note():
        print(note, file=sys.stderr)
    path, found = arguments.results or results_file(), []
    for target in chosen:
        try:
            found += target.measure(arguments.seconds) if isinstance(target, StoreTarget) else measure(target, arguments.seconds)
            save(path, found)
            print("\n".join(table(found[-len(target.bars) :]).splitlines()[1:-1]), flush=True)
        except Exception as error:  # one wrong or crashing op must not hide the others
            print(f"{target.name}: NOT MEASURED: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    rows = save(path, found)
    print(table(rows if not arguments.only else found))


if __name__ == "__main__":
    main()

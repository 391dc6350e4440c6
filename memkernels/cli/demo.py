"""`memkernels demo`: what is built, is it right, does it learn, is it fast; on this machine, in a few minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import memkernels
from memkernels import bench
from memkernels.bench.environment import environment
from memkernels.bench.peers import NOT_COMPILED
from memkernels.cli import info, plots, verify
from memkernels.cli.files import writable_folder, write_text
from memkernels.cli.speed import PEERS, measure, speed_table
from memkernels.cli.texts import python_documentation, read_texts
from memkernels.cli.train import train
from memkernels.cli.trainer import Limit, Settings, Trainer
from memkernels.testing.spec import specs

# Their eager forms loop, or gather hundreds of megabytes: with torch.compile each takes a minute or more.
LONG = (
    "attention_varlen",
    "merge_attention",
    "paged_attention",
    "quantized_attention",
    "retrieval_attention",
    "segment_attention",
    "topk_read",
)

# Sizes that learn most in a minute on two cores (docs/cli.md has the measurement).
CONFIG = dict(embedding=64, hidden=256, slots=32, width=32, read_heads=2, mode="content")
SETTINGS = Settings(window=64, batch=32, rate=6e-3, warmup=20)


def run(
    console: Console,
    text_files: Sequence[Path],
    seconds: float,
    out: Path,
    model: str,
    verify_ops: bool,
    bench_ops: bool,
    threads: int | None,
) -> int:
    """Everything in order; returns the exit code. Without `threads`, training uses torch's number or one, whichever is faster."""
    text = read_texts(text_files) if text_files else python_documentation()
    source = ", ".join(map(str, text_files)) if text_files else "Python's documentation (pydoc_data.topics)"
    trainer = Trainer.start(text, CONFIG | {"model": model}, replace(SETTINGS, decay_seconds=seconds))
    writable_folder(out)
    begin = time.monotonic()
    _head(console, "1. What is built")
    report: dict[str, Any] = {"environment": environment(), "built": info.show(console)}
    summaries: list[verify.Summary] = []
    if verify_ops:
        _head(console, "2. Is it right: every op on every backend against float64")
        there = [name for name, reason in memkernels.backends().items() if reason is None]  # lower levels: `memkernels verify`
        summaries = verify.run(console, None, there, None, "cpu", None)
        report["verify"] = verify.plain(summaries)
    _head(console, f"3. Does it learn: Embedding - LSTM - {'external memory' if model == 'memory' else 'attention - LSTM'} - Dense")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or faster_threads(trainer))
    report["training"] = _train(console, trainer, source, text, seconds, out)
    torch.set_num_threads(before)
    if bench_ops:
        _head(console, "4. Is it fast: fused against plain torch and torch.compile")
        report["bench"] = _bench(console, out)
    report["seconds"] = round(time.monotonic() - begin, 1)
    write_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    console.print(f"\nWritten to {out}: {', '.join(sorted(p.name for p in out.iterdir() if not p.name.startswith('.')))}", highlight=False)
    failed = [s for s in summaries if s.status == "FAIL"]
    if failed:
        console.print(f"{len(failed)} combinations of op, backend and dtype are wrong on this machine (see above)", style="red")
    return 1 if failed else 0


def _head(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]", highlight=False)


def _train(console: Console, trainer: Trainer, source: str, text: str, seconds: float, out: Path) -> dict[str, Any]:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(
        f"{len(text):,} characters of {source}, the last {len(trainer.held_out):,} held out; {len(trainer.model.vocabulary)} symbols, "
        f"{parameters:,} parameters, {torch.get_num_threads()} threads, {seconds:g} s",
        highlight=False,
    )
    checkpoint = out / "model.safetensors"
    points = train(console, trainer, Limit(seconds=seconds), checkpoint, save_every=30.0, evaluate_every=max(1.0, seconds / 10))
    table = Table(title="Bits per character")
    for head in ("step", "seconds", "training text", "held-out text", ""):
        table.add_column(head, justify="right" if head else "left")
    for p in points:
        bar = "#" * round(8 * p.held_out)
        table.add_row(str(p.step), f"{p.seconds:.0f}", f"{p.train:.3f}", f"{p.held_out:.3f}", bar)
    console.print(table)
    prompt = _prompt(text[len(text) - len(trainer.held_out) :])
    begin = time.monotonic()
    sample = trainer.model.generate(prompt, length=400, temperature=0.8, top_p=0.9, seed=0)
    speed = 400 / (time.monotonic() - begin)
    console.print(f"\nIt continues held-out text ({speed:.0f} characters a second), the prompt in bold:", highlight=False)
    console.print(Text.assemble((prompt, "bold"), sample))
    plot = plots.loss_curve(points, out / "loss.png", source)
    console.print(plot) if plot else None
    return {
        "text": source,
        "characters": len(text),
        "config": asdict(trainer.model.config),
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "points": [asdict(p) for p in points],
        "sample": {"prompt": prompt, "text": sample, "characters_per_second": round(speed, 1)},
        "checkpoint": checkpoint.name,
    }


def faster_threads(trainer: Trainer) -> int:
    """torch's number of threads, or 1 where that is faster: on a busy machine the threads of every small op wait for each other."""
    torch_threads = torch.get_num_threads()
    timings = {}
    for threads in (torch_threads, 1):
        torch.set_num_threads(threads)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            trainer.model.loss(trainer.batch()).backward()
            times.append(time.perf_counter() - begin)
        timings[threads] = sorted(times[1:])[1]
    trainer.optimizer.zero_grad(set_to_none=True)
    torch.set_num_threads(torch_threads)
    return min(timings, key=lambda threads: timings[threads])


def _prompt(text: str) -> str:
    """The start of the first line that reads like a sentence."""
    for line in text.splitlines():
        start = line.strip()[:40]
        if len(start) == 40 and sum(c.isalpha() or c == " " for c in start) > 36:
            return start
    return text[:40]


def _bench(console: Console, out: Path) -> dict[str, Any]:
    ops = [op for op in specs() if op not in LONG]
    rows, failures = measure(console, ops, quick=True, peers=PEERS, seconds=0.3)
    console.print(speed_table(rows))
    console.print(f"left to `memkernels bench`, where their peers take minutes: {', '.join(LONG)}", highlight=False, markup=False)
    for op in (op for op in NOT_COMPILED if op not in LONG):
        console.print(f"{op}: torch.compile is left out, it unrolls the loop over steps or sequences and takes minutes", highlight=False)
    for note in dict.fromkeys(f"{row.op} {row.mode}: {row.note}" for row in rows if row.note):
        console.print(note, highlight=False, markup=False)
    for op, reason in failures.items():
        console.print(f"{op}: not measured, its result is wrong: {reason}", style="red", highlight=False, markup=False)
    try:
        bench.plot(rows, out)
    except ImportError as error:
        console.print(f"no plots: {error}", highlight=False)
    return {**bench.report(rows), "failures": failures}

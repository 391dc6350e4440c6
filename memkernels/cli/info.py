"""`memkernels info`: versions, what is built, what is missing and why, and which backend runs every op."""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import memkernels
from memkernels.bench.environment import cpu_model
from memkernels.testing.inputs import draw
from memkernels.testing.spec import specs

PACKAGES = ("torch", "numpy", "triton", "safetensors", "typer", "rich", "matplotlib")


@dataclass(frozen=True)
class OpChoice:
    """Which backend an op uses on a device, and why not the ones before it."""

    op: str
    device: str
    backend: str
    why_not: dict[str, str]


def versions() -> dict[str, str]:
    found = {"memkernels": memkernels.__version__, "python": f"{platform.python_version()} ({sys.executable})"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def extensions() -> dict[str, str]:
    """What the build wrote down about the compiled extensions."""
    path = Path(memkernels.__file__).with_name("_build_info.json")
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {"_C": "not built here", "_C_cuda": "not built here"}
    return {name: _extension(name, entry) for name, entry in found.items()}


def _extension(name: str, entry: dict[str, Any]) -> str:
    there = find_spec(f"memkernels.{name}") is not None
    if not entry.get("built"):
        reason = entry.get("reason", "no reason recorded")
        return f"from an earlier build; the last one left it out: {reason}" if there else f"not built: {reason}"
    if not there:
        return "not there: it was built once, but the file is gone or is for another Python; install or build again"
    made_for = entry.get("levels") or [f"sm_{arch}" for arch in entry.get("archs", ())]
    return f"built for {', '.join(made_for)} by {entry.get('compiler', 'an unknown compiler')}"


def choices() -> list[OpChoice]:
    """For every op and device that is there: the backend a plain float32 call uses."""
    found = []
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        for name, spec in specs().items():
            inputs = draw(spec, spec.samples[0], torch.float32, device=device)
            options = dict(spec.samples[0].options)
            reasons = spec.call(lambda *a, _name=name, **k: memkernels.explain(_name, *a, **k), dict(inputs), options)
            chosen = next(backend for backend, reason in reasons.items() if reason is None)
            before = list(reasons)[: list(reasons).index(chosen)]
            found.append(OpChoice(name, device, chosen, {b: reasons[b] for b in before}))
    return found


def collect() -> dict[str, Any]:
    """Everything `info` shows, as plain values."""
    return {
        "versions": versions(),
        "cpu": cpu_model(),
        "cpu_level": memkernels.cpu_level(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "extensions": extensions(),
        "backends": memkernels.backends(),
        "ops": [asdict(choice) for choice in choices()],
    }


def show(console: Console) -> dict[str, Any]:
    """Prints what `collect` finds, and returns it."""
    found = collect()
    table = Table(title="memkernels", show_header=False)
    for name, text in found["versions"].items():
        table.add_row(name, text)
    table.add_row("processor", found["cpu"])
    table.add_row("CPU kernels", f"{found['cpu_level'] or 'none'}, {found['threads']} threads")
    table.add_row("GPU", found["gpu"] or "none that torch can use")
    for name, text in found["extensions"].items():
        table.add_row(f"memkernels.{name}", text)
    console.print(table)
    behind = {"cpp": found["extensions"].get("_C", ""), "cuda": found["extensions"].get("_C_cuda", "")}
    table = Table(title="Backends")
    table.add_column("backend", no_wrap=True)
    table.add_column("state")
    for name, reason in found["backends"].items():
        table.add_row(name, "[green]there[/]" if reason is None else f"[yellow]missing[/]: {_why(reason, behind.get(name, ''))}")
    console.print(table)
    table = Table(title="Which backend an op uses (float32)")
    for head in ("op", "device", "backend"):
        table.add_column(head, no_wrap=True)
    table.add_column("why not a better one")
    for choice in found["ops"]:
        reasons = "; ".join(
            f"{n}: {reason if found['backends'][n] is None else 'missing, see above'}" for n, reason in choice["why_not"].items()
        )
        table.add_row(choice["op"], choice["device"], choice["backend"], reasons or "it is the best one")
    console.print(table)
    return found


def _why(reason: str, extension: str) -> str:
    """What the build says of the extension behind a backend, where that is the cause; else what the import said."""
    return extension if extension.startswith("not ") else reason

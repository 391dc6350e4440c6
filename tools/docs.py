"""Writes the generated parts of README.md and docs/*.md: op tables from specs and files, speeds from benchmarks/results, GPU status.

python tools/docs.py            rewrite what lies between `<!-- generated: NAME -->` and `<!-- /generated -->`
python tools/docs.py --check    write nothing, exit 1 when something is not current
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from memkernels._registry import TABLE  # noqa: E402
from memkernels.testing.spec import OpSpec, specs  # noqa: E402

FOUR = "float64, float32, bfloat16, float16"
THREE = "float32, bfloat16, float16"
BACKENDS = {
    "reference": ("plain torch, any device", FOUR),
    "cpp": ("C++ on the CPU (baseline, AVX2, AVX-512, AMX)", FOUR),
    "triton": ("Triton on NVIDIA GPUs", THREE),
    "cuda": ("CUDA C++ on NVIDIA GPUs", FOUR),
}
PAGES = ("README.md", "docs/index.md", "docs/benchmarks.md", "docs/gpu.md")
PEERS = {
    "eager": "eager torch",
    "compile": "torch.compile of eager",
    "sdpa": "scaled_dot_product_attention",
    "embedding_bag": "torch's embedding_bag",
    "without reset": "itself without resets",
    "without lengths": "itself, even batch of as many rows",
    "without recompute": "itself without recompute",
    "per token": "itself, even batch, per token",
    "backward": "one backward",
    "saved": "bytes torch.nn.LSTM saves",
    "peak": "peak memory of eager torch",
    "local peak": "peak memory of attention alone",
    "pytorch-ntm": "pytorch-ntm's step loop",
    "uniform degrees": "itself, degrees spread evenly",
    "us": "microseconds a call",
    "read": "read bandwidth",
    "faiss": "faiss-cpu IndexFlatIP",
    "torch_geometric": "torch_geometric TransformerConv",
}


def has(backend: str, op: str) -> bool:
    return (ROOT / "memkernels" / "backends" / backend / f"{op}.py").exists()


def summary(spec: OpSpec) -> str:
    """The first sentence of the public function's docstring."""
    return re.split(r"(?<=[.:])\s", inspect.getdoc(spec.function) or "", maxsplit=1)[0].rstrip(".:")


def page(spec: OpSpec) -> str:
    own = ROOT / "docs" / "ops" / f"{spec.name}.md"
    return f"[{spec.name}](docs/ops/{own.name})" if own.exists() else spec.name


def ops() -> str:
    lines = ["| op | " + " | ".join(BACKENDS) + " |", "|---|" + "---|" * len(BACKENDS)]
    for spec in specs().values():
        lines.append(f"| {page(spec)} | " + " | ".join(dtypes if has(b, spec.name) else "-" for b, (_, dtypes) in BACKENDS.items()) + " |")
    lines += ["", *(f"- `{name}`: {text}" for name, (text, _) in BACKENDS.items())]
    return "\n".join(lines)


def index() -> str:
    lines = ["| op | what it computes | inputs | known gaps |", "|---|---|---|---|"]
    for spec in specs().values():
        inputs = ", ".join(f"{name}{'?' if i.optional else ''} `{i.dims}`" for name, i in spec.inputs.items())
        lines.append(f"| {page(spec).replace('docs/', '')} | {summary(spec)} | {inputs} | {' '.join(spec.gaps) or '-'} |")
    return "\n".join(lines)


Results = tuple[dict[str, Any], list[dict[str, Any]]]  # environment and rows


def latest() -> list[Results]:
    """The newest CPU results of each machine, the best level of kernels first."""
    found: dict[tuple[str, str], Results] = {}
    for path in sorted(p for p in (ROOT / "benchmarks" / "results").glob("*.json") if not p.name.startswith("gpu")):
        data = json.loads(path.read_text())
        found[data["environment"]["cpu_level"], data["environment"]["cpu"]] = data["environment"], data["rows"]
    return [found[key] for level in ("amx", "avx512", "avx2", "baseline") for key in sorted(found) if key[0] == level]


def measured_on(environment: dict[str, Any]) -> str:
    if not environment:
        return "Not measured yet: `make bench` fills this table."
    state = "with uncommitted changes" if environment["dirty"] else "clean"
    return (
        f"{environment['cpu']}, kernels at level `{environment['cpu_level']}`, {environment['threads']} threads, "
        f"load average {environment['load']}, torch {environment['torch']}, {environment['date'][:10]}, "
        f"commit {environment['commit'][:10]} ({state}). Medians of interleaved runs; every row's result was compared with float64 first. "
        "Above 1 is faster than the peer. Extra MB: peak memory of one call beyond its inputs and outputs (gradients are outputs)."
    )


def peer(row: dict[str, Any], name: str) -> str:
    """What a row is compared with, in words."""
    if row["op"] in ("lstm", "gru", "rnn") and name in ("torch", "eager"):
        module = f"torch.nn.{row['op'].upper()}"
        return module if name == "torch" else "layer-norm cell loop" if "layer_norm" in row["size"] else f"{module}Cell loop"
    return PEERS.get(name, name)


def extra(row: dict[str, Any]) -> str:
    """Two cells: peak megabytes of a call beyond its inputs and outputs, and the peer's."""
    return " | ".join("-" if (value := row.get(name)) is None else f"{value:.1f}" for name in ("extra_mb", "peer_extra_mb"))


def speed() -> str:
    """What README shows of the newest run: one line per target and peer, the lost ones included."""
    environment, rows = max(latest(), key=lambda found: found[0]["date"], default=({}, []))
    parts = [measured_on(environment), against_peers(rows), costs(rows), of_the_store(rows), tiny(rows)]
    return "\n\n".join(part for part in parts if part)


def table(title: str, heads: str, lines: list[str]) -> str:
    """A table under its title ("" for none); nothing where there are no lines."""
    if not lines:
        return ""
    head = [f"| {heads} |", "|---|" + "---|" * heads.count("|")]
    return "\n".join([*([title, ""] if title else []), *head, *lines])


def against_peers(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["bar"] == "read" or row["at_most"] or row["ratio"] is None:
            continue
        faster = f"**{row['ratio']:.2f}**" if row["ratio"] >= 1 else f"{row['ratio']:.2f}"
        what = f"| {row['op']} | {row['size']} | {row['dtype']} | {row['mode']} "
        lines.append(f"{what}| {row['ms']:.3g} | {peer(row, row['peer'])} | {row['peer_ms']:.3g} | {faster} | {extra(row)} |")
    return table("", "op | size | dtype | pass | ms | peer | peer ms | times faster | extra MB | peer's", lines)


def costs(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {row['target']} | {peer(row, row['bar'])} | {row['measured']:.2g} |"
        for row in rows
        if row["at_most"] and row["bar"] in PEERS and row["bar"] != "us"
    ]
    return table("Costs, as a share (lower is better):", "what | of | share", lines)


def of_the_store(rows: list[dict[str, Any]]) -> str:
    mine = [row for row in rows if row["backend"] == "store" and row["ratio"] is None and row["measured"] is not None]
    lines = [f"| {row['target'].removeprefix('store ')} | {row['measured']:.3g} | {row['bar']} |" for row in mine]
    return table("The key-value store:", "what | measured | unit, or times what", lines)


def tiny(rows: list[dict[str, Any]]) -> str:
    """Microseconds a call, a line per op."""
    calls: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["bar"] == "us":
            calls.setdefault(row["op"], {})[row["mode"]] = row["measured"]
    modes = ("forward", "training forward", "fwd+bwd")
    lines = [f"| {op} | {' | '.join(f'{found[mode]:.0f}' if mode in found else '-' for mode in modes)} |" for op, found in calls.items()]
    title = "Microseconds a call on tiny inputs; forward in inference_mode, the training forward saves what backward needs:"
    return table(title, "op | forward | training forward | fwd+bwd", lines)


def targets() -> str:
    """The bars of this project, each with what was measured and whether it was reached; a table for each machine."""
    return "\n\n".join(target_table(*results) for results in latest()) or measured_on({})


def target_table(environment: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    lines = [f"### Kernels at level `{environment['cpu_level']}` on {environment['cpu'].rsplit(' (', 1)[0]}", "", measured_on(environment)]
    ceilings = ", ".join(f"{name} {value:.0f}" for name, value in environment["ceilings"].items())
    lines += ["", f"Ceilings measured in the same process: {ceilings}.", ""]
    heads = "target | against | ms | GB/s | of floor | needed | measured | | extra MB | peer's | checked"
    found = []
    for row in rows:
        needed = ("at most " if row["at_most"] else "at least ") + format(row["needed"], ".3g")
        got = "-" if row["measured"] is None else format(row["measured"], ".3g")
        verdict = "reached" if row["reached"] else "missed"
        floor = "-" if row["bar"] == "us" or row["floor"] is None else f"{row['floor']:.0%}"
        rate = "-" if row["gb_s"] is None else f"{row['gb_s']:.1f}"
        found.append(
            f"| {row['target']} | {peer(row, row['bar'])} | {row['ms']:.3g} | {rate} | {floor} | {needed} | {got} "
            f"| {verdict} | {extra(row)} | {row['checked']} |"
        )
    lines += [table("", heads, found), "", f"{sum(row['reached'] for row in rows)} of {len(rows)} reached."]
    return "\n".join(lines)


def gpu_status() -> str:
    """Every GPU kernel with the run that showed it right on a GPU, or that there was none."""
    runs = [json.loads(p.read_text()) for p in sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))]
    lines = ["| op | backend | run on a GPU |", "|---|---|---|"]
    for name in sorted({*specs(), *TABLE}):
        for backend in ("cuda", "triton"):
            if not has(backend, name):
                continue
            shown = "not run on a GPU yet"
            for run in runs:
                mine = [r for r in run.get("verify", []) if (r["op"], r["backend"]) == (name, backend) and r["status"] != "unavailable"]
                if mine:
                    good, where = sum(r["status"] == "ok" for r in mine), run["environment"]
                    shown = f"{good} of {len(mine)} comparisons with float64 right on {where['device']}, {where['date'][:10]}"
            lines.append(f"| {name} | {backend} | {shown} |")
    return "\n".join(lines)


PARTS = {"ops": ops, "index": index, "speed": speed, "targets": targets, "gpu": gpu_status}


def generate(text: str) -> str:
    """The page with every generated part written anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- /generated -->)", fill, text, flags=re.DOTALL)


def main() -> int:
    stale = 0
    for name in PAGES:
        path = ROOT / name
        old = path.read_text()
        new = generate(old)
        if old == new:
            continue
        stale += 1
        if "--check" in sys.argv[1:]:
            sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), name, f"{name} (generated)", n=1))
        else:
            path.write_text(new)
            print(f"wrote {name}")
    if stale and "--check" in sys.argv[1:]:
        print("generated documentation is not current: run `make docs`")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

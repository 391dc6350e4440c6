"""What `make gpu` runs on the device: python tools/gpu_stages.py verify|determinism|bench|tiny FILE SECONDS [SHARE/SHARES [FIRST]].

Verify, determinism and tiny are lists of tasks, those of the first samples first. Their shares run in processes of their own, as most of
the time goes into Triton's compiler; without a share, all are started here and their rows put together. A process whose device is broken,
or that the compiler takes down, is replaced by one that goes on after that task. Exit code 0: all was done and is right; 1: something is
wrong; 2: nothing is wrong, but time ran out first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from memkernels import bench
from memkernels.bench.environment import synchronize
from memkernels.testing import compare
from memkernels.testing import inputs as make
from memkernels.testing.spec import OpSpec, Sample, specs

BACKENDS = ("cuda", "triton")
SDPA = ("sdpa", "sdpa:FLASH_ATTENTION", "sdpa:CUDNN_ATTENTION", "sdpa:EFFICIENT_ATTENTION", "sdpa:MATH")
PROCESSES = 12  # each has a context of half a gigabyte on the device, and a compiler
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter, to test this file
RIGHT, WRONG, UNFINISHED, BROKEN = range(4)


@dataclass(frozen=True)
class Task:
    """One sample of an op in one dtype, on both backends."""

    spec: OpSpec
    sample: Sample
    dtype: torch.dtype

    def facts(self, backend: str) -> dict[str, Any]:
        return {"op": self.spec.name, "sample": self.sample.name, "dtype": str(self.dtype).removeprefix("torch."), "backend": backend}

    def given(self, backend: str) -> make.Tensors | None:
        """Inputs on the device, None where the backend does not take the call."""
        given = make.draw(self.spec, self.sample, self.dtype, device=DEVICE)
        return given if compare.why_not(self.spec, given, dict(self.sample.options), backend) is None else None

    def evaluate(self, given: make.Tensors, backend: str) -> dict[str, torch.Tensor]:
        with compare.using(backend):
            return compare.evaluate(self.spec, given, dict(self.sample.options), lambda outputs: make.upstream(outputs, self.dtype))


def tasks(dtypes: tuple[torch.dtype, ...], samples: int | None) -> list[Task]:
    """Of each op's first samples; None: of all."""
    found = [
        (place, Task(spec, sample, dtype))
        for dtype in dtypes
        for spec in specs().values()
        for place, sample in enumerate(spec.samples[:samples])
    ]
    return [task for _, task in sorted(found, key=lambda pair: pair[0])]


def verify(task: Task) -> Iterator[dict[str, Any]]:
    """Against float64 on the device."""
    for backend in BACKENDS:
        for row in compare.verify_case(task.spec, task.sample, task.dtype, backend, DEVICE):
            yield row.json()


def determinism(task: Task) -> Iterator[dict[str, Any]]:
    """Forward and backward a thousand times (or three seconds): the same bits."""
    for backend in BACKENDS:
        if (given := task.given(backend)) is None:
            continue
        first, same, repeats, begin = task.evaluate(given, backend), True, 0, time.monotonic()
        while same and repeats < 1000 and time.monotonic() - begin < 3:
            again = task.evaluate(given, backend)
            same, repeats = all(torch.equal(first[name], again[name]) for name in first), repeats + 1
        yield {**task.facts(backend), "repeats": repeats, "status": "ok" if same else "fail", "reason": "" if same else "other bits"}


def tiny(task: Task) -> Iterator[dict[str, Any]]:
    """Every kernel once on small odd shapes, for the sanitizer."""
    for backend in BACKENDS:
        if (given := task.given(backend)) is not None:
            task.evaluate(given, backend)
            synchronize(DEVICE)
            yield {**task.facts(backend), "status": "ok"}


# What each stage does with a task, and its tasks.
STAGES: dict[str, tuple[Callable[[Task], Iterator[dict[str, Any]]], Callable[[], list[Task]]]] = {
    "verify": (verify, lambda: tasks(compare.DTYPES, None)),
    "determinism": (determinism, lambda: tasks((torch.float32,), 1)),
    "tiny": (tiny, lambda: tasks((torch.float32, torch.bfloat16), 2)),
}


def usable() -> bool:
    """False after an error that the device does not recover from in this process, such as an access out of bounds."""
    try:
        return bool(torch.ones(1, device=DEVICE).add(1).item() == 2)
    except RuntimeError:
        return False


def work(name: str, path: Path, seconds: float, share: int, shares: int, first: int) -> int:
    """One share of a stage from its task `first` on: the rows of each task are one line of the file."""
    begin, (stage, listed) = time.monotonic(), STAGES[name]
    count = bad = 0
    with open(path, "a") as file:
        for task in listed()[share::shares][first:]:
            if time.monotonic() - begin > seconds:
                print(f"{name}: {count} tasks, out of time", flush=True)
                return UNFINISHED
            rows: list[dict[str, Any]] = []
            try:
                rows += stage(task)
            except Exception as error:  # a crash of one task is a row of the report, not the end of it
                rows.append({**task.facts(""), "status": "error", "reason": f"{type(error).__name__}: {error}"[:2000]})
            file.write(json.dumps(rows) + "\n")
            file.flush()
            count, bad = count + 1, bad + say(name, rows)
            if bad and not usable():
                print(f"{name}: the device is of no use to this process any more", flush=True)
                return BROKEN
    print(f"{name}: {count} tasks, {bad} wrong", flush=True)
    return WRONG if bad else RIGHT


def say(name: str, rows: list[dict[str, Any]]) -> int:
    """Prints what is wrong; how much that is."""
    wrong = [row for row in rows if row["status"] in ("fail", "error")]
    for row in wrong:
        facts = " ".join(str(row[key]) for key in ("op", "backend", "dtype", "sample", "direction") if row.get(key))
        print(f"{name}: {row['status']}: {facts}: {' '.join(row['reason'].split())[:500]}", flush=True)
    return len(wrong)


def finish_share(name: str, path: Path, end: float, share: int, shares: int, count: int) -> list[list[dict[str, Any]]]:
    """The rows of the tasks of one share that were done, in processes that each go on where the one before ended."""
    part, done = path.with_name(f"{path.stem}.{share}.jsonl"), 0
    part.unlink(missing_ok=True)
    while done < count and (left := end - time.monotonic()) > 5:
        command = [sys.executable, __file__, name, str(part), str(left - 5), f"{share}/{shares}", str(done)]
        try:
            code = subprocess.run(command, timeout=left).returncode
        except subprocess.TimeoutExpired:
            break
        lines = part.read_text().splitlines() if part.exists() else []
        if code in (RIGHT, WRONG, UNFINISHED):
            break
        if code != BROKEN and len(lines) < count:  # it ended amid a task
            task = STAGES[name][1]()[share::shares][len(lines)]
            row = {**task.facts(""), "status": "error", "reason": f"the process ended with exit code {code}"}
            say(name, [row])
            with open(part, "a") as file:
                file.write(json.dumps([row]) + "\n")
            lines.append("")
        done = len(lines)
    return [json.loads(line) for line in part.read_text().splitlines()] if part.exists() else []


def spread(name: str, path: Path, seconds: float) -> int:
    """All shares of a stage side by side."""
    end, every = time.monotonic() + seconds, STAGES[name][1]()
    shares = max(1, min(PROCESSES, len(os.sched_getaffinity(0)), len(every)))
    with ThreadPoolExecutor(shares) as pool:
        parts = list(pool.map(lambda k: finish_share(name, path, end, k, shares, len(every[k::shares])), range(shares)))
    done = sum(len(part) for part in parts)
    rows = [row for part in parts for lines in part for row in lines]
    path.write_text(json.dumps(rows, indent=1) + "\n")
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "fail", "error", "unavailable")}
    text = ", ".join(f"{n} {status}" for status, n in count.items() if n) + f"; {done} of {len(every)} cases"
    print(f"{name}: {text}" + (", then time ran out" if done < len(every) else ""), flush=True)
    if count["fail"] + count["error"]:
        return WRONG
    return RIGHT if done == len(every) and count["ok"] else UNFINISHED


def measure(path: Path, seconds: float) -> int:
    """The specs' sizes against eager, SDPA's backends and cuDNN; then torch.compile, which takes longest to start."""
    rows: list[dict[str, Any]] = []
    end, wrong, skipped = time.monotonic() + seconds, 0, 0

    def keep(row: bench.Row) -> None:
        rows.append(asdict(row))
        path.write_text(json.dumps(rows, indent=1) + "\n")

    for peers in (("eager", "torch", *SDPA), ("compile",)):
        for name in specs():
            for dtype in (torch.bfloat16, torch.float32):
                if time.monotonic() > end:
                    skipped += 1
                    continue
                try:
                    bench.run([name], quick=False, dtypes=(dtype,), peers=peers, device=DEVICE, seconds=0.1, on_row=keep)
                except Exception as error:  # what one op cannot do must not keep the others from being measured
                    wrong += 1
                    print(f"bench: error: {name} {dtype}: {type(error).__name__}: {error}", flush=True)
                    if not usable():
                        print("bench: the device is of no use to this process any more", flush=True)
                        return WRONG
    print(bench.table([bench.Row(**row) for row in rows]))
    print(f"bench: {len(rows)} rows, {wrong} ops that failed" + (f", {skipped} out of time" if skipped else ""), flush=True)
    return WRONG if wrong or not rows else UNFINISHED if skipped else RIGHT


def main() -> int:
    name, path, seconds, *share = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]
    if name == "bench":
        return measure(path, seconds)
    if not share:
        return spread(name, path, seconds)
    number, shares = (int(n) for n in share[0].split("/"))
    return work(name, path, seconds, number, shares, int(share[1]) if len(share) > 1 else 0)


if __name__ == "__main__":
    sys.exit(main())

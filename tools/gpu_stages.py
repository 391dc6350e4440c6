"""What `make gpu` runs on the device: python tools/gpu_stages.py verify|determinism|bench|tiny FILE. Rows are written as they come."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from memkernels import bench
from memkernels.testing import compare
from memkernels.testing import inputs as make
from memkernels.testing.spec import OpSpec, Sample, specs

BACKENDS = ("cuda", "triton")
SDPA = ("sdpa", "sdpa:FLASH_ATTENTION", "sdpa:CUDNN_ATTENTION", "sdpa:EFFICIENT_ATTENTION", "sdpa:MATH")


class Rows:
    """A list that is in the file every few seconds, so that a stage stopped at its limit leaves what it had."""

    def __init__(self, path: Path):
        self.path, self.rows, self.written = path, [], 0.0

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if time.monotonic() - self.written > 3:
            self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.rows, indent=1) + "\n")
        self.written = time.monotonic()


def cases(dtypes: tuple[torch.dtype, ...], samples: int) -> Iterator[tuple[OpSpec, Sample, torch.dtype, str]]:
    """What a GPU backend takes, of each op's first samples."""
    for spec in specs().values():
        for sample in spec.samples[:samples]:
            for dtype in dtypes:
                for backend in BACKENDS:
                    given = make.draw(spec, sample, dtype, device="cuda")
                    if compare.why_not(spec, given, dict(sample.options), backend) is None:
                        yield spec, sample, dtype, backend


def evaluate(spec: OpSpec, sample: Sample, given: make.Tensors, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    with compare.using(backend):
        return compare.evaluate(spec, given, dict(sample.options), lambda outputs: make.upstream(outputs, dtype))


def verify(rows: Rows) -> str:
    """Every op x backend x dtype x sample against float64 on the device."""
    for row in compare.verify(backends=BACKENDS, device="cuda"):
        rows.add(row.json())
        if row.status in ("fail", "error"):
            print(f"{row.status}: {row.op} {row.backend} {row.dtype} {row.sample} {row.direction}: {row.reason}", flush=True)
    count = {status: sum(row["status"] == status for row in rows.rows) for status in ("ok", "fail", "error", "unavailable")}
    return report(
        "verify", count["fail"] + count["error"] == 0 and count["ok"] > 0, ", ".join(f"{n} {status}" for status, n in count.items())
    )


def determinism(rows: Rows) -> str:
    """Forward and backward a thousand times (or three seconds a case): the same bits."""
    for spec, sample, dtype, backend in cases((torch.float32,), 1):
        given = make.draw(spec, sample, dtype, device="cuda")
        first, same, repeats = evaluate(spec, sample, given, dtype, backend), True, 0
        begin = time.monotonic()
        while same and repeats < 1000 and time.monotonic() - begin < 3:
            again = evaluate(spec, sample, given, dtype, backend)
            same, repeats = all(torch.equal(first[name], again[name]) for name in first), repeats + 1
        rows.add({"op": spec.name, "backend": backend, "repeats": repeats, "same": same})
    wrong = [f"{row['op']} {row['backend']}" for row in rows.rows if not row["same"]]
    return report("determinism", bool(rows.rows) and not wrong, f"{len(rows.rows)} cases; differing: {', '.join(wrong) or 'none'}")


def measure(rows: Rows) -> str:
    """The specs' sizes against eager, SDPA's backends and cuDNN; then torch.compile, which takes longest to start."""
    wrong = []
    for peers in (("eager", "torch", *SDPA), ("compile",)):
        for name in specs():
            for dtype in (torch.bfloat16, torch.float32):
                try:
                    bench.run(
                        [name],
                        quick=False,
                        dtypes=(dtype,),
                        peers=peers,
                        device="cuda",
                        seconds=0.1,
                        on_row=lambda row: rows.add(asdict(row)),
                    )
                except AssertionError as error:
                    wrong.append(str(error))
                    print(error, flush=True)
    print(bench.table([bench.Row(**row) for row in rows.rows]))
    return report("bench", bool(rows.rows) and not wrong, f"{len(rows.rows)} rows, {len(wrong)} wrong results")


def tiny(rows: Rows) -> str:
    """Every kernel once on small odd shapes, for the sanitizer."""
    count = 0
    for spec, sample, dtype, backend in cases((torch.float32, torch.bfloat16), 2):
        evaluate(spec, sample, make.draw(spec, sample, dtype, device="cuda"), dtype, backend)
        torch.cuda.synchronize()
        count += 1
    return report("tiny", count > 0, f"{count} cases")


def report(name: str, good: bool, text: str) -> str:
    print(f"{name}: {text}", flush=True)
    return "" if good else text


def main() -> int:
    name, path = sys.argv[1], Path(sys.argv[2])
    rows = Rows(path)
    stage = {"verify": verify, "determinism": determinism, "bench": measure, "tiny": tiny}[name]
    try:
        problem = stage(rows)
    finally:
        rows.write()
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a GPU can show, in one command, offline, in less than eight minutes: `make gpu RESULTS=dir`.

    python tools/gpu.py --results DIR [--only STAGE,...] [--limit SECONDS]

Runs with this interpreter's own torch and Triton. Each stage is a process of its own with a time limit and is reported PASSED, FAILED or
NOT RUN with the reason. What was stopped at its limit was not run, unless it had already found something wrong: then it failed. What Triton
compiles stays in build/triton, so a second run goes further. Writes DIR/gpu.json after every stage, at the end DIR/logs.tar.gz with what
the stages wrote: few files come back from a lent machine. Exit code 1 when one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 470.0
UNFINISHED = 2  # exit code of gpu_stages.py: nothing is wrong, but time ran out
STAGES = ROOT / "tools" / "gpu_stages.py"
CANARY = ROOT / "tools" / "gpu_canary.cu"
# What each sanitizer tool must find in the planted program before its silence about our kernels means anything.
CANARIES = {"memcheck": "out-of-bounds", "racecheck": "race", "initcheck": "uninitialised"}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def our_kernels() -> list[str]:
    """What the names of our kernels contain in a sanitizer's report."""
    sources = (ROOT / "memkernels" / "backends" / "triton").glob("*.py")
    return ["mk::cuda", *sorted({name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)})]


@dataclass
class Outcome:
    """How one stage ended."""

    stage: str
    status: str  # PASSED, FAILED, NOT RUN
    seconds: float = 0.0
    reason: str = ""


class NotRun(Exception):
    """The reason why a stage could not be run."""


class Run:
    """One `make gpu`: the results folder, the clock, and what is known of the device."""

    def __init__(self, results: Path, limit: float | None = None):
        self.results, self.limit, self.begin = results, limit, time.monotonic()
        self.outcomes: list[Outcome] = []
        self.trouble = ""  # the last line of the latest query that failed
        results.mkdir(parents=True, exist_ok=True)
        self.others = {"gpu.json", "logs.tar.gz", *(path.name for path in results.iterdir())}  # not ours to pack
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
        }
        self.environment.pop("TRITON_INTERPRET", None)
        self.device = self.query("import torch; print(torch.cuda.get_device_name(), '%d.%d' % torch.cuda.get_device_capability(), sep='|')")
        self.no_device = f"no GPU that torch can use ({self.trouble})"

    def query(self, code: str) -> list[str]:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=self.environment)
        if done.returncode:
            self.trouble = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")[:200]
            return []
        return done.stdout.strip().split("|")

    def left(self) -> float:
        return max(BUDGET, self.limit or 0) - (time.monotonic() - self.begin)

    def execute(self, name: str, limit: float, command: list[str], **variables: str) -> int:
        """Exit code of a command whose output goes to <name>.log; NotRun when it does not end within its limit."""
        limit = min(self.limit or limit, self.left())
        if limit < 5:
            raise NotRun("no time left")
        with open(self.results / f"{name}.log", "w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**self.environment, **variables}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()
                raise NotRun(f"stopped at its limit of {limit:.0f} s") from None

    def tail(self, name: str) -> str:
        lines = [line for line in (self.results / f"{name}.log").read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else ""

    def stage(self, name: str, action: Callable[[], str], needs_gpu: bool = True) -> None:
        begin = time.monotonic()
        try:
            if needs_gpu and not self.device:
                raise NotRun(self.no_device)
            outcome = Outcome(name, "PASSED", reason=action())
        except NotRun as reason:
            outcome = Outcome(name, "NOT RUN", reason=str(reason))
        except Exception as error:
            outcome = Outcome(name, "FAILED", reason=str(error) or type(error).__name__)
        outcome.seconds = round(time.monotonic() - begin, 1)
        self.outcomes.append(outcome)
        print(f"{outcome.status:<8} {name:<22} {outcome.seconds:>6.1f} s  {outcome.reason}", flush=True)

    def python(self, name: str, limit: float, *arguments: str, **variables: str) -> str:
        code = self.execute(name, limit, [sys.executable, *arguments], **variables)
        if code:
            raise RuntimeError(f"exit code {code}: {self.tail(name)}")
        return self.tail(name)

    def wrong_so_far(self, name: str, mark: str) -> None:
        """Raises if the log of a stage that was stopped names something wrong: that must not read as if it was not run."""
        lines = [line for line in (self.results / f"{name}.log").read_text(errors="replace").splitlines() if mark in line]
        if lines:
            raise RuntimeError(f"{len(lines)} wrong before it was stopped, the first: {lines[0].strip()[:200]}")

    def build(self) -> str:
        variables = {"MEMKERNELS_BUILD": "require"}
        if self.device:
            major, minor = self.device[1].split(".")
            variables["MEMKERNELS_CUDA_ARCHS"] = f"{major}{minor}" + ("a" if major == "9" else "")
        self.python("build", 120, "setup.py", "build_ext", "--inplace", **variables)
        return "for " + (", ".join(self.device) or "the default targets, no GPU here")

    def part(self, name: str, limit: float) -> str:
        """A stage of gpu_stages.py, which writes <name>.json and ends by itself when its time is over."""
        limit = min(self.limit or limit, self.left())
        command = [sys.executable, str(STAGES), name, str(self.results / f"{name}.json"), str(limit - 15)]
        try:
            code = self.execute(name, limit, command)
        except NotRun:
            self.wrong_so_far(name, ": error: ")
            self.wrong_so_far(name, ": fail: ")
            raise
        if code == UNFINISHED:
            raise NotRun(f"nothing wrong, but not all: {self.tail(name)}")
        if code:
            raise RuntimeError(f"exit code {code}: {self.tail(name)}")
        return self.tail(name)

    def tests(self, name: str, limit: float, chosen: str) -> str:
        """A part of tests/gpu. The comparison with float64 is verify's, which does it once."""
        workers = str(min(12, len(os.sched_getaffinity(0))))
        # Without pytest's header, which asks every backend about every sample.
        options = ["-v", "--no-header", "-p", "no:cacheprovider", "-n", workers, "--dist", "worksteal"]
        options.append(f"--junitxml={self.results / f'{name}.xml'}")
        try:
            return self.python(name, limit, "-m", "pytest", *options, "-m", "gpu", "-k", chosen, "tests/gpu")
        except NotRun:
            self.wrong_so_far(name, " FAILED ")
            raise

    def sanitizer(self) -> str:
        found = shutil.which("compute-sanitizer")
        if not found:
            raise NotRun("compute-sanitizer is not on PATH")
        return found

    def canaries(self) -> str:
        tool, nvcc = self.sanitizer(), shutil.which("nvcc")
        if not nvcc:
            raise NotRun("nvcc is not on PATH")
        program = self.results.resolve() / "canary"
        if self.execute("canary-build", 60, [nvcc, "-o", str(program), str(CANARY)]):
            raise NotRun(f"the planted program did not compile: {self.tail('canary-build')}")
        for check, plant in CANARIES.items():
            code = self.execute(f"canary-{check}", 30, [tool, "--tool", check, "--error-exitcode", "99", str(program), plant])
            if code != 99:
                raise NotRun(f"{check} did not report the planted {plant} (exit code {code}: {self.tail(f'canary-{check}')})")
        return f"{', '.join(CANARIES)} report what was planted"

    def check_kernels(self, check: str) -> str:
        tool = self.sanitizer()
        if check in CANARIES and self.status("sanitizer canaries") != "PASSED":
            raise NotRun("the planted errors were not reported, silence would mean nothing")
        name = f"sanitizer-{check}"
        limit = min(self.limit or 60, self.left())
        file, seconds = self.results / f"{name}.jsonl", str(limit - 20)
        command = [tool, "--tool", check, "--error-exitcode", "99", sys.executable, str(STAGES), "tiny", str(file), seconds, "0/1"]
        code = self.execute(name, limit, command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        text = (self.results / f"{name}.log").read_text(errors="replace")
        done = next((line for line in text.splitlines() if line.startswith("tiny: ") and " tasks, " in line), "")
        if code not in (0, UNFINISHED, 99) or not done:
            raise NotRun(f"exit code {code}: {self.tail(name)}")
        if code != 99:
            return f"no error in {done.removeprefix('tiny: ')}"
        if any(kernel in text for kernel in our_kernels()):
            raise RuntimeError(f"errors in our kernels, see {name}.log: {self.tail(name)}")
        return f"errors only in kernels that are not ours: {self.tail(name)}"

    def status(self, name: str) -> str:
        return next((o.status for o in self.outcomes if o.stage == name), "NOT RUN")

    @cached_property
    def machine(self) -> dict[str, object]:
        """Device, versions, commit."""
        device = "'cuda' if torch.cuda.is_available() else 'cpu'"
        code = f"import json, torch; from memkernels.bench import environment; print(json.dumps(environment({device})))"
        found = self.query(code)
        return json.loads("|".join(found)) if found else {"error": self.trouble}

    def write(self) -> Path:
        """gpu.json: the stages, the environment, and every row that the stages wrote."""
        parts = {name: self.results / f"{name}.json" for name in ("verify", "determinism", "bench")}
        rows = {name: json.loads(path.read_text()) for name, path in parts.items() if path.exists()}
        report = {"stages": [asdict(o) for o in self.outcomes], "environment": self.machine, **rows}
        path = self.results / "gpu.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        return path

    def pack(self) -> None:
        """What the stages wrote goes into one file."""
        written = [path for path in sorted(self.results.iterdir()) if path.is_file() and path.name not in self.others]
        with tarfile.open(self.results / "logs.tar.gz", "w:gz") as archive:
            for path in written:
                archive.add(path, path.name)
        for path in written:
            path.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--only", default="", help="comma-separated stages")
    parser.add_argument("--limit", type=float, help="seconds that each stage may take, instead of its own limit")
    arguments = parser.parse_args()
    run = Run(arguments.results, arguments.limit)
    stages: dict[str, tuple[Callable[[], str], bool]] = {
        "build": (run.build, False),
        "verify": (lambda: run.part("verify", 130), True),
        "tests": (lambda: run.tests("tests", 80, "not against_float64 and not layouts"), True),
        "bench": (lambda: run.part("bench", 90), True),
        "determinism": (lambda: run.part("determinism", 45), True),
        "sanitizer canaries": (run.canaries, True),
        **{f"sanitizer {check}": ((lambda check=check: run.check_kernels(check)), True) for check in TOOLS},
        "layouts": (lambda: run.tests("layouts", 120, "layouts"), True),
    }
    chosen = arguments.only.split(",") if arguments.only else list(stages)
    if unknown := [name for name in chosen if name not in stages]:
        parser.error(f"--only: expected some of {', '.join(stages)}, got {', '.join(unknown)}")
    for name, (action, needs_gpu) in stages.items():
        if name in chosen:
            run.stage(name, action, needs_gpu)
            path = run.write()
    run.pack()
    count = {status: sum(o.status == status for o in run.outcomes) for status in ("PASSED", "FAILED", "NOT RUN")}
    print(f"{', '.join(f'{n} {status}' for status, n in count.items())} in {time.monotonic() - run.begin:.0f} s; {path}")
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""`make gpu` where there is no GPU: every stage that needs one says NOT RUN and why, nothing passes by silence, the report is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_gpu(tmp_path):
    stages = "verify,tests,bench,determinism,sanitizer canaries,sanitizer memcheck"
    command = [sys.executable, "tools/gpu.py", "--results", str(tmp_path), "--only", stages]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == stages.split(",")
    assert {stage["status"] for stage in report["stages"]} == {"NOT RUN"}
    assert all(re.search(r"GPU.*\(\w+: .+\)", stage["reason"]) for stage in report["stages"])  # and what torch says to it
    assert report["environment"]["torch"] == torch.__version__
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "logs.tar.gz"]


def gpu_module():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import gpu
    finally:
        sys.path.pop(0)
    return gpu


def test_every_kernel_is_known_as_ours():
    known = set(gpu_module().our_kernels())
    assert len(known) > 50
    assert {"mk::cuda", "matmul_kernel", "recurrence_bwd_kernel", "_varlen_dquery_kernel", "_topk_search_kernel"} <= known


def run_in(folder):
    """Of one that asks no torch for its devices, which takes seconds."""
    with mock.patch.object(gpu_module().Run, "query", lambda *_: []):
        return gpu_module().Run(folder)


def test_results_are_few_files(tmp_path):
    """Logs and parts go into one archive at the end; what was in the folder before stays."""
    (tmp_path / "mine.txt").write_text("mine")
    run = run_in(tmp_path)
    for name in "ab":
        run.stage(name, lambda name=name: run.python(name, 100, "-c", f"print('{name}')"), needs_gpu=False)
        assert [stage["stage"] for stage in json.loads(run.write().read_text())["stages"]] == list("ab")[: "ab".index(name) + 1]
    run.pack()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "logs.tar.gz", "mine.txt"]
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert archive.extractfile("b.log").read().strip() == b"b"


def test_limits(tmp_path):
    """A stage that outlasts its limit was not run; one that exits with an error failed."""
    run = run_in(tmp_path)
    run.stage("slow", lambda: run.python("slow", 6, "-c", "import time; time.sleep(30)"), needs_gpu=False)
    run.stage("wrong", lambda: run.python("wrong", 100, "-c", "print('reason'); raise SystemExit(3)"), needs_gpu=False)
    run.stage("right", lambda: run.python("right", 100, "-c", "print('fine')"), needs_gpu=False)
    assert [(o.status, o.reason) for o in run.outcomes] == [
        ("NOT RUN", "stopped at its limit of 6 s"),
        ("FAILED", "exit code 3: reason"),
        ("PASSED", "fine"),
    ]


PLANTED = """
import os, sys, time
sys.path.insert(0, {tools!r})
import gpu_stages
from gpu_stages import main

def stage(task):
    if task == 3:
        os._exit(11)  # as where the compiler takes the process down
    if task == 5:
        raise RuntimeError("wrong")
    if task == 8:
        time.sleep(60)
    yield {{"op": str(task), "backend": "triton", "status": "ok"}}

class Task(int):
    def facts(self, backend):
        return {{"op": str(self), "backend": backend}}

gpu_stages.__file__, gpu_stages.PROCESSES = __file__, 2
gpu_stages.STAGES["tiny"] = stage, lambda: [Task(n) for n in range({count})]
sys.exit(main())
"""


@pytest.mark.parametrize(
    "count, code, done", [(8, 1, 8), pytest.param(3, 0, 3, marks=pytest.mark.slow), pytest.param(9, 1, 8, marks=pytest.mark.slow)]
)
def test_shares(tmp_path, count, code, done):
    """A crash of a task, or of its process, is a row of the report and the tasks after it are done; one that takes too long is not."""
    (tmp_path / "planted.py").write_text(PLANTED.format(tools=str(ROOT / "tools"), count=count))
    seconds = "25" if done < count else "120"
    command = [sys.executable, tmp_path / "planted.py", "tiny", tmp_path / "tiny.json", seconds]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == code, result.stdout + result.stderr
    rows = {row["op"]: row for row in json.loads((tmp_path / "tiny.json").read_text())}
    assert sorted(rows) == [str(n) for n in range(done)]
    assert {n for n, row in rows.items() if row["status"] == "error"} == ({"3", "5"} if count > 3 else set())
    assert f"{done} of {count} cases" in result.stdout.splitlines()[-1]


def test_what_was_wrong_before_the_limit_is_a_failure(tmp_path):
    run = run_in(tmp_path)
    (tmp_path / "tests.log").write_text("[gw1] [ 12%] FAILED tests/gpu/test_cuda_kernels.py::test_side_stream[lstm-triton]\n")
    run.wrong_so_far("tests", ": error: ")
    with pytest.raises(RuntimeError, match=r"1 wrong before it was stopped.*test_side_stream"):
        run.wrong_so_far("tests", " FAILED ")

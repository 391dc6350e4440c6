"""`make gpu` where there is no GPU: every stage that needs one says NOT RUN and why, nothing passes by silence, the report is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
    assert all("GPU" in stage["reason"] for stage in report["stages"])
    assert report["environment"]["torch"] == torch.__version__


def test_limits(tmp_path):
    """A stage that outlasts its limit was not run; one that exits with an error failed."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import gpu
    finally:
        sys.path.pop(0)
    run = gpu.Run(tmp_path)
    run.stage("slow", lambda: run.python("slow", 6, "-c", "import time; time.sleep(30)"), needs_gpu=False)
    run.stage("wrong", lambda: run.python("wrong", 20, "-c", "print('reason'); raise SystemExit(3)"), needs_gpu=False)
    run.stage("right", lambda: run.python("right", 20, "-c", "print('fine')"), needs_gpu=False)
    assert [(o.status, o.reason) for o in run.outcomes] == [
        ("NOT RUN", "stopped at its limit of 6 s"),
        ("FAILED", "exit code 3: reason"),
        ("PASSED", "fine"),
    ]

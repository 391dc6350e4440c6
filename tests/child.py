"""Runs a piece of Python in a fresh process and says how it ended: for what may crash, hang or change the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *, timeout: float = 280, environment: dict[str, str] | None = None, arguments: tuple[str, ...] = ()) -> str:
    """Standard output of the code; AssertionError with its end when it fails, crashes or takes too long."""
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **(environment or {})}
    command = [sys.executable, "-X", "faulthandler", *arguments, "-c", textwrap.dedent(code)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=variables, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired as hung:
        raise AssertionError(f"no end after {timeout} s: {str(hung.stdout)[-2000:]}") from None
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout

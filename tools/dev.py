"""What the Makefile's words do; standard library only, so that it runs before anything is installed.

    python3 tools/dev.py demo|test|test-all|check|bench|docs|build|gpu [arguments of the tool behind the word]

Sets up .venv once (torch pinned by constraints.txt, the extension built in place) and reuses it while what it was made from is unchanged.
MEMKERNELS_PYTHON=/path/to/python: that interpreter and its packages as they are, no .venv, no pip; the extension is still built.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
BUILD_NEEDS = ("setuptools>=77", "wheel", "pybind11>=2.13", "ninja")
# word -> extras of pyproject.toml that it needs
EXTRAS = {
    "demo": ("plot",),
    "build": (),
    "test": ("test", "triton", "plot", "store"),
    "docs": (),
    "check": ("dev", "triton"),
    "bench": ("bench", "triton"),
}
EXTRAS["test-all"] = EXTRAS["test"]
BUILD_VARIABLES = (
    "MEMKERNELS_BUILD",
    "MEMKERNELS_CUDA",
    "MEMKERNELS_CUDA_ARCHS",
    "MEMKERNELS_SANITIZE",
    "MEMKERNELS_EMULATE_AMX",
    "CXX",
    "CXXFLAGS",
)


def say(text: str) -> None:
    print(f"[memkernels] {text}", flush=True)


def run(*command: str | Path, quiet: bool = False, **kwargs) -> None:
    """Run a command; its failure ends this program with its exit code."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        **kwargs,
    )
    if done.returncode:
        if quiet:
            sys.stderr.buffer.write(done.stdout)
        say(f"failed with exit code {done.returncode}: {' '.join(str(c) for c in command)}")
        sys.exit(done.returncode if 0 < done.returncode < 256 else 1)


def digest(paths: list[Path], *extra: str) -> str:
    found = hashlib.sha256("\0".join(extra).encode())
    for path in sorted(paths):
        found.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def stamped(name: str, value: str) -> bool:
    """True when the stamp of this name holds this value: the step was done from the same files."""
    path = VENV / f".memkernels-{name}"
    return path.exists() and path.read_text() == value


def stamp(name: str, value: str) -> None:
    (VENV / f".memkernels-{name}").write_text(value)


def answers(url: str) -> bool:
    """The host takes a connection within two seconds (pip itself would retry for over a minute)."""
    try:
        socket.create_connection((re.sub(r"https?://|/.*", "", url), 443), timeout=2).close()
    except OSError:
        return False
    return True


def create_venv(python: Path) -> list[str]:
    """Make .venv if it is missing; the command that runs pip for it."""
    if sys.version_info < (3, 10):  # noqa: UP036 (this file is what says so on an older one)
        sys.exit(f"memkernels needs Python 3.10 or later, {sys.executable} is {sys.version.split()[0]}; try make PYTHON=python3.12 ...")
    if not python.exists():
        say("creating .venv")
        if subprocess.run([sys.executable, "-m", "venv", str(VENV)], capture_output=True).returncode:
            shutil.rmtree(VENV, ignore_errors=True)  # Debian without python3-venv has no ensurepip: drive the venv by our own pip
            run(sys.executable, "-m", "venv", "--without-pip", VENV)
    inside = subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0
    return [str(python), "-m", "pip"] if inside else [sys.executable, "-m", "pip", "--python", str(python)]


def pinned_torch() -> str:
    return next(line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))


def install(word: str, python: Path) -> None:
    """torch and the packages of this word, and the package itself, editable."""
    extras = EXTRAS[word]
    value = digest([ROOT / "pyproject.toml", ROOT / "constraints.txt", ROOT / "setup.py"], *extras)
    if python.exists() and stamped(f"install-{word}", value):
        return
    pip = [*create_venv(python), "install", "--disable-pip-version-check", "-q"]
    constrained = [*pip, "-c", "constraints.txt"]
    begin = time.monotonic()
    has_torch = subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode == 0
    if not has_torch and not shutil.which("nvidia-smi") and answers(CPU_INDEX):
        say(f"installing {pinned_torch()} (CPU build)")
        subprocess.run([*pip, "--no-deps", "--index-url", CPU_INDEX, pinned_torch()], cwd=ROOT)
    say("installing torch, build tools and dependencies")
    run(*constrained, pinned_torch(), *BUILD_NEEDS)
    say("building and installing memkernels (editable)")
    run(*constrained, "--no-build-isolation", "-e", f".[{','.join(extras)}]" if extras else ".")
    say(f"installed in {time.monotonic() - begin:.0f} s")
    stamp(f"install-{word}", value)
    stamp("build", build_value(python))


def build_value(python: str | Path) -> str:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()] + [ROOT / "setup.py"]
    return digest(sources, str(python), *(f"{name}={os.environ.get(name, '')}" for name in BUILD_VARIABLES))


def build(python: str | Path) -> None:
    """The extension, in place; ninja compiles only what changed."""
    value = build_value(python)
    own = python == VENV / "bin" / "python"
    if own and stamped("build", value) and (ROOT / "memkernels" / "_build_info.json").exists():
        return
    say("building the extension")
    run(python, "setup.py", "-q", "build_ext", "--inplace")
    if own:
        stamp("build", value)


def prepare(word: str) -> tuple[str, dict[str, str]]:
    """An interpreter with everything this word needs, and the environment to run it in."""
    chosen = os.environ.get("MEMKERNELS_PYTHON")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    if chosen:
        if word != "gpu":  # the GPU run builds as one of its own, time-boxed stages
            build(chosen)
        return chosen, environment
    python = VENV / "bin" / "python"
    with open(ROOT / ".setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        install(word, python)
        build(python)
    return str(python), environment


def check(python: str, environment: dict[str, str]) -> None:
    """Lint, formatting, types, generated documentation: all of them run, beside each other, then any failure counts."""
    sources = [str(p) for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    binary = Path(python).parent / "clang-format"
    formatter = str(binary) if binary.exists() else "clang-format"
    commands = {
        "ruff check": [python, "-m", "ruff", "check", "."],
        "ruff format": [python, "-m", "ruff", "format", "--check", "."],
        "mypy": [python, "-m", "mypy", "memkernels"],
        "clang-format": [formatter, "--dry-run", "-Werror", *sources],
        "generated docs": [python, "tools/docs.py", "--check"],
    }
    failed = []
    options = dict(cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    running = {name: subprocess.Popen(command, **options) for name, command in commands.items()}
    for name, process in running.items():
        output, _ = process.communicate()
        say(name)
        sys.stdout.buffer.write(output)
        sys.stdout.flush()
        if process.returncode:
            failed.append(name)
    if failed:
        say(f"check failed: {', '.join(failed)}")
        sys.exit(1)
    say("check passed: " + ", ".join(commands))


def test(python: str, environment: dict[str, str], arguments: list[str], everything: bool) -> int:
    """The suite; before it, the Triton kernels in Triton's interpreter, which is a mode of a whole process."""
    pytest = [python, "-m", "pytest", "-q", "-n", workers(), "--dist", "worksteal"]
    pytest += ["-m", "slow or not slow" if everything else "not slow"]
    code = 0
    if not arguments:
        say("Triton kernels in the interpreter")
        # Not test_threads.py: the interpreter keeps the running program's index in a global, so it is for one thread.
        chosen = ["tests/test_large.py", "tests/test_triton.py", "tests/test_ops.py", "tests/test_fuzz.py"]
        every_sample = {"MEMKERNELS_INTERPRET_ALL": "1"} if everything else {}  # see tests/cases.py
        code = subprocess.run([*pytest, *chosen], cwd=ROOT, env={**environment, "TRITON_INTERPRET": "1", **every_sample}).returncode
        say(f"Triton kernels in the interpreter: exit code {code}; the suite:")
    return subprocess.run([*pytest, *arguments], cwd=ROOT, env=environment).returncode or code


def workers() -> str:
    return str(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def main() -> None:
    word, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if word not in (*EXTRAS, "gpu"):
        sys.exit(__doc__)
    python, environment = prepare(word)
    if word == "check":
        return check(python, environment)
    if word in ("test", "test-all"):
        sys.exit(test(python, environment, rest, everything=word == "test-all"))
    commands = {
        "demo": ["-m", "memkernels", "demo"],
        "bench": ["benchmarks/targets.py"],
        "docs": ["tools/docs.py"],
        "gpu": ["tools/gpu.py"],
    }
    if word == "bench":  # read when torch is loaded: without it the kernel may leave all threads on one core for a whole run
        environment.setdefault("OMP_PROC_BIND", "true")
    if word in commands:
        sys.exit(subprocess.run([python, *commands[word], *rest], cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()

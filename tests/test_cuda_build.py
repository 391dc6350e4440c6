"""The CUDA C++ kernels without a GPU: they compile for every target without spills, and compute right under the emulator."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
PACKED = [path for path in KERNELS if "load_pack" in path.read_text()]  # kernels over floats, a template a dtype
TARGETS = ("80", "90a", "100")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_nvcc
@pytest.mark.parametrize("arch", [pytest.param(arch, marks=[] if arch == "90a" else [pytest.mark.slow]) for arch in TARGETS])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_resources(kernel, arch, tmp_path):
    """No spills, no stack, and registers for two blocks of 256 threads on a multiprocessor."""
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c", str(kernel), "-o", str(tmp_path / "k.o")]
    done = subprocess.run(["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", *target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) >= (20 if kernel in PACKED else 5) and len(spills) == len(registers)
    assert set(spills) == {("0", "0", "0")}
    assert max(registers) <= 128


@needs_nvcc
@pytest.mark.parametrize("kernel", PACKED, ids=lambda path: path.stem)
def test_wide_access(kernel, tmp_path):
    """The packed variants really move 16 bytes an access, and no kernel adds floats atomically."""
    target = tmp_path / "k.ptx"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-arch=compute_90", "-ptx", str(kernel), "-o", str(target)], check=True
    )
    text = target.read_text()
    assert re.search(r"ld\.global(\.nc)?\.v4\.[bfu]32", text) and re.search(r"st\.global\.v4\.[bfu]32", text)
    assert not re.search(r"\b(atom|red)\.", text)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
def test_emulated_kernels(tmp_path):
    """Every kernel in a small CUDA emulator on host memory: samples, dtypes, layouts, canaries around the outputs."""
    import pybind11

    library = tmp_path / "_C_cuda.so"
    sources = [ROOT / "csrc" / "cuda" / "bindings.cpp", *KERNELS]
    includes = [ROOT / "tests" / "cuda_emulation", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = "-std=c++17 -O1 -w -fPIC -shared -fvisibility=hidden -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error".split()
    command = ["g++", *flags, "-DMK_DEVICE_TYPE=dlpack::kCPU", *(f"-I{path}" for path in includes), "-x", "c++"]
    subprocess.run([*command, *map(str, sources), "-o", str(library)], check=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    check = [sys.executable, str(ROOT / "tests" / "cuda_emulation" / "check.py"), str(library)]
    done = subprocess.run(check, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert re.match(r"[1-9]\d\d+ cases, 0 failures", done.stdout)


@pytest.mark.skipif(importlib.util.find_spec("memkernels._C_cuda") is None, reason="memkernels._C_cuda was not built (no nvcc)")
def test_imports_without_driver():
    """The module loads where there is no CUDA driver, and a CPU tensor is refused by name."""
    code = (
        "import torch, memkernels._C_cuda as c, memkernels._compat as compat; c.bind(compat.dlpack_exchange_api());"
        "t = torch.zeros(1, 2)\n"
        "try: c.lstm_gates(t, t, torch.zeros(1, 8), t, None)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "lstm_gates: device: expected a CUDA tensor" in done.stdout, done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("memkernels._C_cuda") is None, reason="memkernels._C_cuda was not built (no nvcc)")
def test_built_for_every_target():
    """The shipped module holds machine code for each target and PTX for what comes later."""
    tool = shutil.which("cuobjdump") or next(iter(_triton_tools("cuobjdump")), None)
    if tool is None:
        pytest.skip("cuobjdump is neither on PATH nor in Triton's package")
    module = importlib.util.find_spec("memkernels._C_cuda").origin
    listed = subprocess.run([tool, "--list-elf", "--list-ptx", module], capture_output=True, text=True, check=True).stdout
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    old = int(re.search(r"release (\d+)\.", version)[1]) < 13  # as in Triton 3.6: it lists what CUDA 13 made for 90a as 90
    for arch in TARGETS:
        assert f".sm_{arch.rstrip('a') if old else arch}.cubin" in listed
    assert re.search(r"\.sm_\d+\.ptx", listed)


def _triton_tools(name):
    found = importlib.util.find_spec("triton")
    return Path(found.origin).parent.glob(f"backends/nvidia/bin/{name}") if found else ()

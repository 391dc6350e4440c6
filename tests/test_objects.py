"""What the compiled objects hold: wide instructions only where they are dispatched, nothing that the linker could merge across levels."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / f"cpu-release-{sysconfig.get_config_var('SOABI')}" / "obj"
FOUND = sorted(OBJECTS.rglob("*.o"))
# Instructions that each folder of objects may not contain; objects above the levels are host code and count as baseline.
WIDE, VECTOR, TILE = r"%zmm", r"%ymm", r"\b(tile|tdp|ldtilecfg|sttilecfg)"
FORBIDDEN = {"baseline": (VECTOR, WIDE, TILE), "avx2": (WIDE, TILE), "avx512": (TILE,), "amx": ()}

pytestmark = pytest.mark.skipif(not FOUND or shutil.which("objdump") is None, reason="no objects of an in-place build, or no objdump")


def level(path: Path) -> str:
    return path.parent.name if path.parent.name in FORBIDDEN else "baseline"


@pytest.mark.parametrize("path", FOUND, ids=lambda p: str(p.relative_to(OBJECTS)))
def test_instructions(path):
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True).stdout
    for pattern in FORBIDDEN[level(path)]:
        found = re.search(pattern, text)  # the pattern alone: with the rest of its line it takes seconds
        assert found is None, f"{level(path)} code must not hold {text[: found.end()].splitlines()[-1].strip()}"


@pytest.mark.parametrize("path", [p for p in FOUND if level(p) != "baseline"], ids=lambda p: str(p.relative_to(OBJECTS)))
def test_no_shared_code(path):
    """A weak function of a wide level would replace the baseline's copy of it: then an old CPU runs instructions it does not have."""
    text = subprocess.run(["nm", "-C", "--defined-only", str(path)], capture_output=True, text=True, check=True).stdout
    # DW.ref.__gxx_personality_v0 is a pointer that every level holds alike, not code.
    weak = [line for line in text.splitlines() if re.search(r" [WVu] (?!DW\.ref\.)", line)]
    assert not weak, weak[:5]


def test_extension_links_no_torch():
    spec = importlib.util.find_spec("memkernels._C")
    if spec is None:
        pytest.skip("memkernels._C was not built")
    text = subprocess.run(["objdump", "-p", spec.origin], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED\s+(\S+)", text)
    assert needed and not [name for name in needed if re.match(r"lib(torch|c10|gomp|omp|iomp|mkl)", name)], needed

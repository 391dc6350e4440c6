"""The README and the docs say what is true: examples run, generated parts are current, the op table's cells are what `explain` says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memkernels
from memkernels.testing import compare
from memkernels.testing.inputs import draw
from memkernels.testing.spec import specs

ROOT = Path(__file__).resolve().parent.parent


def test_readme_examples():
    """The python blocks of the README run, one after the other, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


WITH_EXAMPLES = [page for page in sorted((ROOT / "docs/ops").glob("*.md")) if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_op_page_examples(page):
    """The python blocks of an op's page run as they stand there."""
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, page.name, "exec"), namespace)


def test_readme_starts_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert re.match(r"# memkernels\n\n```\nmake demo\nmake test\n```\n", text)


def test_generated_parts_are_current():
    done = subprocess.run([sys.executable, "tools/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


@pytest.mark.parametrize("name", sorted(specs()))
def test_op_table(name):
    """Where the table names a dtype for a backend that is here, the plain typical call of that dtype runs on it."""
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if re.match(rf"\| (\[{name}\]|{name} )", line))
    spec = specs()[name]
    cells = dict(zip(("reference", "cpp", "triton", "cuda"), (cell.strip() for cell in row.strip("|").split("|")[1:])))
    there = memkernels.backends()
    for backend in ("reference", "cpp"):
        if there[backend] is not None:
            continue
        for dtype in compare.DTYPES:
            inputs = draw(spec, spec.samples[0], dtype)
            runs = compare.why_not(spec, inputs, dict(spec.samples[0].options), backend) is None
            assert runs == (str(dtype).removeprefix("torch.") in cells[backend].split(", ")), (backend, dtype)
    assert torch.float64 in compare.DTYPES

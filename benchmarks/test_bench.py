"""pytest-benchmark over the specs' bench sizes: `pytest benchmarks --benchmark-json=F`; each case is checked against float64 first.

Every op is timed itself and as each of its peers, so `--benchmark-group-by=group` shows them side by side; extra_info holds the fraction of
the machine's floor, the bytes moved, the peak memory beyond inputs and outputs and the size at which the result was checked.
"""

from __future__ import annotations

import pytest
import torch

from memkernels.bench.peers import invoke, peer
from memkernels.bench.runner import Call, Case, once
from memkernels.testing.inputs import draw
from memkernels.testing.spec import specs

DTYPES = (torch.float32, torch.bfloat16)
MODES = ("forward", "fwd+bwd")
CASES = [(spec, sample, dtype, mode) for spec in specs().values() for sample in spec.bench for dtype in DTYPES for mode in MODES]
checked: dict[tuple[str, str, torch.dtype], Case] = {}


def names(spec):
    return ["memkernels", *spec.peers, *(["compile"] if peer(spec, "compile") is not None else [])]


@pytest.mark.parametrize(
    ("spec", "sample", "dtype", "mode", "who"),
    [pytest.param(*case, who, id=f"{case[0].name}-{case[1].name}-{case[2]}-{case[3]}-{who}") for case in CASES for who in names(case[0])],
)
def test_bench(benchmark, spec, sample, dtype, mode, who):
    key = (spec.name, sample.name, dtype)
    if key not in checked:
        checked[key] = Case(spec, sample, dtype)
        checked[key].check()
    case = checked[key]
    function = invoke(spec) if who == "memkernels" else peer(spec, who)
    call = Call(spec, function, sample, draw(spec, sample, dtype))
    once(call, mode, "cpu", 1)
    benchmark.group = f"{spec.name} {sample.name} {dtype} {mode}"
    benchmark.pedantic(once, args=(call, mode, "cpu", 1), rounds=5, warmup_rounds=1)
    row = case.row(mode, benchmark.stats.stats.median, who, None, "")
    about = dict(op=row.op, size=row.size, dtype=row.dtype, mode=row.mode, who=who, threads=row.threads, checked=row.checked)
    about |= dict(extra_mb=call.extra_mb(mode, "cpu"))
    mine = dict(backend=row.backend, level=row.level) if who == "memkernels" else {}
    benchmark.extra_info.update(about, **mine, gb_s=row.gb_s, floor_fraction=row.floor)

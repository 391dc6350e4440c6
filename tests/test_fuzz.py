"""Hypothesis draws calls from the specs. The seed stands in the header; MEMKERNELS_FUZZ_SEED sets it, the long form takes a fresh one."""

import os
import time

import pytest
from cases import INTERPRETED, LONG_REFERENCES, MANY_PROGRAMS, one_per_op
from fuzz import run

from memkernels.testing import specs

SEED = int(os.environ.setdefault("MEMKERNELS_FUZZ_SEED", "0"))
LONG_SEED = int(os.environ.setdefault("MEMKERNELS_FUZZ_LONG_SEED", str(time.time_ns() % 10**9)))
DEFAULT, LONG = (3, 200) if INTERPRETED else (60, 3000)
# In the interpreter, of what has a Triton kernel.
KERNELS = list(dict.fromkeys(p.values[0].spec.name for p in one_per_op()))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("op", [op for op in KERNELS if not (INTERPRETED and op in MANY_PROGRAMS)])
def test_fuzz(op):
    run(specs()[op], DEFAULT, SEED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", KERNELS)
def test_fuzz_long(op):
    run(specs()[op], LONG // 5 if op in LONG_REFERENCES else LONG, LONG_SEED, wider=True)

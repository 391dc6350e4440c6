"""Hypothesis draws calls from the specs. The seed stands in the header; MEMKERNELS_FUZZ_SEED sets it, the long form takes a fresh one."""

import os
import time

import pytest
from cases import INTERPRETED, MANY_PROGRAMS
from fuzz import run

from memkernels.testing import specs

SEED = int(os.environ.setdefault("MEMKERNELS_FUZZ_SEED", "0"))
LONG_SEED = int(os.environ.setdefault("MEMKERNELS_FUZZ_LONG_SEED", str(time.time_ns() % 10**9)))
DEFAULT, LONG = (3, 200) if INTERPRETED else (60, 3000)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("op", [op for op in specs() if not (INTERPRETED and op in MANY_PROGRAMS)])
def test_fuzz(op):
    run(specs()[op], DEFAULT, SEED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", specs())
def test_fuzz_long(op):
    run(specs()[op], LONG, LONG_SEED)

"""Hypothesis draws calls from the specs. The seed stands in the header; MEMKERNELS_FUZZ_SEED sets it, the long form takes a fresh one."""

import os
import time

import hypothesis
import pytest
from cases import INTERPRETED
from fuzz import calls, check_call

from memkernels.testing import specs

SEED = int(os.environ.setdefault("MEMKERNELS_FUZZ_SEED", "0"))
LONG_SEED = int(os.environ.setdefault("MEMKERNELS_FUZZ_LONG_SEED", str(time.time_ns() % 10**9)))
DEFAULT, LONG = (15, 200) if INTERPRETED else (60, 3000)


def fuzz(spec, examples, seed):
    counts = {True: 0, False: 0}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck), derandomize=False
    )
    @hypothesis.given(calls(spec))
    def run(call):
        counts[check_call(call)] += 1

    run()
    assert counts[True] > examples // 10, f"only {counts[True]} of {sum(counts.values())} drawn calls could run"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("op", specs())
def test_fuzz(op):
    fuzz(specs()[op], DEFAULT, SEED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("op", specs())
def test_fuzz_long(op):
    fuzz(specs()[op], LONG, LONG_SEED)

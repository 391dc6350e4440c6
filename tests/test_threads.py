"""Threads, forks, DataLoader workers, and memory over many calls."""

from concurrent.futures import ThreadPoolExecutor

import checks
import pytest
import torch
from cases import DTYPES, INTERPRETED, select
from child import run_python

pytestmark = pytest.mark.timeout(300)
in_a_process = pytest.mark.skipif(INTERPRETED, reason="about processes and the C++ kernels")


def check_python_threads(case, workers=8, calls=20):
    """Many Python threads at once get the bits that one gets."""
    given = [case.inputs(seed=i) for i in range(workers)]
    wanted = [case.evaluate(g) for g in given]

    threads = torch.get_num_threads()

    def work(i):
        if case.backend == "reference":  # torch's own products depend on the number of threads, which a new Python thread does not inherit
            torch.set_num_threads(threads)
        for _ in range(calls):
            checks.assert_same(case.evaluate(given[i]), wanted[i], f"thread {i}")

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))


@pytest.mark.parametrize("case", select(dtypes=DTYPES[1:2], first=1))
def test_python_threads(case):
    check_python_threads(case, calls=2 if INTERPRETED else 20)


@pytest.mark.slow
@pytest.mark.parametrize("case", select(dtypes=DTYPES[1:3], hard=False, empty=False))
def test_python_threads_long(case):
    check_python_threads(case, calls=200)


@in_a_process
def test_fork_after_threads():
    run_python("import processes as p; p.check_fork(p.busy_cases())")


@in_a_process
@pytest.mark.slow
def test_fork_after_threads_often():
    run_python("import processes as p\ncases = p.busy_cases()\nfor _ in range(30): p.check_fork(cases)", timeout=280)


@in_a_process
def test_dataloader_workers():
    run_python("import processes as p\nif __name__ == '__main__': p.check_dataloader(p.typical_cases())")


@in_a_process
def test_memory_does_not_grow():
    run_python("import processes as p; p.check_memory(p.typical_cases('traced'), 200, 1 << 19)")


@in_a_process
@pytest.mark.slow
@pytest.mark.timeout(1800)  # 54 cases of 8 s each, when memory stands still at once
def test_memory_does_not_grow_over_10000_calls():
    run_python("import processes as p; p.check_memory(p.typical_cases(), 10_000, 1 << 18)", timeout=1700)

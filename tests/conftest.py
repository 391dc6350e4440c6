"""Settings of every test: fresh memory is NaN, threads are few, and the header says which backends are not tested here and why."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch

# Files with tests of many seconds.
LONG = (
    "test_cuda_build", "test_distributed", "test_gpu_command", "test_guard", "test_harness", "test_large", "test_sharded_store",
    "test_threads", "test_triton_aot",
)  # fmt: skip


def pytest_configure(config):
    torch.set_num_threads(1)  # tiny samples, and xdist already uses the cores; the checks of threads set more themselves


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)  # or one worker has a long one left when the others are done


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()  # twenty thousand cases stay to the end: no collection need look at them again


def pytest_report_header(config):
    import cases
    import test_fuzz

    from memkernels.testing import compare

    lines = cases.not_run()
    head = f"memkernels: backends {', '.join(compare.labels())}" + (" (Triton in its interpreter)" if cases.INTERPRETED else "")
    seeds = f"memkernels: fuzz seed {test_fuzz.SEED}, long form {test_fuzz.LONG_SEED}"
    return [head, seeds, *(f"memkernels: not run: {line}" for line in lines)]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """torch fills every new tensor with NaN (or the largest integer), so an element that a kernel forgets shows."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def torchs_generator():
    """The same random numbers in any order of the tests, on any worker. torch.manual_seed would keep a list of its calls for a GPU."""
    torch.default_generator.manual_seed(0)


@pytest.fixture
def three_threads():
    """More than one, as users have."""
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def in_memory(tmp_path_factory):
    """A directory in memory where there is such a place: for tests about the order of calls, which would only wait for a disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("files")
        return
    with tempfile.TemporaryDirectory(prefix="memkernels-", dir="/dev/shm") as folder:
        yield Path(folder)

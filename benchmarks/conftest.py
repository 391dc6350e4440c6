"""Writes what a reader needs later into pytest-benchmark's JSON: the environment, and each row's numbers."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_PROC_BIND", "true")  # before torch is loaded: else both threads may share a core for a whole run

import torch

from memkernels import bench


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["memkernels"] = bench.environment()


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """The bars are stated for two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

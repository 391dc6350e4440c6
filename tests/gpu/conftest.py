"""A device that a test broke is of no use to the tests after it."""

from __future__ import annotations

import os
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def next_test_has_a_device():
    """After an access out of bounds every call fails in this process: under xdist it ends, names the test, and another takes over."""
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{os.environ.get('PYTEST_CURRENT_TEST')}: {error}", file=sys.__stderr__, flush=True)
            os._exit(3)

"""The floor that benchmark rows are measured by: the larger of bytes over bandwidth and operations over the matrix rate."""

from __future__ import annotations

import pytest
import torch

from memkernels.bench.environment import floor_seconds

FOUND = {"copy_gb_s": 20.0, "read_gb_s": 50.0, "memory_read_gb_s": 25.0, "float32_gflop_s": 100.0, "bfloat16_gflop_s": 400.0}


@pytest.mark.parametrize(
    ("moved", "flops", "dtype", "seconds"),
    [
        (1e6, 0.0, torch.float32, 1e6 / 50e9),
        ((1 << 28) - 1, 0.0, torch.float32, ((1 << 28) - 1) / 50e9),
        (1 << 28, 0.0, torch.float32, (1 << 28) / 25e9),  # no cache holds it from one call to the next
        (1e6, 1e9, torch.float32, 1e9 / 100e9),
        (1e6, 1e9, torch.bfloat16, 1e9 / 400e9),
        (1e6, 1e9, torch.float64, 1e9 / 100e9),  # not measured: as float32
    ],
)
def test_floor_is_the_larger_of_both(monkeypatch, moved, flops, dtype, seconds):
    monkeypatch.setitem(floor_seconds.__globals__, "ceilings", lambda device, threads: FOUND)
    assert floor_seconds(moved, flops, dtype, "cpu") == pytest.approx(seconds)

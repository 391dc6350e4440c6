"""Benchmarks over the op specs: every row is checked against float64 before it is timed, interleaved with its peers.

Example:
    >>> from memkernels import bench
    >>> rows = bench.run(["memory_read"], quick=True, peers=("eager",))  # doctest: +SKIP
    >>> print(bench.table(rows))  # doctest: +SKIP
    >>> bench.write_json("bench.json", rows)  # doctest: +SKIP
    >>> bench.plot(rows, "plots")  # doctest: +SKIP
"""

from __future__ import annotations

from memkernels.bench.environment import environment
from memkernels.bench.report import plot, report, table, write_json
from memkernels.bench.row import Row
from memkernels.bench.runner import run

__all__ = ["Row", "environment", "plot", "report", "run", "table", "write_json"]

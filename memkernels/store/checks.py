"""Comparing every checksum of a store."""

from __future__ import annotations

from dataclasses import dataclass, field

from memkernels.store import disk
from memkernels.store.catalog import follows, runs
from memkernels.store.crc32c import crc32c
from memkernels.store.engine import Engine, Transaction
from memkernels.store.errors import StoreError
from memkernels.store.format import HEADER, SegmentHeader, State
from memkernels.store.journal import Record
from memkernels.store.runs import batches
from memkernels.store.segments import Segments


@dataclass
class Report:
    """What was read, and each thing that is wrong with it."""

    rows: int = 0
    keys: int = 0
    segments: int = 0
    blocks: int = 0
    runs: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(engine: Engine, transaction: Transaction, segments: Segments, state: State, journal: list[Record]) -> Report:
    report, row = Report(rows=state.rows, segments=state.segments), 0
    report.problems += engine.verify()
    try:
        for index in range(state.segments):
            path = segments.path(index)
            header = disk.read_at(segments.files[index].fd, HEADER, 0)
            if SegmentHeader.decode(path.name, header) != segments.header(index):
                report.problems.append(f"{path.name}: it belongs to another store or place")
        for what, run, _, data in runs(transaction, segments.schema, state, journal):
            report.keys += sum(len(keys) for keys, _ in batches(what, run))
            report.runs, report.bytes = report.runs + 1, report.bytes + len(data)
            end = follows(what, run, row)
            for count, crc in run.blocks:
                _block(report, segments, row, count, crc)
                row += count
            row = end
        if row != state.rows:
            report.problems.append(f"the index has checksums of {row} rows of {state.rows}")
    except (StoreError, OSError) as error:
        report.problems.append(str(error))
    return report


def _block(report: Report, segments: Segments, row: int, count: int, crc: int) -> None:
    problem = ""
    try:
        data = segments.read(row, count)
        report.blocks, report.bytes = report.blocks + 1, report.bytes + len(data)
        if len(data) != count * segments.layout.stride or crc32c(data) != crc:
            problem = "wrong checksum"
    except OSError as error:
        problem = str(error)
    if problem:
        name = segments.path(row // segments.state.capacity).name
        report.problems.append(f"{name}: rows {row} to {row + count}: {problem}")

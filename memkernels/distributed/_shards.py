"""The folders of a sharded store: CURRENT names the generation and the number of ranks, generation-000001/rank-00000-of-00002 is a shard.

A generation is complete before CURRENT names it; what CURRENT does not name does not exist.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from memkernels._checks import fail
from memkernels.distributed._collectives import tell
from memkernels.store import KeyValueStore
from memkernels.store.columns import Columns, as_columns
from memkernels.store.errors import StoreError, StoreFormatError

NAME = "ShardedStore"
VERSION = 1
MOST_RANKS = 1 << 16


def folder(root: str | os.PathLike[str], number: int, rank: int, ranks: int) -> Path:
    return Path(root) / f"generation-{number:06d}" / f"rank-{rank:05d}-of-{ranks:05d}"


def shape_of(value_shape: Any, dtype: Any, columns: Any) -> Columns:
    return as_columns(NAME, value_shape, dtype, columns)


def prepare(root: Path) -> None:
    """For a store about to be made: refuses a folder that holds one."""
    if (root / "CURRENT").exists():
        raise StoreError(f"{NAME}: there is a store at {root} already; ShardedStore.open opens it")
    (root / "generation-000001").mkdir(parents=True, exist_ok=True)


def write_current(root: Path, number: int, ranks: int, rank: int) -> None:
    """Names a generation, in one step. Every rank writes the same, so that it is there on every disk."""
    beside = root / f".CURRENT.{rank}.tmp"  # not of the process: those of two containers may have one number
    with open(beside, "w", encoding="ascii") as file:
        file.write(f"memkernels.ShardedStore {VERSION} {number} {ranks}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, root / "CURRENT")
    for path in (root, root.absolute().parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_current(root: Path) -> tuple[int, int]:
    """(generation, ranks), or (0, 0) where there is none."""
    try:
        with open(root / "CURRENT", "rb") as file:
            text = file.read(200)
    except (FileNotFoundError, NotADirectoryError):
        return 0, 0
    found = re.fullmatch(rb"memkernels\.ShardedStore (\d{1,9}) (\d{1,9}) (\d{1,9})\n", text)
    if not found:
        raise StoreFormatError(f"{root / 'CURRENT'}: expected the line of a sharded store, got {text[:40]!r}")
    version, number, ranks = (int(n) for n in found.groups())
    if version > VERSION:
        raise StoreFormatError(f"{root}: is of format version {version}, newer than this memkernels reads ({VERSION})")
    if not (version and number and 0 < ranks <= MOST_RANKS):
        raise StoreFormatError(f"{root / 'CURRENT'}: expected a generation and ranks, got {text[:40]!r}")
    return number, ranks


def current(root: Path, device: torch.device, group: Any) -> tuple[int, int]:
    """The newest generation that any rank sees, and how many ranks wrote it; all ranks learn the same."""
    problem, own = None, (0, 0)
    try:
        own = _read_current(root)
    except (StoreError, OSError) as error:
        problem = error
    lines = tell([float(problem is not None), *map(float, own)], device, group)
    if problem is not None:
        raise problem
    for rank, line in enumerate(lines):
        if line[0]:
            fail(NAME, f"rank {rank}", "a path like here", "an error there", RuntimeError)
    number, ranks = max((int(line[1]), int(line[2])) for line in lines)
    if not number:
        raise StoreError(f"{NAME}: there is no sharded store at {root}")
    return number, ranks


def shared_out(root: Path, number: int, ranks: int, device: torch.device, group: Any) -> list[Path]:
    """The old shards that this rank reads: of those that see a shard, all in turn."""
    folders = [folder(root, number, rank, ranks) for rank in range(ranks)]
    sees = tell([float(path.is_dir()) for path in folders], device, group)
    mine, rank = [], torch.distributed.get_rank(group)
    for old, path in enumerate(folders):
        readers = [reader for reader, line in enumerate(sees) if line[old]]
        if not readers:
            raise StoreError(f"{NAME}: no rank sees {path}, of the {ranks} shards that make up the store")
        if readers[old % len(readers)] == rank:
            mine.append(path)
    return mine


def remove_others(root: Path, number: int) -> None:
    """Removes the generations that are not this one; several ranks may do so at once."""
    for path in root.glob("generation-*"):
        if path.name != f"generation-{number:06d}":
            shutil.rmtree(path, ignore_errors=True)


def as_text(store: KeyValueStore) -> str:
    """Type of keys, and columns, for the ranks that have no old shard to read."""
    columns = {name: [list(shape), str(dtype).removeprefix("torch.")] for name, (shape, dtype) in store.columns.items()}
    return json.dumps([store.key_type, columns])


def from_text(text: str) -> tuple[str, Columns]:
    key_type, columns = json.loads(text)
    return key_type, {name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in columns.items()}

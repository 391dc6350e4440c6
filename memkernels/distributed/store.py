"""An exact key-value store whose keys are spread over several processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from memkernels._checks import check_choice, check_flag, fail
from memkernels.distributed import _shards
from memkernels.distributed._collectives import agree, check_group, speaking, tell, tell_text, together
from memkernels.distributed._routing import Route
from memkernels.store import KeyValueStore
from memkernels.store.columns import Columns, as_default, as_names, as_values
from memkernels.store.keys import as_batch

NAME = "ShardedStore"
MODES = ("r", "w")
STATUS: Columns = {"status": ((), torch.int8)}
FOUND: Columns = {"found": ((), torch.bool)}


class ShardedStore:
    """`KeyValueStore` over the ranks of a process group: each key lies on one rank, which its hash says; every rank may ask for any key.

    Each rank passes a batch of its own, which may be empty. All ranks of the group must make every call together (``len(store)`` too); only
    `local`, `columns` and `key_type` are this rank's own. Rows travel once to their owners (``all_to_all``) and answers once back. Of equal
    keys in the batches of several ranks the last one wins, ranks in order, on every run.

    Args:
        value_shape, dtype, key_type, columns, durability: as `KeyValueStore` takes them, the same on all ranks.
        path: a folder, made by this call, that is the same on all ranks that share a disk; each rank keeps its shard in a folder of its own
            below it. None: in memory. See `open`.
        device: of keys and values on this rank and of what is sent: "cpu" for gloo, this rank's GPU for nccl.
        group: the process group; None is the default group.

    Attributes: `local`: the `KeyValueStore` of the keys that this rank owns.

    Durability: `commit` makes each rank's shard durable; all are when it returns. A crash while it runs leaves each shard whole, with this
        commit or without it.
    Raises: RuntimeError without a process group, or where another rank refused its arguments or failed (its own error is raised there; what
        the other ranks stored in such a call stays stored, not committed); ValueError, TypeError for arguments of this rank, or that differ
        between ranks.

    Example:
        >>> store = ShardedStore(64, path="shards")  # on each of 4 ranks  # doctest: +SKIP
        >>> status = store.store(torch.arange(1000), torch.randn(1000, 64))  # doctest: +SKIP
        >>> values, found = store.retrieve([7, 2**40])  # whoever stored them  # doctest: +SKIP
    """

    def __init__(
        self,
        value_shape: Any = (),
        dtype: torch.dtype = torch.float32,
        *,
        key_type: str = "int64",
        columns: Any = None,
        path: str | os.PathLike[str] | None = None,
        device: Any = "cpu",
        durability: str = "commit",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        root = self._join(device, group, lambda: None if path is None else _as_path(path))
        own = None if root is None else _shards.folder(root, 1, self.rank, self.size)

        def make() -> KeyValueStore:
            shape = _shards.shape_of(value_shape, dtype, columns)
            if root is None or own is None:
                return KeyValueStore(columns=shape, key_type=key_type, device=device, durability=durability)
            _shards.prepare(root)
            return KeyValueStore(columns=shape, key_type=key_type, path=own, durability=durability)

        new = own is not None and not own.exists()
        try:
            self.local = together(NAME, make, self.device, group, KeyValueStore.close)
            self._same_schema("path" if path is not None else "")
            new = False  # from here on CURRENT may name it
            if root is not None:
                together(NAME, lambda: _shards.write_current(root, 1, self.size, self.rank), self.device, group)
        except BaseException:
            self._abandon(own if new else None)
            raise

    def _join(self, device: Any, group: Any, path: Callable[[], Path | None], mode: str = "w") -> Path | None:
        """This process's place in the group, once all ranks have named a device, a path (returned) and the same mode."""
        check_group(NAME, group)
        self.group, self.device = group, speaking(device)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        roots: list[Path | None] = []

        def plan() -> dict[str, float]:
            if torch.device(device) != self.device:
                fail(NAME, "device", "a device that holds data", device)
            check_choice(NAME, "mode", mode, MODES)
            roots.append(path())
            return {"mode": MODES.index(mode)}

        agree(NAME, "mode", ("mode",), (), plan, self.device, group)
        return roots[0]

    def _abandon(self, made: Path | None) -> None:
        """Closes what was opened; a folder that this call made is taken away, so that it may be made again."""
        if hasattr(self, "local"):
            self.local.close()
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)

    def _same_schema(self, more: str = "") -> None:
        """All ranks have the same keys and columns."""
        said = tell_text(f"{self.key_type} keys, {self.columns} {more}", self.device, self.group)
        if len(set(said)) > 1:
            fail(NAME, "columns", "the same keys and columns on all ranks", "; ".join(dict.fromkeys(said)))

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], mode: str = "w", *, device: Any = "cpu", durability: str = "commit", group: Any = None
    ) -> ShardedStore:
        """The store that lies at `path`, written by this number of ranks or by another one.

        With another one (and mode "w") every key is sent to its new owner, into new folders that replace the old ones once all of them are
        complete; a crash before that leaves the old ones. Each old folder is read by one of the ranks that can see it.

        Args:
            mode: the same on all ranks: "w", or "r" to read what was committed (`local.refresh` takes in what is later); "r" needs as
                many ranks as have written it.
        """
        self = cls.__new__(cls)
        root = self._join(device, group, lambda: _as_path(path), mode)
        assert root is not None
        number, ranks = _shards.current(root, self.device, group)
        try:
            if ranks != self.size:
                if mode == "r":
                    fail(NAME, "mode", f"'w' to spread the keys of {ranks} ranks over {self.size}", "'r'")
                self._spread(root, number, ranks)
                number += 1
            own = _shards.folder(root, number, self.rank, self.size)
            opened = partial(KeyValueStore.open, own, mode, durability=durability)
            self.local = together(NAME, opened, self.device, group, KeyValueStore.close)
            if mode == "w":
                _shards.remove_others(root, number)
            self._same_schema()
        except BaseException:
            self._abandon(None)
            raise
        return self

    def _spread(self, root: Path, number: int, ranks: int) -> None:
        """Takes over the shards of `ranks` ranks as a new generation of folders, durable before the old ones go: whatever durability the
        caller wants of later commits, these keys had been committed."""
        mine = _shards.shared_out(root, number, ranks, self.device, self.group)
        with contextlib.ExitStack() as stack:

            def readers() -> list[KeyValueStore]:
                return [stack.enter_context(KeyValueStore.open(folder, mode="r")) for folder in mine]

            old = together(NAME, readers, self.device, self.group)
            said = tell_text(_shards.as_text(old[0]) if old else "", self.device, self.group)
            key_type, columns = _shards.from_text(next(text for text in said if text))

            def make() -> KeyValueStore:
                folder = _shards.folder(root, number + 1, self.rank, self.size)
                return KeyValueStore(columns=columns, key_type=key_type, path=folder, durability="commit")

            # All leftovers are gone before a rank makes its folder.
            together(NAME, lambda: _shards.remove_others(root, number), self.device, self.group)
            self.local = together(NAME, make, self.device, self.group, KeyValueStore.close)
            self._take_over(batch for store in old for batch in store.items())
            self.commit()
            self.close()
        together(NAME, lambda: _shards.write_current(root, number + 1, self.size, self.rank), self.device, self.group)
        together(NAME, lambda: _shards.remove_others(root, number + 1), self.device, self.group)

    def _take_over(self, batches: Iterator[tuple[Any, Any]]) -> None:
        """Stores what this rank reads of the old shards, until no rank has more."""
        while True:
            keys, values = together(NAME, lambda: next(batches, (None, None)), self.device, self.group)  # a damaged shard raises on all
            if not any(line[0] for line in tell([float(keys is not None)], self.device, self.group)):
                return
            if keys is None:
                keys = [] if self.key_type != "int64" else torch.empty(0, dtype=torch.int64)
                values = {name: torch.empty(0, *shape, dtype=dtype) for name, (shape, dtype) in self.columns.items()}
            self.store(keys, values)

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (shape, dtype)}."""
        return self.local.columns

    @property
    def key_type(self) -> str:
        return self.local.key_type

    def store(self, keys: Any, values: Any, *, if_absent: bool = False, accumulate: bool = False) -> torch.Tensor:
        """As `KeyValueStore.store`, of this rank's "n" keys and values; returns the status of each, int8 "n"."""
        checked: dict[str, torch.Tensor] = {}

        def plan(count: int) -> dict[str, float]:
            check_flag(NAME, "if_absent", if_absent)
            check_flag(NAME, "accumulate", accumulate)
            checked.update(as_values(NAME, self.columns, values, count, self.device))
            return {"if_absent": if_absent, "accumulate": accumulate}

        route = self._route("store", keys, ("if_absent", "accumulate"), plan)
        arrived, rows = route.arrived(checked, self.columns, self.group)
        status = together(
            NAME, lambda: self.local.store(arrived, rows, if_absent=if_absent, accumulate=accumulate), self.device, self.group
        )
        return route.answers({"status": status}, STATUS, self.group)["status"]

    def retrieve(self, keys: Any, *, default: Any = None, columns: Any = None) -> tuple[Any, torch.Tensor]:
        """As `KeyValueStore.retrieve`, of this rank's "n" keys; `columns` must be the same on all ranks. Without gradients."""
        names: list[str] = []
        defaults: dict[str, torch.Tensor] = {}

        def plan(count: int) -> dict[str, float]:
            names.extend(as_names(NAME, columns, self.columns))
            defaults.update({name: as_default(NAME, name, self.columns[name], default, self.device) for name in names})
            return {"columns": zlib.crc32(repr([name for name in self.columns if name in names]).encode())}

        route = self._route("retrieve", keys, ("columns",), plan)
        arrived, _ = route.arrived({}, {}, self.group)
        wanted = {name: column for name, column in self.columns.items() if name in names}
        values, found = together(NAME, lambda: self.local.retrieve(arrived, columns=list(wanted)), self.device, self.group)
        values = values if isinstance(values, dict) else dict.fromkeys(wanted, values)
        answers = route.answers({**values, "found": found}, {**wanted, **FOUND}, self.group)
        found = answers.pop("found")
        for name in names if default is not None else ():
            there = found.view(-1, *[1] * len(wanted[name][0]))
            answers[name] = torch.where(there, answers[name], defaults[name])
        return (answers["value"] if list(self.columns) == ["value"] and names else {name: answers[name] for name in names}), found

    def erase(self, keys: Any) -> torch.Tensor:
        """Takes this rank's "n" keys out, wherever they lie; bool "n": which were there (of equal keys the first one, ranks in order)."""
        return self._asked("erase", keys)

    def contains(self, keys: Any) -> torch.Tensor:
        """Whether this rank's "n" keys are there: bool "n"."""
        return self._asked("contains", keys)

    def _asked(self, op: str, keys: Any) -> torch.Tensor:
        route = self._route(op, keys, (), lambda count: {})
        arrived, _ = route.arrived({}, {}, self.group)
        found = together(NAME, lambda: getattr(self.local, op)(arrived), self.device, self.group)
        return route.answers({"found": found}, FOUND, self.group)["found"]

    def _route(self, op: str, keys: Any, equal: tuple[str, ...], plan: Any) -> Route:
        """The way of this rank's keys, once all ranks agree to make the same call with good arguments."""
        found: list[Route] = []
        told = tuple(f"{what} {rank}" for what in ("rows", "bytes") for rank in range(self.size))
        codes = {name: code for code, name in enumerate(("store", "retrieve", "erase", "contains"))}

        def whole() -> dict[str, float]:
            batch = as_batch(NAME, self.key_type, keys)
            agreed = plan(len(batch))
            route = Route(batch, self.size, self.device)
            found.append(route)
            return {"call": codes[op], **agreed, **dict(zip(told, map(float, (*route.rows, *route.bytes))))}

        plans = agree(NAME, "keys", ("call", *equal), told, whole, self.device, self.group)
        found[0].expect([int(p[f"rows {self.rank}"]) for p in plans], [int(p[f"bytes {self.rank}"]) for p in plans])
        return found[0]

    def __len__(self) -> int:
        """Keys on all ranks; a call of all ranks, as every other."""
        plans = agree(NAME, "store", (), ("keys",), lambda: {"keys": len(self.local)}, self.device, self.group)
        return int(sum(p["keys"] for p in plans))

    def items(self) -> Iterator[tuple[Any, Any]]:
        """Batches of the keys that this rank owns, with their values: all ranks' together are everything. Of this rank alone."""
        return self.local.items()

    def commit(self) -> None:
        """Makes what was stored and erased durable on every rank; when it returns on one, it has happened on all."""
        together(NAME, self.local.commit, self.device, self.group)

    def close(self) -> None:
        """Closes this rank's shard; what was not committed is lost. Of this rank alone."""
        self.local.close()

    def __enter__(self) -> ShardedStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ShardedStore(rank {self.rank} of {self.size}: {self.local!r})"


def _as_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        fail(NAME, "path", "a path", type(path).__name__, TypeError)
    return Path(path)

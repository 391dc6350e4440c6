"""KeyValueStore: store(k, v) and retrieve(k), exact."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from memkernels._checks import check_choice, check_flag, fail
from memkernels._freed import wipe_freed
from memkernels.store import exchange
from memkernels.store.arguments import as_device, as_folder
from memkernels.store.columns import ONE, as_columns, as_default, as_names, as_values
from memkernels.store.errors import StoreError, StoreFormatError
from memkernels.store.inmemory import InMemory
from memkernels.store.interrupts import uninterrupted
from memkernels.store.keys import KEY_TYPES, KeyBatch, as_batch
from memkernels.store.modes import own_modes
from memkernels.store.use import POLICIES, Evicted

_stores: weakref.WeakSet[KeyValueStore] = weakref.WeakSet()
ON_FULL = ("grow", "error", *POLICIES)
MOST_KEYS = 1 << 40


class KeyValueStore:
    """A map from keys to tensors, exact: what was stored under a key is what it gives back, and an absent key is reported as absent.

    Keys are int64 (the full range), bytes or str; values have one shape and dtype, or several named columns of their own. Batches in,
    batches out. In a batch with equal keys the last one wins, on every run and backend.

    Args:
        value_shape: shape of one value; () is a number. dtype: of the values.
        key_type: "int64", "bytes" or "str" (compared as UTF-8; a hash only says where to look, the key itself is always compared).
        columns: {name: (shape, dtype)} in place of `value_shape` and `dtype`, which are short for one column named "value".
        path: a directory to keep the store in (created); None: memory alone.
        capacity: the most keys; None: as many as memory holds. on_full: what a store with a capacity does when it is full: "error"
            refuses the batch and stays as it was; "lru" and "lfu" take out the keys used longest ago or least often (uses are `store`,
            `retrieve` and `get`), none that the same batch names; "grow" goes beyond the capacity, which then is only the room made at the
            start. With a path uses count while it is open to write; a store that is opened again begins with one use of each key, in the
            order written. A batch of more different keys than the capacity goes in slices, one call after the other.
        device: where values and the table of int64 keys live. durability: of commits to a path: "none", "async" or "commit".

    Growth: no call waits for the whole table. A call that finds the table 85% full begins one 1.5 times as large; it and those after it
    move twice as many buckets as they bring keys, at least 256. Values lie in chunks of 64 MB which are never copied.

    Raises:
        TypeError, ValueError: an argument is not as it should be; the store stays as it was.

    Example:
        >>> import memkernels as mk
        >>> from memkernels.store import text_of, text_rows
        >>> s = mk.KeyValueStore(16, dtype=torch.uint8, key_type="str")
        >>> s.store(["apple", "carrot"], text_rows(["A fruit", "A vegetable"], 16))
        tensor([0, 0], dtype=torch.int8)
        >>> values, found = s.retrieve(["apple", "pear"])
        >>> text_of(values), found
        (['A fruit', ''], tensor([ True, False]))
        >>> "apple" in s, s.get("pear"), len(s)
        (True, None, 2)
    """

    def __init__(
        self,
        value_shape: Any = (),
        dtype: torch.dtype = torch.float32,
        *,
        key_type: str = "int64",
        columns: Any = None,
        path: Any = None,
        capacity: int | None = None,
        on_full: str = "grow",
        device: Any = "cpu",
        durability: str = "commit",
    ):
        op = "KeyValueStore"
        check_choice(op, "key_type", key_type, KEY_TYPES)
        check_choice(op, "on_full", on_full, ON_FULL)
        check_choice(op, "durability", durability, ("none", "async", "commit"))
        if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or not 0 < capacity <= MOST_KEYS):
            fail(op, "capacity", f"a number of keys from 1 to {MOST_KEYS}, or None", repr(capacity))
        if capacity is None and on_full != "grow":
            fail(op, "capacity", f"a number of keys with on_full={on_full!r}", "None")
        self._columns = as_columns(op, value_shape, dtype, columns)
        self._key_type, self._device = key_type, as_device(op, device)
        self._begin()
        self._path = None if path is None else as_folder(op, path)
        self._extra: dict[str, Any] = {"capacity": capacity, "on_full": on_full}
        if self._path is None:
            with own_modes():
                self._data: Any = InMemory(key_type, self._columns, self._device, capacity, on_full)
            return
        if self._device.type != "cpu":
            fail(op, "device", "'cpu' with a path", repr(device))
        with own_modes():
            self._data = self._logged(self._path, durability)

    def _begin(self) -> None:
        self._lock, self._closed = threading.RLock(), False
        self._changes = self._writers = 0  # calls that change what is stored: all of them, and those under way
        self._torn = False  # a copy, by a fork, of a store that was being changed
        self._parameters: Any = None
        _stores.add(self)

    def _logged(self, path: Path, durability: str) -> Any:
        """The store of this path, created or opened to write."""
        from memkernels.store import logged

        if not logged.Log.exists(path):
            return logged.Logged(logged.create(path, self._key_type, self._columns, self._extra, durability), **self._extra)
        log = logged.Log.open(path, "w", durability)
        schema = log.schema
        if schema.key_type != self._key_type or schema.columns != self._columns:
            log.close()
            got = f"one of {schema.key_type} keys and columns {schema.columns} at {str(path)!r}"
            fail("KeyValueStore", "path", f"a store of {self._key_type} keys and columns {self._columns}", got)
        return logged.Logged(log, **self._extra)

    @classmethod
    def open(cls, path: Any, mode: str = "r", *, durability: str = "commit", verify: str = "touch") -> KeyValueStore:
        """The store that lies in a directory, with the key type, columns and capacity it was created with.

        Args:
            path: the directory. mode: "r": what was committed, as of now and of each `refresh`; "w": to write too, by one process at a
                time.
            durability: of commits, as in `KeyValueStore`.
            verify: when the checksum of a block of values (up to 1 MiB) is compared: "touch": when the first of them is read; "open": all
                of them now and at each `refresh`; "never": only by the method `verify`. Keys are always compared when they are read, here.

        Raises:
            StoreError: somebody else writes, or the place is not fit for a store. StoreFormatError: no store, a damaged or a newer one.
        """
        from memkernels.store import logged
        from memkernels.store.touch import VERIFY

        check_choice("KeyValueStore.open", "mode", mode, ("r", "w"))
        check_choice("KeyValueStore.open", "verify", verify, VERIFY)
        folder = as_folder("KeyValueStore.open", path)
        log = logged.Log.open(folder, mode, durability)
        self = cls.__new__(cls)
        self._columns, self._key_type, self._extra = log.schema.columns, log.schema.key_type, dict(log.schema.extra)
        self._device = torch.device("cpu")
        self._begin()
        self._path = folder
        try:
            capacity, on_full = self._extra.get("capacity"), self._extra.get("on_full", "grow")
            if on_full not in ON_FULL or type(capacity) not in (int, type(None)) or (capacity or 1) < 1:
                raise StoreFormatError(f"store: {path} is damaged: capacity {capacity!r} with on_full {on_full!r}")
            with own_modes():
                self._data = logged.Logged(log, capacity, on_full, verify)
        except BaseException:
            log.close()
            raise
        return self

    # --- one batch

    def store(
        self, keys: Any, values: Any, *, if_absent: bool = False, accumulate: bool = False, return_evicted: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, Evicted | None]:
        """Put values under keys; one element after the other, so of equal keys the last one wins.

        Args:
            keys: "n": a tensor or sequence of ints, or a sequence of bytes or str.
            values: "n ...", a tensor of the store's dtype; with several columns a dict of them.
            if_absent: leave keys that are there as they are. accumulate: add to the value that is there (an absent key begins at zero);
                in the order of the batch, floats of 16 and 8 bits in float32 within a batch.
            return_evicted: also return what had to go, `Evicted(keys, values)` or None: keys and values as `items` gives them.

        Returns:
            status: "n", int8: 0 the key is new, 1 its value was replaced, 2 it was there and was kept, 3 it was there and was added to.

        Raises:
            TypeError, ValueError: keys or values are not as they should be, or the store is full and refuses; it stays as it was.
        """
        op = "store"
        check_flag(op, "if_absent", if_absent)
        check_flag(op, "accumulate", accumulate)
        if if_absent and accumulate:
            fail(op, "accumulate", "False with if_absent", "True")
        with self._opened(op, True):
            batch = as_batch(op, self._key_type, keys)
            given = as_values(op, self._columns, values, len(batch), self._device)
            if accumulate:
                for name, (_, dtype) in self._columns.items():
                    if dtype == torch.bool:
                        fail(op, "accumulate", "columns of numbers", f"bool in column {name!r}", TypeError)
            with uninterrupted():
                status, evicted = self._data.put(batch, given, if_absent, accumulate)
        if not return_evicted:
            return status
        return status, (None if evicted is None else Evicted(*self._shown(evicted.keys, evicted.values)))

    def retrieve(self, keys: Any, *, default: Any = None, columns: Any = None) -> tuple[Any, torch.Tensor]:
        """The values of keys.

        Args:
            keys: "n", as for `store`.
            default: what an absent key gives: a number or a tensor of the value's shape, or a dict of them for some columns; zeros if None.
            columns: names of the columns wanted, of a store with several; None: all.

        Returns:
            (values, found): "n ..." (a dict of them for a store of several columns), and bool "n": whether the key is there.

        Gradients:
            To the stored values after `as_parameter`; otherwise none.
        """
        return self._values("retrieve", keys, default, columns)

    def _values(self, op: str, keys: Any, default: Any = None, columns: Any = None) -> tuple[Any, torch.Tensor]:
        with self._opened(op):
            wanted = as_names(op, columns, self._columns)
            defaults = {name: as_default(op, name, self._columns[name], default, self._device) for name in wanted}
            rows = self._data.rows(as_batch(op, self._key_type, keys), True)
            values = {name: self._read(name, rows, defaults[name]) for name in wanted}
            return (values[ONE] if list(self._columns) == [ONE] and wanted else values), rows >= 0

    def _read(self, name: str, rows: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
        if self._parameters is None or name not in self._parameters or not torch.is_grad_enabled():
            return self._data.read(name, rows, default)
        bank, there = self._parameters[name], (rows >= 0).view(-1, *[1] * len(self._columns[name][0]))
        if not bank.shape[0]:
            return default.expand(rows.shape[0], *self._columns[name][0]).clone()
        return torch.where(there, bank.index_select(0, rows.clamp(min=0)), default)

    def erase(self, keys: Any) -> torch.Tensor:
        """Take keys out; bool "n": whether the key was there (of equal keys, for the first one).

        `compact(erase=True)` removes every trace.
        """
        with self._opened("erase", True):
            batch = as_batch("erase", self._key_type, keys)
            with uninterrupted():
                return self._data.erase(batch)

    def contains(self, keys: Any) -> torch.Tensor:
        """Whether keys are there: bool "n". Does not count as a use."""
        with self._opened("contains"):
            return self._data.rows(as_batch("contains", self._key_type, keys), False) >= 0

    # --- one key

    def get(self, key: Any) -> Any:
        """The value of one key (a dict with several columns), or None.

        Example:
            >>> import memkernels as mk
            >>> s = mk.KeyValueStore(2)
            >>> _ = s.store([7], torch.tensor([[1.0, 2.0]]))
            >>> s.get(7), s.get(8)
            (tensor([1., 2.]), None)
        """
        values, found = self._values("get", [key])
        if not bool(found[0]):
            return None
        return {name: value[0] for name, value in values.items()} if isinstance(values, dict) else values[0]

    def __contains__(self, key: Any) -> bool:
        return bool(self.contains([key])[0])

    def __len__(self) -> int:
        with self._opened("len"):
            return len(self._data)

    # --- all keys

    def items(self) -> Iterator[tuple[Any, Any]]:
        """Batches (keys, values) of everything stored, in no order that means anything; nothing may be stored or erased meanwhile.

        Keys come as a tensor of int64 or a list of bytes or str; values as `retrieve` gives them.
        """
        for batch, values in self._batches("items"):
            yield self._shown(batch, values)

    def _shown(self, batch: KeyBatch, values: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        return batch.ints if batch.ints is not None else batch.tolist(), (values[ONE] if list(self._columns) == [ONE] else values)

    def _batches(self, op: str) -> Iterator[tuple[KeyBatch, dict[str, torch.Tensor]]]:
        zero = {name: as_default(op, name, column, None, self._device) for name, column in self._columns.items()}
        with self._opened(op):
            batches, changes = self._data.items(), self._changes
        while True:  # the lock is not held over a yield: other threads may read meanwhile
            with self._opened(op):
                if changes != self._changes:
                    raise RuntimeError(f"{op}: expected a store that stays as it is during iteration, got one that was changed")
                batch, rows = next(batches, (None, None))
                if batch is None:
                    return
                values = {name: self._data.read(name, rows, zero[name]) for name in self._columns}
            yield batch, values

    @property
    def nbytes(self) -> int:
        """Bytes of memory for keys, rows and values."""
        with self._lock:  # the tables change hands in a growth
            return self._data.nbytes

    @property
    def columns(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """{name: (shape, dtype)}."""
        return dict(self._columns)

    @property
    def path(self) -> Path | None:
        """The directory, or None for a store in memory."""
        return self._path

    @property
    def key_type(self) -> str:
        return self._key_type

    def compact(self, erase: bool = False) -> None:
        """Give back what erased and overwritten rows hold.

        Args:
            erase: also leave no trace: the bytes of erased and overwritten keys and values are overwritten with zeros, in memory and on
                disk. Tensors that were given out, and keys as Python's own objects, are the caller's.
        """
        check_flag("compact", "erase", erase)
        with self._opened("compact", True):
            self._data.compact(erase)
            if erase:
                wipe_freed()

    def as_parameter(self, capacity: int | None = None) -> Any:
        """The stored values as an `nn.Parameter` "rows ..." (a ParameterDict with several columns), in which `retrieve` is differentiable.

        The values move into one tensor of a fixed number of rows: those in use, or `capacity`. Keys may still be stored, erased and
        replaced as long as they fit; what an optimizer changes is what `retrieve` gives. Only floating columns take part.

        Example:
            >>> import memkernels as mk
            >>> s = mk.KeyValueStore(2)
            >>> _ = s.store([7, 8], torch.ones(2, 2))
            >>> bank = s.as_parameter()
            >>> s.retrieve([8, 9])[0].sum().backward()
            >>> bank.grad.sum()
            tensor(2.)
        """
        with self._opened("as_parameter", True):
            if self._path is not None:
                fail("as_parameter", "store", "a store in memory", f"one with path {self._path!r}")
            end = self._data.pool.numbers.end
            if capacity is not None and (isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < end):
                fail("as_parameter", "capacity", f"at least the {end} rows in use", repr(capacity))
            floating = [name for name, (_, dtype) in self._columns.items() if dtype.is_floating_point or dtype.is_complex]
            if not floating:
                fail("as_parameter", "store", "a column of a floating dtype", "none", TypeError)
            if self._parameters is None or capacity not in (None, self._data.pool.rows):
                self._data.pool.as_one(capacity or max(end, 1))
                self._parameters = torch.nn.ParameterDict()
                for name in floating:
                    self._parameters[name] = torch.nn.Parameter(self._data.pool.chunks[name][0])
            return self._parameters[ONE] if list(self._columns) == [ONE] else self._parameters

    # --- in and out

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything stored, as tensors: "keys" (bytes and str: "key_data" and "key_offsets") and "column.NAME" for each column."""
        with own_modes():
            return exchange.to_tensors(self)

    def load_state_dict(self, state: Any) -> None:
        """Replace what is stored by a `state_dict`, of a store of the same key type and columns; errors leave the store as it was."""
        with own_modes():
            exchange.from_tensors(self, "load_state_dict", state)

    def export_safetensors(self, path: Any) -> None:
        """Write `state_dict` to one safetensors file: beside it first, then renamed, so an interrupted export leaves what was there."""
        with own_modes():
            exchange.export_file(self, as_folder("export_safetensors", path))

    def import_safetensors(self, path: Any) -> None:
        """Store what `export_safetensors` wrote, over what is there."""
        with own_modes():
            exchange.import_file(self, as_folder("import_safetensors", path))

    # --- life

    def commit(self) -> int:
        """Make what was stored and erased since the last commit durable (as `durability` says) and visible to others.

        Returns: the number of the commit; 0 in memory.
        """
        with self._opened("commit"):
            return self._data.commit() if self._path is not None else 0

    def rollback(self) -> None:
        """Back to the last commit: what was stored and erased since is undone. Only a store with a path has commits to go back to."""
        with self._opened("rollback", True):
            self._need_path("rollback")
            with uninterrupted():
                self._data.rollback()

    def refresh(self) -> bool:
        """Take in what another process has committed since this store was opened or last refreshed; whether there was anything."""
        with self._opened("refresh", True):
            self._need_path("refresh")
            return self._data.refresh()

    def verify(self) -> Any:
        """Compare every checksum on disk; a report."""
        with self._opened("verify"):
            self._need_path("verify")
            return self._data.log.verify()

    def snapshot(self, path: Any) -> None:
        """A copy in a new directory, to be opened on its own: of the last commit, or of all that a store in memory holds."""
        with self._opened("snapshot"):
            folder = as_folder("snapshot", path)
            if self._path is not None:
                self._data.snapshot(folder)
                return
            from memkernels.store import logged

            logged.write_snapshot(folder, self._key_type, self._columns, self._extra, self._batches("snapshot"))

    def _need_path(self, op: str) -> None:
        if self._path is None:
            fail(op, "store", "a store with a path", "one in memory")

    def close(self) -> None:
        """Give up the memory and let the next writer in; what a store with a path did not commit is lost. May be called again."""
        with self._lock:
            if not self._closed:
                self._closed = True
                with own_modes():
                    self._data.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def __enter__(self) -> KeyValueStore:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return "KeyValueStore(closed)"
        shapes = ", ".join(f"{name}: {tuple(shape)} {str(dtype).removeprefix('torch.')}" for name, (shape, dtype) in self._columns.items())
        return f"KeyValueStore({len(self)} {self._key_type} keys, {shapes})"

    @contextmanager
    def _opened(self, op: str, changing: bool = False) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise ValueError(f"{op}: store: expected an open store, got a closed one")
            if self._torn:
                raise StoreError(f"{op}: store: another thread was writing to it when this process was forked: open it anew")
            self._changes += changing
            self._writers += changing
            try:
                with own_modes():
                    yield
            finally:
                self._writers -= changing

    def _after_fork(self) -> None:
        """In the child, which has none of the other threads that may have held the lock."""
        if not self._lock.acquire(blocking=False):
            self._lock, self._torn = threading.RLock(), self._writers > 0
        else:
            self._lock.release()

    def __reduce__(self) -> Any:
        raise TypeError("KeyValueStore: cannot be pickled or copied: use state_dict, snapshot, or the path in the other process")


def _after_fork() -> None:
    for store in list(_stores):
        store._after_fork()


os.register_at_fork(after_in_child=_after_fork)

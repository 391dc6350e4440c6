"""The speeds promised for the key-value store in memory (read by targets.py): against a Python dict, against torch, and as plain
figures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import memkernels as mk
from memkernels.ops import store_erase_, store_find, store_upsert_
from memkernels.store.buffers import fresh

TABLE, BATCH, WIDTH, UPSERTS, TEXTS = 10_000_000, 65536, 64, 1_000_000, 1_000_000
BATCHES = 64  # their values are 1 GB: no cache holds them until they come again
LOAD = 0.75
AT_MOST = ("bytes an entry",)
Figures = dict[str, tuple[float, float | None]]  # bar: what was measured, and the peer's time in ms where there is one


@dataclass(frozen=True)
class StoreTarget:
    """One case of the store: `run(seconds)` gives its time in ms and a figure for every bar."""

    name: str
    bars: Mapping[str, float]
    run: Callable[[float], tuple[float, Figures]]

    def measure(self, seconds: float) -> list[dict[str, Any]]:
        ms, figures = self.run(seconds)
        row = dict(op="KeyValueStore", size=self.name, dtype="", mode="", threads=torch.get_num_threads(), ms=ms, device="cpu")
        row |= dict(backend="store", level=mk.cpu_level(), gb_s=None, floor=None, checked="exact", note="")
        found = []
        for bar, needed in self.bars.items():
            measured, peer_ms = figures[bar]
            least = bar in AT_MOST
            verdict = dict(needed=needed, at_most=least, measured=measured, reached=measured <= needed if least else measured >= needed)
            compared = dict(target=self.name, bar=bar, peer=bar, peer_ms=peer_ms, ratio=measured if peer_ms is not None else None)
            found.append({**row, **compared, **verdict})
        return found


def interleaved(functions: Mapping[str, Callable[[int], Any]], seconds: float, settle: bool = False) -> dict[str, float]:
    """Median seconds of one call of each, taken in turns; call i gets i. With `settle` each is called once untimed before."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end, turn = time.perf_counter() + seconds, 0
    while turn < 4 or time.perf_counter() < end:
        for name, function in functions.items():
            if settle:
                function(turn + 1)
            start = time.perf_counter()
            function(turn)
            if turn:
                times[name].append(time.perf_counter() - start)
        turn += 1
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def random_keys(seed: int, count: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


@cache
def table() -> tuple[torch.Tensor, torch.Tensor]:
    """10M keys in a table at load 0.75, and the keys in the order of their rows."""
    keys = random_keys(0, TABLE)
    words = fresh((int(TABLE / 5 / LOAD), 8), torch.int64, torch.device("cpu")).zero_()
    store_upsert_(words, keys, torch.arange(TABLE))
    return words, keys


@cache
def queries(kind: str) -> list[torch.Tensor]:
    """Batches: keys of the table, each as likely or by Zipf's law, or keys that are not there."""
    keys, source = table()[1], torch.Generator().manual_seed(1)
    if kind == "misses":
        return [random_keys(2 + i, BATCH) for i in range(BATCHES)]
    if kind == "hits":
        return [keys[torch.randint(0, TABLE, (BATCH,), generator=source)] for _ in range(BATCHES)]
    weights = torch.arange(1, TABLE + 1, dtype=torch.float64) ** -1.05
    sums = weights.cumsum(0) / weights.sum()
    draws = (torch.rand(BATCH, dtype=torch.float64, generator=source) for _ in range(BATCHES))
    return [keys[torch.searchsorted(sums, draw).clamp(max=TABLE - 1)] for draw in draws]


@cache
def as_dict() -> dict[int, int]:
    return dict(zip(table()[1].tolist(), range(TABLE)))


@cache
def sorted_keys() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.sort(table()[1])


def by_dict(keys: torch.Tensor) -> list[int]:
    known = as_dict()
    return [known.get(key, -1) for key in keys.tolist()]


def by_searchsorted(keys: torch.Tensor) -> torch.Tensor:
    ordered, rows = sorted_keys()
    place = torch.searchsorted(ordered, keys).clamp_(max=TABLE - 1)
    return torch.where(ordered.index_select(0, place) == keys, rows.index_select(0, place), -1)


def find(kind: str, seconds: float) -> tuple[float, Figures]:
    words, batches = table()[0], queries(kind)
    expected = by_searchsorted(batches[0])
    assert torch.equal(store_find(words, batches[0]), expected) and by_dict(batches[0]) == expected.tolist()
    functions = {
        "store": lambda i: store_find(words, batches[i % BATCHES]),
        "dict": lambda i: by_dict(batches[i % BATCHES]),
        "searchsorted": lambda i: by_searchsorted(batches[i % BATCHES]),
    }
    t = interleaved(functions, seconds)
    figures = {name: (t[name] / t["store"], t[name] * 1e3) for name in ("dict", "searchsorted")}
    return t["store"] * 1e3, {"million keys a second": (BATCH / t["store"] / 1e6, None), **figures}


@cache
def worn() -> tuple[torch.Tensor, torch.Tensor]:
    """The table when all of its keys have been replaced three times, a batch after the other, and the keys that came last."""
    words, keys = fresh(table()[0].shape, torch.int64, torch.device("cpu")).copy_(table()[0]), table()[1].clone()
    for turn in range(3):
        for begin in range(0, TABLE, BATCH):
            some = keys[begin : begin + BATCH]
            rows = store_erase_(words, some)
            some.copy_(random_keys(1000 * (turn + 1) + begin // BATCH, some.shape[0]))
            store_upsert_(words, some, rows)
    return words, keys


def find_worn(kind: str, seconds: float) -> tuple[float, Figures]:
    words, keys = worn()
    draw = torch.Generator().manual_seed(1)
    batches = queries(kind) if kind == "misses" else [keys[torch.randint(0, TABLE, (BATCH,), generator=draw)] for _ in range(BATCHES)]
    assert bool(((store_find(words, batches[0]) < 0) == (kind == "misses")).all())
    t = interleaved({"store": lambda i: store_find(words, batches[i % BATCHES])}, seconds)["store"]
    return t * 1e3, {"million keys a second": (BATCH / t / 1e6, None)}


@cache
def filled() -> mk.KeyValueStore:
    """The same 10M keys with 64 float32 each."""
    store, keys = mk.KeyValueStore(WIDTH), table()[1]
    store._data.index.table = fresh(table()[0].shape, torch.int64, torch.device("cpu")).copy_(table()[0])  # in huge pages, as its own are
    store._data.index.count = TABLE
    store._data.pool.numbers.use(TABLE)
    store._data.pool.reserve(TABLE)
    for chunk in store._data.pool.chunks["value"]:
        chunk.uniform_()
    assert bool(store.contains(keys[:1000]).all())
    return store


def retrieve(kind: str, seconds: float) -> tuple[float, Figures]:
    """The bytes that must move: the key, the cache line of its bucket, and the value read and written.

    A turn moves as many bytes by the store as by the copy, and each of them settles for a turn before it is timed: a copy leaves a third
    level of 260 MB full of lines that are still to be written, which the batches after it would pay for (2.9 ms the first of them, 2.2 the
    ninth, 2.0 the twenty-fourth, and so on from there; the copy takes as long either way).
    """
    store, batches = filled(), queries(kind)
    source, target = torch.rand(UPSERTS, WIDTH), torch.empty(UPSERTS, WIDTH)
    values, found = store.retrieve(batches[0])
    rows = by_searchsorted(batches[0])
    bank = store._data.pool.chunks["value"]
    chunk = bank[0].shape[0]
    assert torch.equal(found, rows >= 0) and torch.equal(values[:9], torch.stack([bank[r // chunk][r % chunk] for r in rows[:9].tolist()]))
    moved, copied = BATCH * (8 + 64 + 2 * 4 * WIDTH), 2 * source.nbytes
    turn = copied // moved

    def some(i: int) -> None:
        for k in range(i * turn, (i + 1) * turn):
            store.retrieve(batches[k % BATCHES])

    t = interleaved({"store": some, "copy": lambda i: target.copy_(source)}, seconds, settle=True)
    each = t["store"] / turn
    ratio = (moved / each) / (copied / t["copy"])
    return each * 1e3, {"copy bandwidth": (ratio, None), "million keys a second": (BATCH / each / 1e6, None)}


def upsert(batch: int, capacity: int | None, seconds: float) -> tuple[float, Figures]:
    """New stores of 1M keys, `batch` at a time, with or without room made at the start; the memory of the index when all is stored.

    The first stores are not timed. They touch memory that a virtual machine's host has yet to find for it: of 1M keys by 65,536 the
    first took 260 ms, 200 of them in the kernel, the tenth 107 and 40.
    """
    keys, values, store = random_keys(3, UPSERTS), torch.rand(UPSERTS, WIDTH), None

    def run(_):
        nonlocal store
        store = mk.KeyValueStore(WIDTH, capacity=capacity)
        for i in range(0, UPSERTS, batch):
            store.store(keys[i : i + batch], values[i : i + batch])

    for _ in range(8):
        run(0)
    t = interleaved({"store": run}, seconds)["store"]
    assert store is not None and len(store) == UPSERTS and torch.equal(store.retrieve(keys[:99])[0], values[:99])
    if store._data.index.old is not None:  # the end of a growth, which the next calls would bring
        store._data.index._move(store._data.index.old.shape[0])
    return t * 1e3, {"million keys a second": (UPSERTS / t / 1e6, None), "bytes an entry": (store._data.index.nbytes / UPSERTS, None)}


def find_text(seconds: float) -> tuple[float, Figures]:
    """str keys of 8 to 24 characters, as a Python list of other objects than those stored."""
    source = torch.Generator().manual_seed(4)
    lengths = torch.randint(8, 25, (TEXTS,), generator=source).tolist()
    letters = bytes(torch.randint(97, 123, (24 * TEXTS,), dtype=torch.uint8, generator=source).tolist()).decode()
    texts = [letters[24 * i : 24 * i + n] for i, n in enumerate(lengths)]
    store = mk.KeyValueStore((), torch.int64, key_type="str")
    store.store(texts, torch.arange(TEXTS))
    known = dict(zip(texts, range(TEXTS)))
    batches = [
        ["".join([texts[k][:1], texts[k][1:]]) for k in torch.randint(0, TEXTS, (BATCH,), generator=source).tolist()] for _ in range(8)
    ]
    assert bool(store.contains(batches[0]).all())
    functions = {"store": lambda i: store.contains(batches[i % 8]), "dict": lambda i: [known.get(key, -1) for key in batches[i % 8]]}
    t = interleaved(functions, seconds)
    return t["store"] * 1e3, {
        "million keys a second": (BATCH / t["store"] / 1e6, None),
        "dict": (t["dict"] / t["store"], t["dict"] * 1e3),
    }


def store_targets() -> Iterator[StoreTarget]:
    """Every row of issue 6 that is about memory, and searches in a table that has been in use for long."""
    speed, peers = {"million keys a second": 30}, {"dict": 20, "searchsorted": 5}
    for kind in ("hits", "misses", "Zipf 1.05"):
        yield StoreTarget(f"store find 10M int64 {kind}", {**speed, **peers}, lambda seconds, kind=kind: find(kind, seconds))
    for kind in ("hits", "misses"):
        name = f"store find 10M int64 {kind}, all keys replaced 3 times"
        yield StoreTarget(name, speed, lambda seconds, kind=kind: find_worn(kind, seconds))
    for kind in ("hits", "Zipf 1.05"):
        name = f"store retrieve 10M x 64 float32 {kind}"
        yield StoreTarget(name, {"copy bandwidth": 0.7}, lambda seconds, kind=kind: retrieve(kind, seconds))
    bars = {"million keys a second": 8, "bytes an entry": 24}
    for name, batch, capacity in (("at once", UPSERTS, None), ("by 65,536", BATCH, None), ("by 65,536, sized", BATCH, UPSERTS)):
        run = lambda seconds, batch=batch, capacity=capacity: upsert(batch, capacity, seconds)  # noqa: E731
        yield StoreTarget(f"store upsert 1M x 64 float32 {name}", bars, run)
    yield StoreTarget("store find 1M str of 16", {"million keys a second": 8}, find_text)

"""Ctrl-C at every call that a change makes: each change is whole or not there, and so is what the next commit says."""

import signal
import sys

import pytest
import torch

import memkernels as mk
from memkernels.store import StoreError
from memkernels.store.interrupts import uninterrupted

KEYS = torch.arange(12)
CALLS = {
    "store": lambda s: s.store(KEYS[4:], torch.full((8,), 7)),
    "accumulate": lambda s: s.store(KEYS[4:], torch.full((8,), 7), accumulate=True),
    "erase": lambda s: s.erase(KEYS[:3]),
    "commit": lambda s: s.commit(),
    "rollback": lambda s: s.rollback(),
    "compact": lambda s: s.compact(),
}
CASES = [(name, how) for name in CALLS for how in (None, "commit", "async") if how or name not in ("commit", "rollback")]


def filled(path, policy, durability):
    options = {"capacity": 10, "on_full": policy} if policy != "grow" else {}
    store = mk.KeyValueStore((), torch.int64, path=path, durability=durability or "none", **options)
    store.store(KEYS[:6], KEYS[:6])
    if path is not None:
        store.commit()
        store.store(KEYS[3:8], KEYS[3:8] + 100)
    return store


def held(store):
    return {k: v for keys, values in store.items() for k, v in zip(keys.tolist(), values.tolist(), strict=True)}


def interrupted_at(count, call, store):
    """Whether a SIGINT at this call of or in the store's code came before the end of `call`."""
    left = count

    def watch(frame, event, arg):
        nonlocal left
        if event in ("call", "c_return") and "/store/" in frame.f_code.co_filename.replace("\\", "/"):
            left -= 1
            if not left:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        call(store)
    except KeyboardInterrupt:
        return True
    finally:
        sys.setprofile(before)
    return left <= 0  # it came, and something swallowed it: counted by the caller


@pytest.mark.parametrize("policy", ["grow", "lru"])
@pytest.mark.parametrize(("name", "durability"), CASES)
def test_an_interrupt_anywhere_leaves_a_change_whole(tmp_path, name, policy, durability):
    path = None if durability is None else tmp_path / "s"
    with filled(path, policy, durability) as store:
        before = held(store)
        CALLS[name](store)
        after = held(store)
    step = 1 if path is None else 97 if name == "compact" else 41
    for count in range(1, 4000, step):
        place = None if path is None else tmp_path / f"{count}"
        store = filled(place, policy, durability)
        came = interrupted_at(count, CALLS[name], store)
        try:
            seen = held(store)
            assert seen in (before, after) and len(store) == len(seen)
            assert bool((store.retrieve(KEYS)[1] == torch.tensor([k in seen for k in KEYS.tolist()])).all())
            if place is not None:
                store.commit()
        except StoreError as error:  # a commit or compact cut short says so, and the store is opened again
            assert name in ("commit", "compact") and ("writing failed" in str(error) or "on its way" in str(error)), error
            seen = None
        try:
            store.close()
        except StoreError:
            assert seen is None
        if place is not None:
            with mk.KeyValueStore.open(place, verify="open") as again:
                assert held(again) in ([seen] if seen is not None else [before, after, {k: k for k in range(6)}])
        if not came:
            break
    else:
        raise AssertionError("the call did not end")


def test_a_handler_of_the_caller_runs_once_behind_the_change():
    came = []
    before = signal.signal(signal.SIGINT, lambda *what: came.append(len(came)))
    try:
        with uninterrupted(), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert came == []
        assert came == [0]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_is_not_of_python_stays():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("writes", [False, True])
def test_an_index_that_was_not_taken_in_whole_is_not_read(tmp_path, monkeypatch, writes):
    """A `refresh` or `compact` that fails on its way has some of the keys: none of them may count as all."""
    writer = filled(tmp_path / "s", "grow", "commit")
    reader = mk.KeyValueStore.open(tmp_path / "s")
    writer.commit()
    store = writer if writes else reader
    with monkeypatch.context() as patch:
        patch.setattr(store._data.index, "upsert", lambda *args: (_ for _ in ()).throw(MemoryError("none")))
        with pytest.raises(MemoryError):
            store.compact() if writes else store.refresh()
    for read in (len, lambda s: s.contains(KEYS), lambda s: s.retrieve(KEYS), held):
        with pytest.raises(StoreError, match="failed on its way"):
            read(store)
    if writes:
        with pytest.raises(StoreError, match="close the store and open it again"):
            writer.store(KEYS, KEYS, accumulate=True)
    else:
        assert reader.refresh() and len(reader) == 8
    reader.close()
    with pytest.raises(StoreError) if writes else monkeypatch.context():
        writer.close()
        writer._data.log._check_failed()
    with mk.KeyValueStore.open(tmp_path / "s") as again:
        assert len(again) == 8

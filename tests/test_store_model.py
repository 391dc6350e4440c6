"""The key-value store against a dict: random steps, every key type, every backend."""

import gc
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

import memkernels as mk
from memkernels.store.keys import as_batch

INTS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 7, 8, 9]) | st.integers(-(2**63), 2**63 - 1) | st.integers(0, 60)
TEXTS = st.sampled_from(["", "a", "ä", "apple", "A fruit", "\0", "x" * 40]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
KEYS = {"int64": INTS, "str": TEXTS, "bytes": st.binary(max_size=9)}
FEW = {"int64": st.integers(0, 30), "str": st.sampled_from("abcdefgh"), "bytes": st.sampled_from([b"", b"\0", b"\0\0", b"ab"])}


class Model(RuleBasedStateMachine):
    """What a store does is what a dict does, element after element."""

    @initialize(key_type=st.sampled_from(list(KEYS)), backend=st.sampled_from(["reference", None]))
    def begin(self, key_type, backend):
        self.key_type, self.backend, self.model, self.clock = key_type, backend, {}, 0
        self.store = mk.KeyValueStore((2,), torch.int64, key_type=key_type)

    def draw(self, data, most=12):
        keys = st.lists(KEYS[self.key_type] | FEW[self.key_type], max_size=most)
        return data.draw(keys)

    def values(self, count):
        self.clock += count
        return torch.arange(self.clock - count, self.clock).view(-1, 1).expand(count, 2).contiguous()

    @rule(data=st.data(), mode=st.sampled_from(["replace", "if_absent", "accumulate"]), many=st.booleans())
    def put(self, data, mode, many):
        keys = self.draw(data, 80 if many else 12)
        values, expected = self.values(len(keys)), []
        for key, value in zip(keys, values.tolist()):
            there = self.model.get(key)
            expected.append(0 if there is None else {"replace": 1, "if_absent": 2, "accumulate": 3}[mode])
            if there is None or mode == "replace":
                self.model[key] = value
            elif mode == "accumulate":
                self.model[key] = [a + b for a, b in zip(there, value)]
        with mk.backend(self.backend):
            status = self.store.store(keys, values, **({} if mode == "replace" else {mode: True}))
        assert status.tolist() == expected

    @rule(data=st.data())
    def erase(self, data):
        keys = self.draw(data) + data.draw(st.lists(st.sampled_from(sorted(self.model)), max_size=20) if self.model else st.just([]))
        with mk.backend(self.backend):
            erased = self.store.erase(keys).tolist()
        assert erased == [self.model.pop(key, None) is not None for key in keys]

    @rule(data=st.data())
    def retrieve(self, data):
        keys = self.draw(data)
        with mk.backend(self.backend):
            values, found = self.store.retrieve(keys, default=-5)
        assert found.tolist() == [key in self.model for key in keys]
        assert values.tolist() == [self.model.get(key, [-5, -5]) for key in keys]

    @rule(erase=st.booleans())
    @precondition(lambda self: len(self.model) < 200)
    def compact(self, erase):
        with mk.backend(self.backend):
            self.store.compact(erase=erase)

    @rule()
    def reload(self):
        state = self.store.state_dict()
        with mk.backend(self.backend):
            self.store = mk.KeyValueStore((2,), torch.int64, key_type=self.key_type)
            self.store.load_state_dict(state)

    @rule()
    def everything(self):
        found = {}
        for keys, values in self.store.items():
            found |= zip(keys.tolist() if self.key_type == "int64" else keys, values.tolist())
        assert found == self.model

    @invariant()
    def size(self):
        if hasattr(self, "store"):
            assert len(self.store) == len(self.model)


class LoggedModel(Model):
    """The same with a path: commits, rollbacks, and what a new process would find."""

    @initialize(key_type=st.sampled_from(list(KEYS)), backend=st.sampled_from(["reference", None]))
    def begin(self, key_type, backend):
        self.key_type, self.backend, self.model, self.clock, self.committed = key_type, backend, {}, 0, {}
        self.folder = tempfile.TemporaryDirectory()
        self.path = f"{self.folder.name}/store"
        self.store = self.open_it()

    def open_it(self):
        return mk.KeyValueStore((2,), torch.int64, key_type=self.key_type, path=self.path, durability="none")

    @rule()
    def commit(self):
        self.store.commit()
        self.committed = dict(self.model)

    @rule()
    def rollback(self):
        self.store.rollback()
        self.model = dict(self.committed)

    @rule()
    def reopen(self):
        self.store.close()
        self.model = dict(self.committed)
        with mk.backend(self.backend):
            self.store = self.open_it()

    @rule()
    def read(self):
        with mk.KeyValueStore.open(self.path) as reader:
            found = {}
            for keys, values in reader.items():
                found |= zip(keys.tolist() if self.key_type == "int64" else keys, values.tolist())
        assert found == self.committed

    @rule(erase=st.booleans())
    @precondition(lambda self: len(self.model) < 200)
    def compact(self, erase):
        self.store.compact(erase=erase)
        self.committed = dict(self.model)

    @rule()
    def reload(self):
        self.store.load_state_dict(self.store.state_dict())

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()


def check(model, examples, steps, derandomize=True):
    """The usual run draws the same every time; health checks are left out, as they measure time."""
    gc.collect()
    gc.freeze()  # many collections follow, each of which would go through all that the tests before have left: 26 s instead of 3
    options = dict(max_examples=examples, stateful_step_count=steps, derandomize=derandomize)
    run_state_machine_as_test(model, settings=settings(**options, deadline=None, suppress_health_check=list(HealthCheck)))


def test_store_is_a_dict_on_disk():
    check(LoggedModel, 25, 12)


@pytest.mark.slow
def test_store_is_a_dict_on_disk_long():
    check(LoggedModel, 300, 40, derandomize=False)


def test_store_is_a_dict():
    check(Model, 40, 12)


@pytest.mark.slow
def test_store_is_a_dict_long():
    check(Model, 600, 40, derandomize=False)


def test_key_batches_go_and_come():
    for key_type, keys in (("int64", [3, -1]), ("str", ["ä", "", "b"]), ("bytes", [b"\0", b""])):
        batch = as_batch("op", key_type, keys)
        assert batch.tolist() == keys and len(batch) == len(keys)
        assert batch.select(torch.tensor([1])).tolist() == keys[1:2]

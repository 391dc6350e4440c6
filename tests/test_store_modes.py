"""KeyValueStore where the caller has set inference mode, no gradients, or a device for new tensors."""

from contextlib import nullcontext

import pytest
import torch

import memkernels as mk


def _used(path, rows, zero):
    """What every call of a store gives, with growth on the way."""
    store, names = mk.KeyValueStore(2, key_type="str", path=path), [f"key{i}" for i in range(len(rows))]
    yield store.store(["a", "b"], rows[:2])
    yield store.store(names, rows)
    yield store.get("b")
    yield store.retrieve(["a", "c"], default=2.0)
    yield store.erase(["a", "c"])
    yield store.contains(names[:2])
    yield store.state_dict()
    if path is not None:
        store.commit()
        with mk.KeyValueStore.open(path) as reader:
            yield reader.get("b")
    store.load_state_dict(store.state_dict())
    yield [values for _, values in store.items()]
    store.compact(erase=True)
    yield store.store(["a"], zero, accumulate=True)
    store.close()


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("mode", ["inference", "device", "default device"])
def test_in_the_modes_of_a_caller(tmp_path, mode, on_disk):
    """A store outlives inference mode, and its tensors are on its own device."""
    paths = [tmp_path / "a", tmp_path / "b"] if on_disk else [None, None]
    store, keys, ones, zero = mk.KeyValueStore(2), torch.arange(5000), torch.ones(5000, 2), torch.zeros(1, 2)
    expected = list(_used(paths[0], ones, zero))
    try:
        if mode == "default device":
            torch.set_default_device("meta")
        with {"inference": torch.inference_mode(), "device": torch.device("meta")}.get(mode, nullcontext()):
            got = list(_used(paths[1], ones, zero))
            assert torch.is_inference_mode_enabled() == (mode == "inference")
            store.store(keys, ones)
            read = store.retrieve(keys)[0]
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, expected)
    assert torch.equal(read, ones)
    store.store(keys, 2 * ones)  # outside, where buffers made inside are changed
    store.erase([3])
    weights = store.as_parameter()
    store.retrieve([7, 3])[0].sum().backward()
    assert weights.grad.sum() == 2 and not read.is_inference()


def test_no_gradients_begin_in_inference_mode():
    store = mk.KeyValueStore(2)
    store.store([1], torch.ones(1, 2))
    store.as_parameter()
    with torch.inference_mode():
        assert not store.retrieve([1])[0].requires_grad
    with torch.no_grad():
        assert not store.retrieve([1])[0].requires_grad
    assert store.retrieve([1])[0].requires_grad

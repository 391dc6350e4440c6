"""A store as plain tensors, and as a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memkernels._checks import fail
from memkernels.store.columns import as_values
from memkernels.store.interrupts import uninterrupted
from memkernels.store.keys import MOST_BYTES, KeyBatch, join

if TYPE_CHECKING:
    from memkernels.store.store import KeyValueStore


def to_tensors(store: KeyValueStore) -> dict[str, torch.Tensor]:
    """All keys and columns."""
    parts = list(store._batches("state_dict"))
    columns = {f"column.{name}": [values[name] for _, values in parts] for name in store.columns}
    found = {}
    for name, (shape, dtype) in store.columns.items():
        pieces = columns[f"column.{name}"]
        found[f"column.{name}"] = torch.cat(pieces) if pieces else torch.empty(0, *shape, dtype=dtype)
    if store.key_type == "int64":
        keys = join([batch for batch, _ in parts]).ints if parts else torch.empty(0, dtype=torch.int64)
        return {"keys": keys, **found}  # type: ignore[dict-item]
    if not parts:
        return {"key_data": torch.empty(0, dtype=torch.uint8), "key_offsets": torch.zeros(1, dtype=torch.int64), **found}
    batch = join([batch for batch, _ in parts])
    return {"key_data": batch.data, "key_offsets": batch.offsets, **found}  # type: ignore[dict-item]


def from_tensors(store: KeyValueStore, op: str, state: Any) -> None:
    """The store holds what `to_tensors` gave and nothing else."""
    batch, values = _parts(store, op, state)
    with store._opened(op, True):
        if store._parameters is not None:
            fail(op, "store", "a store whose values are no parameter", "one after as_parameter()")
        with uninterrupted():
            store._data.replace(batch, values)


def _parts(store: KeyValueStore, op: str, state: Any) -> tuple[KeyBatch, dict[str, torch.Tensor]]:
    if not isinstance(state, Mapping):
        fail(op, "state", "a dict of tensors", type(state).__name__, TypeError)
    keys = ["keys"] if store.key_type == "int64" else ["key_data", "key_offsets"]
    wanted = {*keys, *(f"column.{name}" for name in store.columns)}
    if set(state) != wanted:
        fail(op, "state", f"entries {', '.join(sorted(wanted))}", ", ".join(sorted(map(str, state))) or "none")
    dtypes = {"key_data": torch.uint8}
    for name in keys:
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtypes.get(name, torch.int64) or tensor.dim() != 1:
            fail(op, f"state[{name!r}]", f"{str(dtypes.get(name, torch.int64)).removeprefix('torch.')} of one dimension", _about(tensor))
    if store.key_type == "int64":
        batch = KeyBatch("int64", state["keys"].to(store._device))
    else:
        batch = KeyBatch(store.key_type, None, state["key_data"].cpu(), state["key_offsets"].cpu())
        _check_offsets(op, batch)
    values = {name: state[f"column.{name}"] for name in store.columns}
    return batch, as_values(op, store._columns, values, len(batch), store._device)


def _check_offsets(op: str, batch: KeyBatch) -> None:
    """Runs in order that end with the data, and for str keys UTF-8."""
    offsets, data = batch.offsets, batch.data
    assert offsets is not None and data is not None
    lengths = offsets[1:] - offsets[:-1] if offsets.numel() else offsets
    if not offsets.numel() or offsets[0] != 0 or offsets[-1] != data.numel() or bool(((lengths < 0) | (lengths > MOST_BYTES)).any()):
        fail(op, "state['key_offsets']", f"increasing from 0 to {data.numel()}, at most {MOST_BYTES} apart", "others")
    if batch.type == "str":
        try:
            batch.tolist()
        except UnicodeDecodeError as error:
            fail(op, "state['key_data']", "UTF-8", str(error))


def _about(tensor: Any) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__


def export_file(store: KeyValueStore, path: Path) -> None:
    save = _safetensors("export_safetensors").torch.save_file
    state = {name: _in_file(tensor.detach().cpu().contiguous()) for name, tensor in to_tensors(store).items()}
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save(state, str(beside), metadata={"format": "memkernels.KeyValueStore", "version": "1", "key_type": store.key_type})
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _in_file(tensor: torch.Tensor) -> torch.Tensor:
    """The format has no complex128: float64 "... 2" stands for it."""
    return torch.view_as_real(tensor) if tensor.dtype == torch.complex128 else tensor


def import_file(store: KeyValueStore, path: Path) -> None:
    module = _safetensors("import_safetensors")
    try:
        with module.safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
    except OSError:
        raise
    except Exception as error:  # the package's own kind of error, which it does not export everywhere
        raise ValueError(f"import_safetensors: path: expected a safetensors file, got {str(path)!r}: {error}") from error
    if about.get("format") != "memkernels.KeyValueStore" or about.get("version") != "1":
        fail("import_safetensors", "path", "a file of export_safetensors, version 1", f"{str(path)!r} with metadata {about}")
    if about.get("key_type") != store.key_type:
        fail("import_safetensors", "path", f"{store.key_type} keys", f"{about.get('key_type')} keys")
    for name, (shape, dtype) in store.columns.items():
        held = state.get(f"column.{name}")
        if dtype == torch.complex128 and held is not None and held.dtype == torch.float64 and held.shape[1:] == (*shape, 2):
            state[f"column.{name}"] = torch.view_as_complex(held)
    batch, values = _parts(store, "import_safetensors", state)
    store.store(batch, values)


def _safetensors(op: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{op}: needs the package safetensors (pip install safetensors): {error}") from error
    return safetensors

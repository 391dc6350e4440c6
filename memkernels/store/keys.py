"""Batches of keys: int64, bytes or str, checked and taken apart into tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from memkernels._backends import forced_name, kernel
from memkernels._checks import check_dense, fail
from memkernels.store.key_hash import hash_key, owner_hash

KEY_TYPES = ("int64", "bytes", "str")
MOST_BYTES = (1 << 24) - 1  # of one key
_LOW, _HIGH = -(1 << 63), (1 << 63) - 1


@dataclass(frozen=True)
class KeyBatch:
    """Keys of one type. int64: `ints` "n"; bytes and str (as UTF-8): `data`, all bytes one after another, and `offsets` "n+1"."""

    type: str
    ints: torch.Tensor | None = None
    data: torch.Tensor | None = None
    offsets: torch.Tensor | None = None

    def __len__(self) -> int:
        if self.ints is not None:
            return self.ints.shape[0]
        assert self.offsets is not None
        return self.offsets.shape[0] - 1

    def hashed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the table holds in place of the key, 64 bits: the key itself; or of its bytes half of their hash, and then the other
        half."""
        if self.ints is not None:
            return self.ints, None
        known = self.__dict__.get("_hashes")  # a batch is looked up more than once
        if known is None:
            known = self.__dict__["_hashes"] = _hashed(self.data, self.offsets)
        return known

    def owner_hashes(self) -> torch.Tensor:
        """64 bits that say who owns a key of a sharded store: of its format on disk."""
        if self.ints is not None:
            return self.ints
        assert self.data is not None and self.offsets is not None
        fast = kernel("cpp", "store_keys")
        if not isinstance(fast, str) and forced_name() in (None, "cpp"):
            return fast.owner_hashes(self.data, self.offsets)
        return torch.tensor([owner_hash(key) for key in _each(self.data, self.offsets)], dtype=torch.int64)

    def lengths(self) -> torch.Tensor:
        assert self.offsets is not None
        return self.offsets[1:] - self.offsets[:-1]

    def select(self, index: torch.Tensor) -> KeyBatch:
        """The keys at these places (or where a mask is true), in this order."""
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        if self.ints is not None:
            return KeyBatch(self.type, self.ints[index.to(self.ints.device)])
        assert self.data is not None and self.offsets is not None
        index = index.to(self.offsets.device)
        lengths = self.lengths()[index]
        return KeyBatch(self.type, None, gather_runs(self.data, self.offsets[:-1][index], lengths), offsets_of(lengths))

    def tolist(self) -> list[Any]:
        """As Python's int, bytes or str."""
        if self.ints is not None:
            return self.ints.tolist()
        assert self.data is not None and self.offsets is not None
        data, ends = self.data.numpy().tobytes(), self.offsets.tolist()
        found = [data[begin:end] for begin, end in pairwise(ends)]
        return [key.decode() for key in found] if self.type == "str" else found


def offsets_of(lengths: torch.Tensor) -> torch.Tensor:
    """Where runs of these lengths begin, and where the last one ends."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def gather_runs(data: torch.Tensor, begins: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """data[begins[i] : begins[i] + lengths[i]], one after another."""
    return data[runs(begins, lengths)]


def runs(begins: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The numbers begins[i] to begins[i] + lengths[i], one run after another."""
    if begins.shape[0] == 1:
        begin = int(begins)
        return torch.arange(begin, begin + int(lengths), device=begins.device)
    ends = offsets_of(lengths)
    return torch.arange(int(ends[-1]), device=begins.device) + torch.repeat_interleave(begins - ends[:-1], lengths)


def join(batches: Sequence[KeyBatch]) -> KeyBatch:
    """One batch after another."""
    first = batches[0]
    if first.ints is not None:
        return KeyBatch(first.type, torch.cat([b.ints for b in batches]))  # type: ignore[misc]
    data = torch.cat([b.data for b in batches])  # type: ignore[misc]
    return KeyBatch(first.type, None, data, offsets_of(torch.cat([b.lengths() for b in batches])))


def distinct(batch: KeyBatch, last: bool = False) -> torch.Tensor:
    """bool "n": true for the first (or last) one of equal keys."""
    count = len(batch)
    if batch.ints is None:
        places: dict[Any, int] = {}
        for i, key in enumerate(batch.tolist() if batch.type == "bytes" else KeyBatch("bytes", None, batch.data, batch.offsets).tolist()):
            if last:
                places[key] = i
            else:
                places.setdefault(key, i)
        chosen = torch.tensor(list(places.values()), dtype=torch.int64)
    else:
        ordered, order = torch.sort(batch.ints, stable=True)
        other = ordered[1:] != ordered[:-1]
        end = torch.ones(min(count, 1), dtype=torch.bool, device=other.device)
        chosen = order[torch.cat([other, end] if last else [end, other])]
    mask = torch.zeros(count, dtype=torch.bool, device=chosen.device)
    mask[chosen] = True
    return mask


def as_batch(op: str, key_type: str, keys: Any, argument: str = "keys") -> KeyBatch:
    """The keys of a call as a batch.

    Args:
        op, argument: for messages. key_type: "int64", "bytes" or "str".
        keys: a KeyBatch of this type; for int64 a tensor "n" of int64 or int32, or a sequence of ints; for the others a sequence of them.

    Raises:
        TypeError: a key of another type. ValueError: not one dimension, an int outside int64, a str that is no UTF-8, a key of 16 MiB or
        more.
    """
    if isinstance(keys, KeyBatch):
        if keys.type != key_type:
            fail(op, argument, f"{key_type} keys", f"{keys.type} keys", TypeError)
        return keys
    if key_type == "int64":
        return KeyBatch("int64", _ints(op, argument, keys))
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sequence):
        fail(op, argument, f"a sequence of {key_type}", type(keys).__name__, TypeError)
    keys = keys if isinstance(keys, list) else list(keys)
    return _pack(op, argument, key_type, keys)


def _ints(op: str, argument: str, keys: Any) -> torch.Tensor:
    if isinstance(keys, torch.Tensor):
        if keys.dtype not in (torch.int64, torch.int32):
            fail(op, argument, "int64 keys", str(keys.dtype).removeprefix("torch."), TypeError)
        check_dense(op, argument, keys)
        if keys.is_meta:
            fail(op, argument, "keys on a device that holds data", "device meta")
        if keys.dim() != 1:
            fail(op, argument, "one dimension", f"shape {tuple(keys.shape)}")
        return keys.detach().long().contiguous()
    if isinstance(keys, (str, bytes)) or not isinstance(keys, Sequence):
        fail(op, argument, "a tensor or a sequence of ints", type(keys).__name__, TypeError)
    for i, key in enumerate(keys):
        if isinstance(key, bool) or not isinstance(key, int):
            fail(op, f"{argument}[{i}]", "an int", type(key).__name__, TypeError)
        if not _LOW <= key <= _HIGH:
            fail(op, f"{argument}[{i}]", "an int of 64 bits with sign", key)
    return torch.tensor(keys, dtype=torch.int64)


def _pack(op: str, argument: str, key_type: str, keys: list[Any]) -> KeyBatch:
    fast = kernel("cpp", "store_keys")
    if not isinstance(fast, str) and forced_name() in (None, "cpp"):
        packed = fast.pack(keys, key_type == "str", MOST_BYTES)
        if packed is not None:
            batch = KeyBatch(key_type, None, packed[0], packed[1])
            batch.__dict__["_hashes"] = packed[2]
            return batch
    return KeyBatch(key_type, None, *_pack_in_python(op, argument, key_type, keys))  # it names the key that is wrong


def _pack_in_python(op: str, argument: str, key_type: str, keys: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    kind, parts = (str if key_type == "str" else bytes), []
    for i, key in enumerate(keys):
        if not isinstance(key, kind):
            fail(op, f"{argument}[{i}]", kind.__name__, type(key).__name__, TypeError)
        try:
            part = key.encode() if kind is str else key
        except UnicodeEncodeError as error:
            fail(op, f"{argument}[{i}]", "a str with a UTF-8 form", str(error))
        if len(part) > MOST_BYTES:
            fail(op, f"{argument}[{i}]", f"at most {MOST_BYTES} bytes", len(part))
        parts.append(part)
    data = b"".join(parts)
    held = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return held, offsets_of(torch.tensor([len(part) for part in parts], dtype=torch.int64))


def _hashed(data: Any, offsets: Any) -> tuple[torch.Tensor, torch.Tensor]:
    fast = kernel("cpp", "store_keys")
    if not isinstance(fast, str) and forced_name() in (None, "cpp"):
        return fast.hashes(data, offsets)
    first, second = torch.tensor([hash_key(key) for key in _each(data, offsets)], dtype=torch.int64).view(-1, 2).unbind(1)
    return first.contiguous(), second.contiguous()


def _each(data: torch.Tensor, offsets: torch.Tensor) -> Iterator[bytes]:
    text = bytes(data.tolist())
    return (text[begin:end] for begin, end in pairwise(offsets.tolist()))

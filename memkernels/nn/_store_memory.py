"""Mode "store" of `ExternalMemory`: an exact key-value store at every step, differentiable in its values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from memkernels._checks import check_tensor, fail
from memkernels._compat import register_namedtuple

NAME = "ExternalMemory"
NO_KEY = -1  # keys of hashed inputs are not negative
MOST_BITS = 48


class StoreState(NamedTuple):
    """What mode "store" carries from one call to the next.

    `memory` "B N W": values; `keys` int64 "B N": what each row is stored under; `age` int64 "B N": when it was stored last, the first store
    is number 1 and 0 is an empty row; `last` int64 "B H": the keys of the last step, -1 before the first.
    """

    memory: Tensor
    keys: Tensor
    age: Tensor
    last: Tensor

    def detach(self) -> StoreState:
        """The same values without their history: between the windows of truncated back-propagation."""
        return self._replace(memory=self.memory.detach())


register_namedtuple(StoreState)


def check_heads(read_heads: int, write_heads: int, bits: int) -> None:
    """A key fits into int64, and a read head has a bit to flip."""
    if bits > MOST_BITS:
        fail(NAME, "bits", f"1 to {MOST_BITS}", bits)
    if read_heads > write_heads * (bits + 1):
        fail(NAME, "read_heads", f"at most write_heads * (bits + 1) = {write_heads * (bits + 1)} in mode 'store'", read_heads)


def empty_state(like: Tensor, batch: int, slots: int, width: int, heads: int) -> StoreState:
    """A store without a row, for `batch` sequences, in the dtype and on the device of `like`."""
    numbers = like.new_zeros(batch, slots, dtype=torch.int64)
    return StoreState(like.new_zeros(batch, slots, width), numbers, numbers, like.new_full((batch, heads), NO_KEY, dtype=torch.int64))


def checked_state(state: Any, batch: int, slots: int, width: int, heads: int) -> StoreState:
    """The state that a caller passes, or one clear error."""
    if not isinstance(state, (tuple, list)) or len(state) != len(StoreState._fields):
        fail(NAME, "state", "a StoreState or None", type(state).__name__, TypeError)
    found = StoreState(*state)
    shapes = dict(memory=(batch, slots, width), keys=(batch, slots), age=(batch, slots), last=(batch, heads))
    for name, shape in shapes.items():
        part = getattr(found, name)
        check_tensor(NAME, f"state.{name}", part)
        if part.shape != shape:
            fail(NAME, "state", f"{name} of shape {shape}", tuple(part.shape))
        if part.is_floating_point() if name != "memory" else not part.is_floating_point():
            fail(NAME, f"state.{name}", "a floating dtype" if name == "memory" else "int64", part.dtype, TypeError)
    return found


def hashed_keys(x: Tensor, planes: Tensor, read_heads: int) -> tuple[Tensor, Tensor]:
    """The keys "T B H" of write heads and "T B R" of read heads of an input "T B I": the side of each plane "H bits I" it lies on.

    Read head r looks where write head r % H writes; its first probe is the key itself, the next ones have its least certain bit flipped,
    its second least certain one, and so on (multi-probe hashing). In float64, so that no bit depends on how a product was rounded.
    """
    heads, bits, _ = planes.shape
    sides = torch.einsum("tbi,hki->tbhk", x.detach().double(), planes.double())
    values = 1 << torch.arange(bits, device=x.device)
    code = ((sides > 0) * values).sum(-1)
    least = sides.abs().argsort(dim=-1, stable=True)
    flipped = torch.cat([torch.zeros_like(least[..., :1]), values[least]], -1)  # "T B H 1+bits"
    number = torch.arange(read_heads, device=x.device)
    probes = code[:, :, number % heads] ^ flipped[:, :, number % heads, number // heads]
    head = torch.arange(heads, device=x.device)
    return code * heads + head, probes * heads + number % heads


def given_keys(keys: Any, steps: int, batch: int, heads: tuple[int, int], batch_first: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys that a caller passes for what is stored and what is retrieved, as "T B H" and "T B R"."""
    if not isinstance(keys, (tuple, list)) or len(keys) != 2:
        fail(NAME, "keys", "a pair of int64 tensors (stored under, retrieved)", type(keys).__name__, TypeError)
    found = []
    for name, key, number, letter in zip(("keys[0]", "keys[1]"), keys, heads, ("H", "R")):
        check_tensor(NAME, name, key)
        if key.dtype != torch.int64:
            fail(NAME, name, "int64", str(key.dtype).removeprefix("torch."), TypeError)
        if key.device != device:
            fail(NAME, name, f"device {device}", f"device {key.device}")
        shape = (batch, steps, number) if batch_first else (steps, batch, number)
        if key.shape != shape:
            dims = f"[{'B T' if batch_first else 'T B'} {letter}]"
            fail(NAME, name, f"{dims} of shape {shape}", f"shape {tuple(key.shape)}")
        found.append(key.transpose(0, 1) if batch_first else key)
    return found[0], found[1]


class _Plan(NamedTuple):
    """Where rows are, step by step: all integers, constant for gradients. A source is a row of the old memory, or N + T*H's number of a
    value; rows are slots; -1 is absent."""

    source: Tensor  # "B N": of each slot in the end
    read: Tensor  # "T B R": sources
    rows: Tensor  # "T B R": slots that are read
    written: Tensor  # "T B H": slots that are written, -1: nothing
    state: tuple[Tensor, Tensor]  # keys and age in the end


@torch.no_grad()
def plan(state: StoreState, store: Tensor, retrieve: Tensor, valid: Tensor | None) -> _Plan:
    """Runs all steps on keys alone: stores under "T B H", then retrieves "T B R"; `valid` bool "B H": whether the first step stores."""
    _, keys, age, _ = state
    steps, batch, heads = store.shape
    slots = keys.shape[1]
    source = torch.arange(slots, device=keys.device).expand(batch, -1)
    turn = age.amax(1, keepdim=True) if slots else age
    reads, rows, written = [], [], []
    for t in range(steps):
        for h in range(heads):
            key = store[t, :, h, None]
            same = (keys == key) & (age > 0)
            slot = torch.where(same, -1, age).argmin(1, keepdim=True)  # its own, else an empty one, else the one stored longest ago
            turn = turn + 1
            new = keys.scatter(1, slot, key), age.scatter(1, slot, turn), source.scatter(1, slot, slots + t * heads + h)
            if t == 0 and valid is not None:
                does = valid[:, h, None]
                new = tuple(torch.where(does, a, b) for a, b in zip(new, (keys, age, source)))  # type: ignore[assignment]
                slot, turn = torch.where(does, slot, -1), torch.where(does, turn, turn - 1)
            keys, age, source = new
            written.append(slot)
        same = (keys[:, None] == retrieve[t, :, :, None]) & (age > 0)[:, None]
        found, row = same.max(-1)
        rows.append(torch.where(found, row, -1))
        reads.append(torch.where(found, source.gather(1, row), -1))
    shape = (0, batch, retrieve.shape[2])
    read, row = (torch.stack(t) if t else keys.new_zeros(shape) for t in (reads, rows))
    slot = torch.cat(written, 1).view(batch, steps, heads).transpose(0, 1) if written else keys.new_zeros(0, batch, heads)
    return _Plan(source, read, row, slot, (keys, age))


def run(state: StoreState, values: Tensor, store: Tensor, retrieve: Tensor, valid: Tensor | None, last: Tensor) -> Any:
    """All steps: values "T B H W" are stored under their keys, then what lies under `retrieve` is read.

    Returns: reads "T B R W", the state, and the slots read "T B R" and written "T B H". Values reach reads and the memory by one gather.
    """
    where = plan(state, store, retrieve, valid)
    batch, _, width = state.memory.shape
    steps, _, heads, _ = values.shape
    pool = torch.cat([state.memory, values.permute(1, 0, 2, 3).reshape(batch, steps * heads, width)], 1)
    read = (
        _rows(pool, where.read.permute(1, 0, 2).flatten(1)).unflatten(1, (steps, -1))
        if steps
        else pool.new_zeros(batch, 0, *retrieve.shape[2:], width)
    )
    memory = _rows(pool, where.source)
    return read.transpose(0, 1), StoreState(memory, *where.state, last), where.rows, where.written


def _rows(pool: Tensor, index: Tensor) -> Tensor:
    """The rows "B K W" of "B P W" that "B K" names, 0 where it is -1."""
    found = pool.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, pool.shape[2]))
    return torch.where((index >= 0)[..., None], found, torch.zeros((), dtype=pool.dtype, device=pool.device))

"""From the output of a controller to what `dnc_step` is asked: one vector cut into parts, each with its activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memkernels.nn._trace import stacked
from memkernels.ops.dnc_sequence import dnc_sequence, interface_shapes
from memkernels.ops.dnc_step import DNCInterface, DNCState, dnc_step

# On a GPU one program of `dnc_sequence` has a row of the batch through all steps: of larger sizes it has none.
MAX_SLOTS, MAX_WIDTH, MAX_READ_HEADS = 1024, 512, 32


def oneplus(x: Tensor) -> Tensor:
    return 1 + F.softplus(x)


class Interface(NamedTuple):
    """The sizes of a DNC's memory and the options that its interface depends on."""

    slots: int
    width: int
    read_heads: int
    write_heads: int
    key_mask: bool = False
    sharpen_links: bool = False
    strength: Callable[[Tensor], Tensor] = oneplus
    bounded: bool = False  # keys and what is added go through tanh

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Sizes of the parts, in the order of `DNCInterface`."""
        return interface_shapes(self.read_heads, self.write_heads, self.width, self.key_mask, self.sharpen_links)

    def features(self) -> int:
        """The length of the vector."""
        return sum(torch.Size(shape).numel() for shape in self.parts().values())

    def __call__(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut the last dimension of a tensor and apply the activations; leading dimensions stay."""
        parts = self.parts()
        pieces = vector.split([torch.Size(shape).numel() for shape in parts.values()], -1)
        activations: dict[str, Any] = dict.fromkeys(parts, torch.sigmoid) | dict(
            read_strengths=self.strength, write_strengths=self.strength, read_modes=lambda x: torch.softmax(x, -1), link_sharpness=oneplus
        )
        for name in ("read_keys", "write_keys", "add"):
            activations[name] = torch.tanh if self.bounded else lambda x: x
        return {name: activations[name](p.unflatten(-1, shape)) for (name, shape), p in zip(parts.items(), pieces)}

    def steps(self, vectors: Tensor) -> list[DNCInterface]:
        """What is asked at every step of "T B features", the activations taken for all steps at once."""
        asked = self(vectors)
        return [DNCInterface(**dict(zip(asked, step))) for step in zip(*(t.unbind(0) for t in asked.values()))]

    def run(self, vectors: Tensor, state: DNCState, **options: Any) -> tuple[Tensor, DNCState, Tensor]:
        """Reads "T B R W", the state after all steps of "T B features", and the weights "T B R+U N"; options of `dnc_step`."""
        if self.in_one_op(vectors):
            return dnc_sequence(vectors, state, **self.sequence_options(), **options, return_weights=True)  # type: ignore[return-value]
        found, weights = [], []
        for ask in self.steps(vectors):
            read, state = dnc_step(state, ask, **options)
            found.append(read)
            weights.append(heads_of(state))
        steps, batch = vectors.shape[:2]
        return (
            stacked(found, vectors.new_zeros(steps, batch, self.read_heads, self.width)),
            state,
            stacked(weights, vectors.new_zeros(steps, batch, self.read_heads + self.write_heads, self.slots)),
        )

    def in_one_op(self, x: Tensor) -> bool:
        """Whether `dnc_sequence` has a kernel for an input: else, on a GPU, the ops of a step have."""
        fits = self.slots <= MAX_SLOTS and self.width <= MAX_WIDTH and self.read_heads <= MAX_READ_HEADS
        return not x.is_cuda or (fits and x.dtype != torch.float64)

    def sequence_options(self) -> dict[str, Any]:
        """What `dnc_sequence` has to know of the interface."""
        strength = "oneplus" if self.strength is oneplus else "softplus"
        return dict(key_mask=self.key_mask, sharpen_links=self.sharpen_links, strength=strength, bounded=self.bounded)

    def nothing(self, like: Tensor, batch: int) -> DNCState:
        """The state before the first step: all zeros."""
        rows, reads, writes = self.slots, self.read_heads, self.write_heads
        shapes = ((rows, self.width), (rows,), (writes, rows, rows), (writes, rows), (writes, rows), (reads, rows))
        return DNCState(*(like.new_zeros(batch, *shape) for shape in shapes))


def heads_of(state: DNCState) -> Tensor:
    """The last weights of the read and the write heads, "B R+U N"."""
    return torch.cat([state.read_weights, state.write_weights], 1)

"""From the output of a controller to what `dnc_step` is asked: one vector cut into parts, each with its activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memkernels.ops.dnc_step import DNCInterface, DNCState


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
        width, reads, writes = self.width, self.read_heads, self.write_heads
        found: dict[str, tuple[int, ...]] = dict(
            read_keys=(reads, width), read_strengths=(reads,), write_keys=(writes, width), write_strengths=(writes,),
            erase=(writes, width), add=(writes, width), free_gate=(reads,), allocation_gate=(writes,), write_gate=(writes,),
            read_modes=(reads, 2 * writes + 1),
        )  # fmt: skip
        if self.key_mask:
            found |= dict(write_mask=(writes, width), read_mask=(reads, width))
        if self.sharpen_links:
            found |= dict(link_sharpness=(reads, 2))
        return found

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

    def nothing(self, like: Tensor, batch: int) -> DNCState:
        """The state before the first step: all zeros."""
        rows, reads, writes = self.slots, self.read_heads, self.write_heads
        shapes = ((rows, self.width), (rows,), (writes, rows, rows), (writes, rows), (writes, rows), (reads, rows))
        return DNCState(*(like.new_zeros(batch, *shape) for shape in shapes))

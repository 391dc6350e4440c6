"""What the interface vector of a Differentiable Neural Computer is cut into, its activations and their slopes, in plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from memkernels.backends.reference._content import softmax_backward


class Options(NamedTuple):
    """The options of dnc_sequence, in the order of its schema."""

    key_mask: bool
    sharpen_links: bool
    deallocate: bool
    write_gradient: bool
    strength: str
    cosine: str
    bounded: bool
    clip: float  # 0: none


class Layout:
    """Where the parts of a vector lie: read_heads R, write_heads U, width W."""

    def __init__(self, readers, writers, width, options):
        self.options = options
        keys, writes = (readers, width), (writers, width)
        self.shapes: dict[str, tuple[int, ...]] = dict(
            read_keys=keys, read_strengths=(readers,), write_keys=writes, write_strengths=(writers,), erase=writes, add=writes,
            free_gate=(readers,), allocation_gate=(writers,), write_gate=(writers,), read_modes=(readers, 2 * writers + 1),
        )  # fmt: skip
        if options.key_mask:
            self.shapes |= dict(write_mask=writes, read_mask=keys)
        if options.sharpen_links:
            self.shapes |= dict(link_sharpness=(readers, 2))
        self.sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]

    def _kind(self, name):
        if name in ("read_keys", "write_keys", "add"):
            return "tanh" if self.options.bounded else "linear"
        if name in ("read_strengths", "write_strengths"):
            return self.options.strength
        return dict(read_modes="softmax", link_sharpness="oneplus").get(name, "sigmoid")

    def activated(self, raw) -> dict[str, Any]:
        pieces = zip(self.shapes.items(), raw.split(self.sizes, -1))
        return {name: _ACTIVATIONS[self._kind(name)](piece.unflatten(-1, shape)) for (name, shape), piece in pieces}

    def slopes(self, raw, activated, gradients):
        """The gradient of `raw` from those of what `activated` returns."""
        pieces = zip(self.shapes.items(), raw.split(self.sizes, -1))
        found = [_SLOPES[self._kind(n)](gradients[n], activated[n], x.unflatten(-1, shape)) for (n, shape), x in pieces]
        return torch.cat([t.flatten(1) for t in found], -1)

    def packed(self, activated):
        return torch.cat([activated[name].flatten(1) for name in self.shapes], -1)


_ACTIVATIONS: dict[str, Any] = dict(
    linear=lambda x: x,
    tanh=torch.tanh,
    sigmoid=torch.sigmoid,
    softplus=F.softplus,
    oneplus=lambda x: 1 + F.softplus(x),
    softmax=lambda x: torch.softmax(x, -1),
)
_SLOPES: dict[str, Any] = dict(
    linear=lambda d, y, x: d,
    tanh=lambda d, y, x: d * (1 - y * y),
    sigmoid=lambda d, y, x: d * y * (1 - y),
    softplus=lambda d, y, x: d * x.sigmoid(),
    oneplus=lambda d, y, x: d * x.sigmoid(),
    softmax=lambda d, y, x: softmax_backward(d, y),
)

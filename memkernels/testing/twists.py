"""What the specs of the ops on an addressable memory share: twists of their inputs, bad calls, sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memkernels.testing.spec import Sample

READ_SIZES = (
    Sample("one", dict(B=1, N=1, W=1, R=1)),
    Sample("odd", dict(B=3, N=37, W=19, R=2)),
    Sample("wide", dict(B=2, N=67, W=65, R=5)),
    Sample("no_batch", dict(B=0, N=5, W=4, R=3)),
    Sample("no_rows", dict(B=2, N=0, W=4, R=3)),
    Sample("no_width", dict(B=2, N=5, W=0, R=3)),
    Sample("no_heads", dict(B=2, N=5, W=4, R=0)),
)


def all_masked(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first row of the batch attends to nothing."""
    mask = inputs["mask"].clone()
    mask[0] = False
    return {**inputs, "mask": mask}


def nan_where_masked(inputs: dict[str, Any]) -> dict[str, Any]:
    """The first row of the batch attends to nothing; what is masked is NaN."""
    masked = all_masked(inputs)
    names = [name for name in ("memory", "value") if inputs.get(name) is not None]
    return {**masked, **{name: inputs[name].masked_fill(~masked["mask"][..., None], float("nan")) for name in names}}


def zero_rows(inputs: dict[str, Any]) -> dict[str, Any]:
    """A memory row and a key of zeros."""
    memory, key = inputs["memory"].clone(), inputs["key"].clone()
    memory[:, 0], key[:, 0] = 0, 0
    return {**inputs, "memory": memory, "key": key}


def sharp(inputs: dict[str, Any]) -> dict[str, Any]:
    """A thousand times the strength."""
    return {**inputs, "strength": inputs["strength"] * 1000}


def large_dots(inputs: dict[str, Any]) -> dict[str, Any]:
    """Dot products of about a thousand."""
    return {**inputs, "memory": 10 * inputs["memory"], "key": 10 * inputs["key"]}


def equal_rows(strength: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """All rows of the memory are the same, the strength is this one, or the greatest number of its dtype.

    At most 1e3 in float64: a sum that cancels is held to an absolute floor there, and its rounding goes with the strength.
    """

    def twist(inputs: dict[str, Any]) -> dict[str, Any]:
        memory = inputs["memory"]
        most = 1e3 if memory.dtype == torch.float64 else torch.finfo(memory.dtype).max
        return {
            **inputs,
            "memory": memory[:, :1].expand_as(memory).contiguous(),
            "strength": torch.full_like(inputs["strength"], min(strength, most)),
        }

    return twist


def wrong_similarity(inputs: dict[str, Any], options: dict[str, Any]) -> None:
    options["similarity"] = "cos"

"""What the specs of the ops on an addressable memory share: twists of their inputs, bad calls, sizes."""

from __future__ import annotations

from typing import Any

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


def wrong_similarity(inputs: dict[str, Any], options: dict[str, Any]) -> None:
    options["similarity"] = "cos"

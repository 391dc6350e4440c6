"""vmap rules: fold the mapped dimension into the batch where that is the same function, else one call per slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Axes = Sequence[int | None]


def _is_placeholder(tensor: torch.Tensor) -> bool:
    """An output that was not asked for is an empty tensor of shape (0,)."""
    return tensor.ndim == 1 and tensor.numel() == 0


def _fold(tensor: torch.Tensor, mapped: int | None, axis: int | None, n: int) -> torch.Tensor:
    if axis is None or _is_placeholder(tensor):
        return tensor
    if mapped is None:
        tensor = tensor.unsqueeze(axis)
        tensor = tensor.expand(*tensor.shape[:axis], n, *tensor.shape[axis + 1 :])
    else:
        tensor = tensor.movedim(mapped, axis)
    return tensor.flatten(axis, axis + 1)


def _unfold(tensor: torch.Tensor, axis: int | None, n: int, batch: int) -> tuple[torch.Tensor, int | None]:
    if axis is None or _is_placeholder(tensor):
        return tensor, None
    return tensor.unflatten(axis, (n, batch)), axis


def _batch(tensor: torch.Tensor, mapped: int | None, axis: int) -> int:
    shape = list(tensor.shape)
    if mapped is not None:
        del shape[mapped]
    return shape[axis]


def rule(call: Callable[..., Any], in_axes: Axes, out_axes: Axes, must_loop: Callable[[tuple[Any, ...]], bool]) -> Callable[..., Any]:
    """A vmap staticmethod for `call(*tensors, *options)`.

    Args:
        call: takes and returns unmapped tensors.
        in_axes: the batch axis of each tensor argument; None where the tensor is shared by the batch.
        out_axes: likewise for the outputs.
        must_loop: says from the arguments that folding would be wrong (a gradient summed over the batch is asked for).
    """

    def vmapped(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        n = info.batch_size
        tensors = [(i, a, in_dims[i], in_axes[i]) for i, a in enumerate(args[: len(in_axes)]) if isinstance(a, torch.Tensor)]
        batches = {_batch(a, d, axis) for _, a, d, axis in tensors if axis is not None and not (d is None and _is_placeholder(a))}
        mapped_shared = any(d is not None and axis is None for _, _, d, axis in tensors)
        if mapped_shared or len(batches) != 1 or must_loop(args):
            return _looped(call, n, tensors, args)
        folded = list(args)
        for i, a, d, axis in tensors:
            folded[i] = _fold(a, d, axis, n)
        out = call(*folded)
        if isinstance(out, torch.Tensor):
            return _unfold(out, out_axes[0], n, next(iter(batches)))
        pairs = [_unfold(o, axis, n, next(iter(batches))) for o, axis in zip(out, out_axes)]
        return tuple(o for o, _ in pairs), tuple(d for _, d in pairs)

    return vmapped


def _looped(call: Callable[..., Any], n: int, tensors: list[Any], args: tuple[Any, ...]) -> Any:
    results = []
    for j in range(n):
        sliced = list(args)
        for i, a, d, _ in tensors:
            sliced[i] = a if d is None else a.select(d, j)
        results.append(call(*sliced))
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    missing = [all(_is_placeholder(t) for t in column) for column in zip(*results)]
    outputs = tuple(column[0] if none else torch.stack(column) for none, column in zip(missing, zip(*results)))
    return outputs, tuple(None if none else 0 for none in missing)

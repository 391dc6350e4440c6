"""Attention over a union of keys from the attention over its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memkernels._checks import Signature, check_dense, check_tensor, fail
from memkernels._compat import autocast_enabled
from memkernels._registry import Arg, Out, define_op, new_empty


def merge_attention(
    outs: torch.Tensor | Sequence[torch.Tensor], lses: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the attention of the same queries to S sets of keys: exactly the attention to all of them at once.

    Formula:
        ``lse = log sum_s exp(lses[s])``, ``out = sum_s exp(lses[s] - lse) * outs[s]``

    Args:
        outs: "S B NH Q V", float64, float32, bfloat16 or float16, any strides; or a sequence of S tensors "B NH Q V", which is stacked.
            Any number of leading dimensions, the same in all.
        lses: "S B NH Q", float32 (float64 for float64), or a sequence: natural-log log-sum-exps, as
            ``attention(..., return_lse=True)`` gives them; -inf where a query saw no key of this part.

    Returns:
        (out "B NH Q V", lse "B NH Q"), contiguous, with the dtypes of outs and lses; 0 and -inf where no part saw a key.

    Gradients:
        To ``outs`` and ``lses``, also through ``lse``, of any order: parts merged train as one attention to all keys does. A part of
        weight 0 (lse -inf) reaches nothing, whatever its ``outs`` hold (NaN too), and its gradients are 0.

    Numerics:
        Sums in float32 (float64 for float64), in the order of the parts; one rounding at the end. Nothing is kept for backward.
        Deterministic; a row does not depend on other rows.

    Raises:
        ValueError: sizes differ, or a sequence without tensors. TypeError: a dtype differs or is not a floating one.

    Source:
        Milakov and Gimelshein, Online normalizer calculation for softmax (2018), section 3.1.

    Example:
        >>> import torch, memkernels as mk
        >>> query, key, value = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 3)
        >>> parts = [mk.attention(query, key[:, :, k], value[:, :, k], return_lse=True) for k in (slice(2), slice(2, 6))]
        >>> out, lse = mk.merge_attention(*zip(*parts))
        >>> torch.allclose(out, mk.attention(query, key, value), atol=1e-6)
        True
    """
    parts, sums = _stacked("outs", outs), _stacked("lses", lses)
    if autocast_enabled(parts.device.type) and sums.dtype in (torch.bfloat16, torch.float16):
        sums = sums.float()
    shape = parts.shape
    if parts.dim() != 5:
        parts, sums = _five_dims(parts, sums)
    dims = (WIDE if parts.dtype == torch.float64 else SIGNATURE)(parts, sums)
    out, lse = OP(parts, sums)
    return (out, lse) if len(shape) == 5 else (out.reshape(*shape[1:-1], dims["V"]), lse.reshape(shape[1:-1]))


def _stacked(name, parts) -> torch.Tensor:
    """One tensor with the parts along its first dimension."""
    if not isinstance(parts, (tuple, list)):
        check_tensor("merge_attention", name, parts)
        return parts
    if not parts:
        fail("merge_attention", name, "at least one tensor", "an empty sequence")
    for i, part in enumerate(parts):
        check_tensor("merge_attention", f"{name}[{i}]", part)
        check_dense("merge_attention", f"{name}[{i}]", part)
        for what in ("shape", "dtype", "device"):
            wanted, got = getattr(parts[0], what), getattr(part, what)
            if wanted != got:
                kind = TypeError if what == "dtype" else ValueError
                fail("merge_attention", f"{name}[{i}]", f"{what} {_text(wanted)} as of {name}[0]", _text(got), kind)
    return torch.stack(tuple(parts))


def _text(what):
    return str(tuple(what)) if isinstance(what, torch.Size) else str(what).removeprefix("torch.")


def _five_dims(outs, lses):
    """Three dimensions between the parts and the width: ones before, or the first ones folded."""
    if outs.dim() < 2:
        fail("merge_attention", "outs", "at least 2 dimensions", f"shape {tuple(outs.shape)}")
    lead = outs.shape[1:-1]
    if lses.shape != outs.shape[:-1]:
        fail("merge_attention", "lses", f"shape {tuple(outs.shape[:-1])}", f"shape {tuple(lses.shape)}")
    missing = 3 - len(lead)
    lead = (1,) * missing + lead if missing >= 0 else (lead[: 1 - missing].numel(), *lead[1 - missing :])
    return outs.reshape(outs.shape[0], *lead, outs.shape[-1]), lses.reshape(outs.shape[0], *lead)


def _allocate(outs, lses):
    return new_empty(outs, tuple(outs.shape[1:])), new_empty(lses, tuple(lses.shape[1:]))


SIGNATURE, WIDE = (Signature("merge_attention", outs="S B NH Q V", lses=("S B NH Q", dtype)) for dtype in (torch.float32, torch.float64))
OP = define_op(
    "merge_attention",
    inputs=(Arg("outs", batch=1), Arg("lses", batch=1)),
    outputs=(Out("out"), Out("lse")),
    allocate=_allocate,
    autocast="float32",
)

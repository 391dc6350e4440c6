"""What the public functions of the attention family share."""

from __future__ import annotations

from typing import Any

import torch

from memkernels import _compat
from memkernels._checks import as_index, check_dense, check_dtype, check_finite, fail
from memkernels._registry import Product

FAR = 2**40  # past the end of any sequence, and far from where int64 positions overflow


def window_limits(op: str, window: Any) -> tuple[int, int]:
    """(left, right) with -1 for no limit."""
    if window is None:
        return -1, -1
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not (pair and all(w is None or (isinstance(w, int) and not isinstance(w, bool) and w >= -1) for w in window)):
        fail(op, "window", "(left, right), each an int >= 0, or -1 or None for no limit", window)
    left, right = (-1 if w is None else min(w, FAR) for w in window)
    return left, right


def softmax_scale(op: str, scale: Any, width: Any) -> Any:
    """The factor of the scores, 1 / sqrt(width) unless it is given; without a width there are no products, and it is 0."""
    if scale is None:
        return width**-0.5 if width else 0.0
    scale = check_finite(op, "scale", scale)
    return scale if width else 0.0


def key_lengths(op: str, lengths: Any, query: torch.Tensor, lead: Any, keys: int) -> torch.Tensor:
    """One a batch entry, as int64.

    Values are read only where that is free: on a CPU, outside of transforms and tracing; C++ looks in any case.
    """
    lengths = as_index(op, "lengths_k", lengths)
    check_dense(op, "lengths_k", lengths)
    check_dtype(op, "lengths_k", lengths, torch.int64, query)
    if lengths.shape != lead:
        fail(op, "lengths_k", f"shape {tuple(lead)}, the query's before its heads", f"shape {tuple(lengths.shape)}")
    if not torch.compiler.is_compiling() and _compat.integers_fit(lengths, 0, keys, _compat.ANY) is False:
        low, high = (int(v) for v in torch.aminmax(lengths))
        fail(op, "lengths_k", f"values in 0..K={keys}", f"{low}..{high}")
    return lengths if len(lead) == 1 else lengths.reshape(-1)


def attention_products(pairs: int, width: int, value_width: int, right: str = "*") -> tuple[Product, Product]:
    """Scores and weighted values of so many pairs of a query and a key, counted as torch counts its fused attention: backward computes
    the scores again and all gradients, whichever are asked for; what a mask hides counts too."""
    return Product(pairs * width, right=right, again=1), Product(pairs * value_width, right=right)


def paired(starts_q: torch.Tensor, starts_k: torch.Tensor, queries: int, keys: int) -> int:
    """Pairs of a query and a key of the same sequence; where the starts are not known, of sequences of equal length."""
    if _compat.values_known(starts_q) and _compat.values_known(starts_k):
        return int((starts_q.diff() * starts_k.diff()).sum())
    return queries * keys // torch.sym_max(starts_q.shape[0] - 1, 1)

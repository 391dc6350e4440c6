"""Softmax attention of sequences of different lengths, laid end to end without padding."""

from __future__ import annotations

from itertools import pairwise

import torch

from memkernels import _compat
from memkernels._checks import Signature, as_index, check_choice, check_flag, check_number, fail
from memkernels._registry import Arg, Out, define_op, new_empty
from memkernels.ops._attention import attention_products, paired, softmax_scale, window_limits
from memkernels.ops.attention import CORNERS


def attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    causal: str = "bottom-right",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of S sequences laid end to end: each query sees the keys of its own sequence.

    Formula:
        Sequence s has the queries from ``cu_seqlens_q[s]`` to before ``cu_seqlens_q[s + 1]``, and keys likewise;
        ``x[q, k] = scale * query[q] . key[k]``, with softcap ``softcap * tanh(x / softcap)``; ``lse[q] = log sum_k exp(x[q, k])``,
        ``out[q] = sum_k exp(x[q, k] - lse[q]) * value[k]`` over the keys of the sequence that q may see.

    Args:
        query: "Tq NH D", float64, float32, bfloat16 or float16, any strides.
        key: "Tk NHk D", same dtype and device. NHk divides NH: query head h reads key head h // (NH // NHk).
        value: "Tk NHk V"; V may differ from D.
        cu_seqlens_q: int64 or int32 "S+1", not decreasing, from 0 to at most Tq. A sequence may be empty on either side.
        cu_seqlens_k: the same of the keys.
        is_causal: a query sees no key behind where it stands.
        scale: factor of the scores, default 1 / sqrt(D).
        window: (left, right): a query sees the keys from left before to right after where it stands; None or -1 = no limit on that side.
        softcap: scores are bent to stay between -softcap and softcap; positive.
        causal: where queries stand: the last one of a sequence at its last key ("bottom-right"), or query i at key i ("top-left").
        return_lse: also return the log-sum-exp.

    Returns:
        out: "Tq NH V", dtype of the query, contiguous; 0 where a query sees no key, and past the last sequence. With ``return_lse``:
        (out, lse "Tq NH"), lse float32 (float64 for float64), natural logarithm, -inf where a query sees no key.

    Gradients:
        To ``query``, ``key`` and ``value``, also through ``lse``, of any order; 0 for tokens past the last sequence.

    Numerics:
        Those of ``attention``; on the CPU bit for bit what ``attention`` gives for each sequence alone. Deterministic. The values of
        cu_seqlens are checked where they lie on the CPU; those of a CUDA tensor are never waited for.

    Raises:
        ValueError: a size does not fit, a scale that is not finite, cu_seqlens do not begin at 0, decrease or end past the tokens, an
            unknown corner, softcap <= 0.
        TypeError: a dtype differs, is not a floating one, or cu_seqlens are not int64 or int32.

    Source:
        Dao et al., FlashAttention (2022), for the tiling; the layout is that of its flash_attn_varlen_func.

    Example:
        >>> import torch, memkernels as mk
        >>> x, ends = torch.tensor([[[1.0]], [[2.0]], [[5.0]]]), torch.tensor([0, 2, 3])
        >>> mk.attention_varlen(x, x, x, ends, ends, is_causal=True)[:, 0, 0].round(decimals=3)
        tensor([1.0000, 1.8810, 5.0000])
    """
    cu_seqlens_q = as_index("attention_varlen", "cu_seqlens_q", cu_seqlens_q)
    cu_seqlens_k = as_index("attention_varlen", "cu_seqlens_k", cu_seqlens_k)
    dims = SIGNATURE(query, key, value, cu_seqlens_q, cu_seqlens_k)
    if dims["S"] < 0:
        fail("attention_varlen", "cu_seqlens_q", "at least 1 element", f"shape {tuple(cu_seqlens_q.shape)}")
    heads, key_heads = dims["NH"], dims["NHk"]
    if heads % key_heads if key_heads else heads:
        fail("attention_varlen", "key", f"a divisor of {heads} heads", f"shape {tuple(key.shape)}")
    if not torch.compiler.is_compiling():
        _check_values("cu_seqlens_q", cu_seqlens_q, "Tq", dims)
        _check_values("cu_seqlens_k", cu_seqlens_k, "Tk", dims)
    if causal not in CORNERS:
        check_choice("attention_varlen", "causal", causal, CORNERS)
    if not (is_causal.__class__ is return_lse.__class__ is bool):
        check_flag("attention_varlen", "is_causal", is_causal)
        check_flag("attention_varlen", "return_lse", return_lse)
    scale = softmax_scale("attention_varlen", scale, dims["D"])
    softcap = 0.0 if softcap is None else _softcap(softcap)
    left, right = window_limits("attention_varlen", window)
    out, lse, _ = OP(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, 0 if is_causal else right, causal)
    return (out, lse) if return_lse else out


def _check_values(name, starts, letter, dims):
    """Reads them only where that is free: on a CPU, outside of transforms and tracing; the C++ kernel looks in any case."""
    if _compat.integers_fit(starts, 0, dims[letter], _compat.RISING) is False:
        values = starts.tolist()
        at = next((i for i, (a, b) in enumerate(pairwise(values)) if a > b), None)
        got = f"{values[0]} to {values[-1]}" if at is None else f"{values[at]} before {values[at + 1]}"
        fail("attention_varlen", name, f"values that do not decrease, from 0 to at most {letter}={dims[letter]}", got)


def _softcap(softcap):
    softcap = check_number("attention_varlen", "softcap", softcap)
    if not 0.0 < softcap < float("inf"):
        fail("attention_varlen", "softcap", "a positive number", softcap)
    return float(softcap)


def _allocate(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    tokens, heads, _ = query.shape
    out = new_empty(query, (tokens, heads, value.shape[2]))
    return out, new_empty(query, (tokens, heads), wide), new_empty(query, (heads, tokens, 2), wide)


def _products(query, key, value, cu_seqlens_q, cu_seqlens_k, *_):
    pairs = query.shape[1] * paired(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    return attention_products(pairs, query.shape[2], value.shape[2])


SIGNATURE = Signature(
    "attention_varlen", query="Tq NH D", key="Tk NHk D", value="Tk NHk V", cu_seqlens_q=("S+1", torch.int64),
    cu_seqlens_k=("S+1", torch.int64),
)  # fmt: skip
OP = define_op(
    "attention_varlen",
    inputs=(
        Arg("query", batch=None),
        Arg("key", batch=None),
        Arg("value", batch=None),
        Arg("cu_seqlens_q", differentiable=False, batch=None),
        Arg("cu_seqlens_k", differentiable=False, batch=None),
    ),
    outputs=(Out("out", save=True, batch=None), Out("lse", batch=None), Out("stats", differentiable=False, save=True, batch=None)),
    options="float scale, float softcap, SymInt left, SymInt right, str causal",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

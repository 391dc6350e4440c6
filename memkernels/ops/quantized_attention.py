"""Softmax attention over a memory held in int8, and how rows are brought into that form."""

from __future__ import annotations

from math import prod

import torch

from memkernels._checks import FLOATS, Signature, as_index, check_dense, check_flag, check_tensor, fail
from memkernels._registry import Arg, Out, define_op, new_empty
from memkernels.ops._attention import attention_products, key_lengths, softmax_scale


def quantize_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale a row: what ``quantized_attention`` reads.

    Formula:
        ``scale = max |row| / 127``, ``rows = round(row / scale)``, to the nearest integer, ties to even; a row of zeros has scale 0.

    Args:
        tensor: "... D", float64, float32, bfloat16 or float16, finite, any strides, at least one dimension.

    Returns:
        (rows int8 "... D", scale "..."): scale is float32, float64 for float64. ``rows * scale[..., None]`` differs from the tensor by at
        most scale / 2 (and one rounding).

    Gradients:
        None: rounding has no useful one. The results are detached.

    Numerics:
        In float32 (float64 for float64), which the half types convert to exactly.

    Raises:
        ValueError: no dimension. TypeError: not a floating tensor.

    Example:
        >>> import torch, memkernels as mk
        >>> rows, scale = mk.quantize_rows(torch.tensor([[127.0, -63.5], [0.0, 0.0]]))
        >>> rows.tolist(), scale.tolist()
        ([[127, -64], [0, 0]], [1.0, 0.0])
    """
    check_tensor("quantize_rows", "tensor", tensor)
    check_dense("quantize_rows", "tensor", tensor)
    if tensor.dtype not in FLOATS:
        fail("quantize_rows", "tensor", "float64, float32, bfloat16 or float16", str(tensor.dtype).removeprefix("torch."), TypeError)
    if tensor.dim() == 0:
        fail("quantize_rows", "tensor", "at least 1 dimension", "shape ()")
    wide = tensor.detach().to(_wide(tensor.dtype))
    most = wide.abs().amax(-1, keepdim=True) if tensor.shape[-1] else wide.new_zeros(*tensor.shape[:-1], 1)
    rows = wide / torch.where(most > 0, most, 1) * 127  # not wide / scale: the scale of a tiny row is a denormal number, or 0
    return rows.round().to(torch.int8), (most / 127).squeeze(-1)


def quantized_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    *,
    scale: float | None = None,
    lengths_k: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of few queries over a large memory held in int8 (``quantize_rows``): a quarter of the bytes of float32.

    Formula:
        ``s[q, k] = scale * key_scale[k] * (query[q] . key[k])``, ``lse[q] = log sum_k exp(s[q, k])``,
        ``out[q] = sum_k exp(s[q, k] - lse[q]) * value_scale[k] * value[k]``

    Args:
        query: "B NH Q D", float64, float32, bfloat16 or float16, any strides.
        key: int8 "B NHk K D", any strides; NHk divides NH, query head h reads key head h // (NH // NHk).
        value: int8 "B NHk K V"; V may differ from D.
        key_scale: "B NHk K", float32 (float64 with a float64 query), finite.
        value_scale: "B NHk K", likewise.
        scale: factor of the scores, default 1 / sqrt(D).
        lengths_k: int64 or int32 "B"; entry b sees its first lengths_k[b] keys, 0 to K of them (on a GPU, which would have to be
            waited for, what is outside is clamped).
        return_lse: also return the log-sum-exp.

    Returns:
        out: "B NH Q V", dtype of the query, contiguous; 0 where there is no key. With ``return_lse``: (out, lse "B NH Q"), lse float32
        (float64 for float64), natural logarithm, -inf where there is no key.

    Gradients:
        To ``query`` only, also through ``lse``, of any order: the memory and its scales are frozen. What keys beyond a length hold, and
        their scales (NaN too), reaches nothing.

    Numerics:
        The rows are widened, not the query rounded: sums and softmax in float32 (float64 for float64), so the only error beyond that of
        ``attention`` is the memory's own rounding. One pass over the memory in each direction. Deterministic, independent of the number of
        threads and of other batch entries.

    Raises:
        ValueError: a size or a length does not fit, a scale that is not finite, or NHk does not divide NH. TypeError: a dtype differs, or
            return_lse is not True or
        False.

    Source:
        Vaswani et al., Attention Is All You Need (2017), equation 1; Dettmers et al., LLM.int8() (2022), section 2, for row-wise scales.

    Example:
        >>> import torch, memkernels as mk
        >>> (key, key_scale), (value, value_scale) = mk.quantize_rows(torch.eye(2) * 40), mk.quantize_rows(torch.tensor([[5.0], [7.0]]))
        >>> memory = [t[None, None] for t in (key, value, key_scale, value_scale)]
        >>> mk.quantized_attention(torch.tensor([[[[1.0, 0.0]]]]), *memory)
        tensor([[[[5.]]]])
    """
    if lengths_k is not None:
        lengths_k = as_index("quantized_attention", "lengths_k", lengths_k)
    signature = WIDE_SIGNATURE if getattr(query, "dtype", None) == torch.float64 else SIGNATURE
    dims = signature(query, key, value, key_scale, value_scale, lengths_k)
    if dims["NHk"] == 0 or dims["NH"] % dims["NHk"]:
        if dims["NH"] or dims["NHk"]:
            fail("quantized_attention", "key", f"a divisor of {dims['NH']} heads", f"shape {tuple(key.shape)}")
    scale = softmax_scale("quantized_attention", scale, dims["D"])
    if return_lse.__class__ is not bool:
        check_flag("quantized_attention", "return_lse", return_lse)
    if lengths_k is not None:
        lengths_k = key_lengths("quantized_attention", lengths_k, query, query.shape[:1], dims["K"])
    out, lse, _, _ = OP(query, key, value, key_scale, value_scale, lengths_k, scale)
    return (out, lse) if return_lse else out


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _allocate(query, key, value, key_scale, value_scale, lengths_k, scale):
    wide, rows = _wide(query.dtype), query.shape[:3]
    shape = (*rows, value.shape[3])
    return new_empty(query, shape), new_empty(query, rows, wide), new_empty(query, (*rows, 2), wide), new_empty(query, shape, wide)


def _products(query, key, value, *_):
    return attention_products(prod(query.shape[:3]) * key.shape[2], query.shape[3], value.shape[3], right="")


def _signature(scale):
    rows = ("B NHk K", scale)
    return Signature(
        "quantized_attention", query="B NH Q D", key=("B NHk K D", torch.int8), value=("B NHk K V", torch.int8), key_scale=rows,
        value_scale=rows, lengths_k=("B | None", torch.int64),
    )  # fmt: skip


SIGNATURE, WIDE_SIGNATURE = _signature(torch.float32), _signature(torch.float64)
# `stats`: of each query the maximum m of its scores and the sum of exp(score - m); `total` is `out` before it is rounded: backward needs
# dout . out to more digits than a bfloat16 has.
OP = define_op(
    "quantized_attention",
    inputs=(
        Arg("query"),
        Arg("key", differentiable=False),
        Arg("value", differentiable=False),
        Arg("key_scale", differentiable=False),
        Arg("value_scale", differentiable=False),
        Arg("lengths_k", differentiable=False, optional=True),
    ),
    outputs=(Out("out"), Out("lse"), Out("stats", differentiable=False, save=True), Out("total", differentiable=False, save=True)),
    options="float scale",
    allocate=_allocate,
    autocast="float32",
    products=_products,
)

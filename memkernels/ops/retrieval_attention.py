"""One softmax over the local context and over memories that each query has retrieved."""

from __future__ import annotations

from math import prod

import torch

from memkernels._checks import Signature, as_index, check_flag, fail
from memkernels._registry import Arg, Out, define_op, empty_like, new_empty
from memkernels.ops._attention import attention_products, softmax_scale, window_limits
from memkernels.ops._index import check_index


def retrieval_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    memory_key: torch.Tensor,
    memory_value: torch.Tensor,
    index: torch.Tensor,
    *,
    is_causal: bool = True,
    scale: float | None = None,
    memory_bias: torch.Tensor | None = None,
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the local context and, jointly, over the k rows of a memory that each query has retrieved.

    Formula:
        ``s[q, j] = scale * query[q] . key[j]`` for the keys that q sees, ``r[q, i] = scale * query[q] . memory_key[index[q, i]] +
        memory_bias[q, i]`` for its memories; ``lse[q] = log(sum_j exp(s[q, j]) + sum_i exp(r[q, i]))``,
        ``out[q] = sum_j exp(s[q, j] - lse[q]) * value[j] + sum_i exp(r[q, i] - lse[q]) * memory_value[index[q, i]]``

    Args:
        query: "B NH Q D", float64, float32, bfloat16 or float16, any strides.
        key: "B NHk K D", same dtype and device. NHk divides NH; query head h uses key head h // (NH // NHk), of the memory too.
        value: "B NHk K V", same dtype and device; V may differ from D.
        memory_key: "B NHk N D", same dtype and device; any strides, so that a memory expanded over the batch is not copied.
        memory_value: "B NHk N V", same dtype and device.
        index: "B NH Q k", int64 or int32: rows of the memory, in 0 .. N - 1, or -1 = absent (weight exactly 0). A row named twice
            counts twice.
        is_causal: query i sees the keys 0 to i only. The memories are not masked.
        scale: factor of the scores, default 1 / sqrt(D).
        memory_bias: "B NH Q k", same dtype and device: added to the scores of the memories; -inf = absent.
        window: (left, right): a query sees the local keys from left before to right after its own place; None or -1 = no limit.
        return_lse: also return the log-sum-exp.

    Returns:
        out: "B NH Q V", same dtype, contiguous; 0 where a query has neither keys nor memories. With ``return_lse``: (out, lse "B NH Q"),
        lse float32 (float64 for float64), natural logarithm, -inf where a query has nothing.

    Gradients:
        To all floating arguments, also through ``lse``, of any order. A row of the memory that nobody retrieved gets 0. A memory that needs
        no gradient costs nothing in backward.

    Numerics:
        Sums and softmax in float32 (float64 for float64), see `attention`. The retrieved rows are never copied: memory beyond inputs and
        outputs is O(Q k). Deterministic, also for rows that many queries retrieved; batch entries do not depend on each other.

    Raises:
        ValueError: a size does not fit, a scale that is not finite, NHk does not divide NH, a negative window.
        TypeError: a dtype or device differs, or a flag is not True or False.
        IndexError: an index outside -1 .. N - 1, on a CPU. On a GPU, where looking would wait for the device, such a memory is absent.

    Source:
        Wu et al., Memorizing Transformers (2022), section 3.1, with one softmax instead of the gate, as in Tworkowski et al. (2023).

    Example:
        >>> import torch, memkernels as mk
        >>> query = key = torch.zeros(1, 1, 1, 2)
        >>> memory = torch.tensor([[[[9.0, 0.0], [0.0, 9.0]]]])
        >>> mk.retrieval_attention(query, key, key + 1, memory, memory, torch.tensor([[[[1, -1]]]]))
        tensor([[[[0.5000, 5.0000]]]])
    """
    index = as_index(NAME, "index", index)
    dims = SIGNATURE(query, key, value, memory_key, memory_value, index, memory_bias)
    if dims["NH"] % dims["NHk"] if dims["NHk"] else dims["NH"]:
        fail(NAME, "key", f"a head count that divides the query's {dims['NH']}", f"shape {tuple(key.shape)}")
    for name, flag in (("is_causal", is_causal), ("return_lse", return_lse)):
        if flag.__class__ is not bool:
            check_flag(NAME, name, flag)
    scale = softmax_scale(NAME, scale, dims["D"])
    left, right = window_limits(NAME, window)
    check_index(NAME, index, dims["N"], "N")
    out, lse, _ = OP(query, key, value, memory_key, memory_value, index, memory_bias, scale, left, 0 if is_causal else right)
    return (out, lse) if return_lse else out


def _allocate(query, key, value, memory_key, memory_value, index, memory_bias, scale, left, right):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, queries, width = query.shape
    out = empty_like(query) if width == value.shape[3] else new_empty(query, (batch, heads, queries, value.shape[3]))
    return out, new_empty(query, (batch, heads, queries), wide), new_empty(query, (batch, heads, queries, 2), wide)


def _products(query, key, value, memory_key, memory_value, index, *_):
    pairs = prod(query.shape[:3]) * (key.shape[2] + index.shape[3])
    return attention_products(pairs, query.shape[3], value.shape[3])


NAME = "retrieval_attention"
# `stats`, as in attention: of each query the maximum m of its scores, local and retrieved, and the sum of exp(score - m).
SIGNATURE = Signature(
    NAME,
    query="B NH Q D", key="B NHk K D", value="B NHk K V", memory_key="B NHk N D", memory_value="B NHk N V",
    index=("B NH Q k", torch.int64), memory_bias="B NH Q k | None",
)  # fmt: skip
OP = define_op(
    NAME,
    inputs=(
        *(Arg(name) for name in ("query", "key", "value", "memory_key", "memory_value")),
        Arg("index", differentiable=False),
        Arg("memory_bias", optional=True),
    ),
    outputs=(Out("out", save=True), Out("lse"), Out("stats", differentiable=False, save=True)),
    options="float scale, SymInt left, SymInt right",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

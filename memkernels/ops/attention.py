"""Softmax attention: torch's scaled_dot_product_attention, and what it lacks (windows, sinks, log-sum-exp, mask gradients, any sizes)."""

from __future__ import annotations

from math import prod

import torch

from memkernels._checks import Signature, check_choice, check_dense, check_flag, check_number, check_tensor, fail
from memkernels._registry import Arg, Out, define_op, empty_like, new_empty
from memkernels.ops._attention import attention_products, key_lengths, softmax_scale, window_limits

CORNERS = ("top-left", "bottom-right")


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str = "top-left",
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    lengths_k: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention; the first eight arguments are those of ``torch.nn.functional.scaled_dot_product_attention``.

    Formula:
        ``s[q, k] = cap(scale * query[q] . key[k]) + attn_mask[q, k]``, ``lse[q] = log(exp(sink) + sum_k exp(s[q, k]))``,
        ``out[q] = sum_k dropout(exp(s[q, k] - lse[q])) * value[k]``, all sums over the keys that q may see;
        ``cap(s) = softcap * tanh(s / softcap)``, or s without ``softcap``; exp(sink) is 0 without ``sink``.

    Args:
        query: "B NH Q D", float64, float32, bfloat16 or float16, any strides. Any number of leading dimensions, or "NH Q D", or "Q D".
        key: "B NHk K D", same dtype and device; leading dimensions broadcast with those of the query.
        value: "B NHk K V", same dtype and device; V may differ from D.
        attn_mask: broadcastable to "B NH Q K". bool: True = may be seen. Floating: added to the scores, differentiable; -inf = not seen.
            Or a CausalBias of torch.nn.attention.bias, which says `is_causal` and `causal`.
        dropout_p: probability, 0 to 1, with which a weight is dropped; the others are scaled by 1 / (1 - dropout_p).
        is_causal: query i sees keys 0 to i only. May be combined with a mask (a key must be allowed by both).
        scale: factor of the scores, default 1 / sqrt(D).
        enable_gqa: NHk may divide NH; query head h then reads key head h // (NH // NHk).
        causal: where the diagonal of ``is_causal`` and ``window`` lies if Q != K: query i stands at key i ("top-left", as in torch) or at
            key i + K - Q ("bottom-right": the last query at the last key; with ``lengths_k``, at key lengths_k[b] - 1).
        window: (left, right): a query sees the keys from left before to right after where it stands; None or -1 = no limit on that side.
        softcap: > 0: scores are bounded to -softcap .. softcap by a tanh before the mask is added.
        sink: "NH", floating: one more score in the softmax of every row of a head, with a value of 0, so that a row may attend to nothing.
        lengths_k: int64 or int32 with the query's dimensions before its heads ("B"), 0 to K: keys at and past lengths_k[b] are not seen,
            hold they NaN, and cost nothing.
        return_lse: also return the log-sum-exp.

    Returns:
        out: "B NH Q V" with the query's leading dimensions, same dtype, contiguous; 0 where a query sees no key. With ``return_lse``:
        (out, lse "B NH Q"), lse float32 (float64 for float64), natural logarithm, -inf (or the sink) where a query sees no key.

    Gradients:
        To ``query``, ``key``, ``value``, ``sink`` and a floating ``attn_mask`` (in the mask's own shape), also through ``lse``, of any
        order. Finite where a query sees no key. What a key or a value that a query does not see holds (NaN too) does not reach that query.

    Numerics:
        Sums and softmax in float32 (float64 for float64); where bfloat16 matrix instructions are used, weights are rounded to bfloat16
        before they meet the values. Memory beyond inputs and outputs is O(Q): weights are recomputed in backward. Deterministic; batch
        entries do not depend on each other. Dropout is a hash of (seed, head, q, k), the same in every backend; the seeds, one a batch
        entry, come from torch's generator.

    Raises:
        ValueError: a size does not fit, a scale that is not finite, a head count without ``enable_gqa``, dropout_p outside 0..1, an
            unknown corner, a negative window,
            a softcap that is not above 0, a length outside 0..K (CPU only: on a GPU lengths are clamped, to avoid a sync).
        TypeError: a dtype differs, is not a floating one, the mask is neither bool nor floating, or a flag is not True or False.

    Source:
        Vaswani et al., Attention Is All You Need (2017), equation 1; Dao et al., FlashAttention (2022), algorithms 1 and 4, for the tiling;
        softcap: Gemma 2 (2024), section 2; sink: Xiao et al., Efficient Streaming Language Models with Attention Sinks (2023).

    Example:
        >>> import torch, memkernels as mk
        >>> query, key = torch.tensor([[8.0, 0.0]]), torch.tensor([[8.0, 0.0], [0.0, 8.0]])
        >>> mk.attention(query, key, torch.tensor([[5.0], [7.0]]), is_causal=True)
        tensor([[5.]])
    """
    dims = SIGNATURE.known(query, key, value)
    if dims is not None:
        shape = query.shape
    else:
        query, key, value, shape = _four_dims(query, key, value)
        dims = SIGNATURE(query, key, value)
    if causal not in CORNERS:
        check_choice("attention", "causal", causal, CORNERS)
    if enable_gqa.__class__ is not bool:
        check_flag("attention", "enable_gqa", enable_gqa)
    if dims["NH"] != dims["NHk"]:
        query, key, value, shape = _heads(query, key, value, shape, enable_gqa)
    if dropout_p.__class__ is not float or dropout_p != 0.0:
        dropout_p = _dropout(dropout_p)
    scale = softmax_scale("attention", scale, dims["D"])
    if is_causal.__class__ is not bool:
        check_flag("attention", "is_causal", is_causal)
    if return_lse.__class__ is not bool:
        check_flag("attention", "return_lse", return_lse)
    if attn_mask is not None and hasattr(attn_mask, "variant"):
        causal = _causal_bias(attn_mask, (dims["Q"], dims["K"]), is_causal, window, lengths_k)
        attn_mask, is_causal = None, True
    if attn_mask is not None:
        attn_mask = _mask(attn_mask, query, (*shape[:-1], dims["K"]))
    left, right = window_limits("attention", window)
    softcap = 0.0 if softcap is None else _softcap(softcap)
    if sink is not None:
        sink = _sink(sink, query)
    if lengths_k is not None:
        lengths_k = key_lengths("attention", lengths_k, query, shape[:-3], dims["K"])
    seed = torch.randint(2**63 - 1, (dims["B"],), device=query.device) if dropout_p else None
    right = 0 if is_causal else right
    out, lse, _ = OP(query, key, value, attn_mask, sink, lengths_k, seed, scale, softcap, dropout_p, left, right, causal)
    if len(shape) != 4:
        out, lse = out.reshape(*shape[:-1], dims["V"]), lse.reshape(shape[:-1])
    return (out, lse) if return_lse else out


def _four_dims(query, key, value):
    """Broadcasts the leading dimensions and folds them to one batch; also returns the shape that the outputs' leading sizes come from."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor("attention", name, tensor)
        check_dense("attention", name, tensor)
        if tensor.dim() < 2:
            fail("attention", name, "at least 2 dimensions", f"shape {tuple(tensor.shape)}")
    rank = max(query.dim(), key.dim(), value.dim())
    if rank == 4 == query.dim() and query.shape[0] == key.shape[0] and key.shape[:2] == value.shape[:2]:
        return query, key, value, query.shape
    try:
        lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        got = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        fail("attention", "query, key, value", "leading dimensions that broadcast", got)
    shared = max(key.shape[-3] if key.dim() > 2 else 1, value.shape[-3] if value.dim() > 2 else 1)

    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() > 2 and tensor.shape[-3] not in (1, shared):
            fail("attention", name, f"NHk={shared} heads, as the other has", f"shape {tuple(tensor.shape)}")

    def fold(tensor, heads):
        heads = (tensor.shape[-3] if tensor.dim() > 2 else 1) if heads is None else heads
        return tensor.expand(*lead, heads, *tensor.shape[-2:]).reshape(lead.numel(), heads, *tensor.shape[-2:])

    folded = fold(query, None)
    return folded, fold(key, shared), fold(value, shared), (*lead, folded.shape[1], *folded.shape[2:])[-rank:]


def _heads(query, key, value, shape, enable_gqa):
    """Head counts differ: grouped queries, or one head broadcast over the other side's."""
    heads, key_heads = query.shape[1], key.shape[1]
    if heads == 1 and key_heads > 1 and not enable_gqa:
        return query.expand(-1, key_heads, -1, -1), key, value, (*shape[:-3], key_heads, *shape[-2:])
    if key_heads == 0 or heads % key_heads or (key_heads > 1 and not enable_gqa):
        expected = f"a divisor of {heads} heads" if enable_gqa else f"{heads} heads (enable_gqa=True allows a divisor)"
        fail("attention", "key", expected, f"shape {tuple(key.shape)}")
    return query, key, value, shape


def _causal_bias(bias, sizes, is_causal, window, lengths_k):
    """The `causal` that a CausalBias stands for, a tensor that describes a mask and holds no values (not even zeros)."""
    if is_causal or window is not None or lengths_k is not None:
        fail("attention", "attn_mask", "a mask of values with is_causal, window or lengths_k", type(bias).__name__)
    if (bias.seq_len_q, bias.seq_len_kv) != sizes:
        fail("attention", "attn_mask", f"a {type(bias).__name__} of {sizes}", (bias.seq_len_q, bias.seq_len_kv))
    return CORNERS[0] if bias.variant.name == "UPPER_LEFT" else CORNERS[1]


def _mask(mask, query, shape):
    """The mask with four dimensions, size 1 where it broadcasts; its batch divides B, row b of B using row b // (B // batch)."""
    check_tensor("attention", "attn_mask", mask)
    check_dense("attention", "attn_mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        fail("attention", "attn_mask", "bool or floating", str(mask.dtype).removeprefix("torch."), TypeError)
    if mask.device != query.device:
        fail("attention", "attn_mask", f"device {query.device}", f"device {mask.device}")
    if mask.dim() > len(shape) or any(size not in (1, full) for size, full in zip(mask.shape[::-1], shape[::-1], strict=False)):
        fail("attention", "attn_mask", f"a shape that broadcasts to {tuple(shape)}", f"shape {tuple(mask.shape)}")
    if mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    if mask.dim() == 4 and query.dim() == 4 and len(shape) == 4:
        return mask
    mask = mask.reshape(*(1,) * (max(len(shape), 4) - mask.dim()), *mask.shape)
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*shape[:-3], *mask.shape[-3:]).reshape(query.shape[0], *mask.shape[-3:])


def _dropout(dropout_p):
    dropout_p = check_number("attention", "dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        fail("attention", "dropout_p", "a probability", dropout_p)
    return float(dropout_p)


def _softcap(softcap):
    softcap = check_number("attention", "softcap", softcap)
    if not 0.0 < softcap < float("inf"):
        fail("attention", "softcap", "a finite number above 0, or None", softcap)
    return softcap


def _sink(sink, query):
    check_tensor("attention", "sink", sink)
    check_dense("attention", "sink", sink)
    if not sink.is_floating_point():
        fail("attention", "sink", "a floating dtype", str(sink.dtype).removeprefix("torch."), TypeError)
    if sink.device != query.device:
        fail("attention", "sink", f"device {query.device}", f"device {sink.device}")
    if sink.shape != (query.shape[1],):
        fail("attention", "sink", f"[NH] with NH={query.shape[1]}", f"shape {tuple(sink.shape)}")
    return sink if sink.dtype == query.dtype else sink.to(query.dtype)


def _allocate(query, key, value, attn_mask, sink, lengths_k, seed, scale, softcap, dropout_p, left, right, causal):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, queries, width = query.shape
    out = empty_like(query) if width == value.shape[3] else new_empty(query, (batch, heads, queries, value.shape[3]))
    return out, new_empty(query, (batch, heads, queries), wide), new_empty(query, (batch, heads, queries, 2), wide)


def _products(query, key, value, *_):
    return attention_products(prod(query.shape[:3]) * key.shape[2], query.shape[3], value.shape[3])


# `stats`: of each query the maximum m of its scores and the sum of exp(score - m). A rounded log-sum-exp cannot stand for the two: at a
# score of -1e9 it has no digits left for the sum.
SIGNATURE = Signature("attention", query="B NH Q D", key="B NHk K D", value="B NHk K V")
OP = define_op(
    "attention",
    inputs=(
        Arg("query"),
        Arg("key"),
        Arg("value"),
        Arg("attn_mask", optional=True),
        Arg("sink", optional=True, batch=None),
        Arg("lengths_k", differentiable=False, optional=True),
        Arg("seed", differentiable=False, optional=True),
    ),
    outputs=(Out("out", save=True), Out("lse"), Out("stats", differentiable=False, save=True)),
    options="float scale, float softcap, float dropout_p, SymInt left, SymInt right, str causal",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

"""Read the k best rows of a memory, found exactly and without a matrix of scores."""

from __future__ import annotations

import torch

from memkernels._checks import Signature, check_choice, check_finite, fail
from memkernels._registry import Arg, Out, Product, define_op, new_empty
from memkernels.ops.content_read import SIMILARITIES

MOST = 4096  # slots


def topk_read(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k: int,
    *,
    similarity: str = "dot",
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read the k rows of a memory that are most similar to each query: exact, and no "Q N" matrix of scores exists.

    Formula:
        ``index[q] = the k rows n of the largest s[q, n], best first, ties to the lowest n``,
        ``weights[q] = softmax_i(scale * s[q, index[q, i]])``, ``read[q] = sum_i weights[q, i] * value[index[q, i]]``, where s is

        - ``"dot"``: ``q . k``
        - ``"cosine"``: ``q . k / (sqrt(|q|^2 + 1e-6) * sqrt(|k|^2 + 1e-6))``
        - ``"l2"``: ``-|q - k|^2``

    Args:
        query: "B Q D", float64, float32, bfloat16 or float16, any strides.
        key: "B N D", or "N D" for one memory that the whole batch reads; same dtype and device; any strides.
        value: "B N V" or "N V", same dtype and device.
        k: rows that each query reads, 1 to 4096; may be more than there are.
        similarity: "dot", "cosine" or "l2".
        scale: factor of the scores in the softmax (the choice of the rows does not depend on it); default 1 / sqrt(D) for "dot", else 1.
        mask: bool "B N"; True = the row takes part. A row that does not is never chosen, and what it holds (NaN too) reaches nothing.

    Returns:
        (read "B Q V", weights "B Q k", index int64 "B Q k"), contiguous. Where there are fewer than k rows, the last slots have weight 0
        and index -1; a query without any row reads 0. A row whose score is -inf counts as not there, one whose score is NaN as the best.

    Gradients:
        To ``query``, ``key`` and ``value``, through ``read`` and ``weights``, of any order; the choice itself is constant. Rows that nobody
        chose get 0. A memory that needs no gradient costs nothing in backward.

    Numerics:
        Scores, softmax and sums are float32 (float64 for float64): a bfloat16 or float16 element is widened exactly, products are summed in
        float32, and the rows are the k best of those float32 scores, ties among them by index. Equal rows have equal scores.
        Memory beyond inputs and outputs is O(B Q k). Deterministic; the result depends neither on the number of threads nor on the batch.

    Raises:
        ValueError: a size does not fit, an unknown similarity, k outside 1 .. 4096, a scale that is not finite.
        TypeError: a dtype or device differs, k is not an integer, or the mask is not bool.

    Source:
        Rae et al., Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes (2016), section 3.1; Wu et al., Memorizing
        Transformers (2022), section 3.1.

    Example:
        >>> import torch, memkernels as mk
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
        >>> value = torch.tensor([[5.0], [6.0], [7.0]])
        >>> read, weights, index = mk.topk_read(torch.tensor([[[1.0, 0.0]]]), key, value, 2, scale=10.0)
        >>> index, read
        (tensor([[[2, 0]]]), tensor([[[7.]]]))
    """
    shared = getattr(key, "ndim", 3) == 2, getattr(value, "ndim", 3) == 2
    dims = SIGNATURES[shared](query, key, value, mask)
    if similarity not in SIMILARITIES:
        check_choice(NAME, "similarity", similarity, SIMILARITIES)
    check_slots(NAME, k)
    if scale is None:
        scale = dims["D"] ** -0.5 if similarity == "dot" and dims["D"] else 1.0
    options = k, similarity, float(check_finite(NAME, "scale", scale)), dims["Q"]
    batch = query.shape[0]
    if shared == (True, True) and mask is None:  # the queries of all entries go over the memory together
        found = OP(query.reshape(1, batch * dims["Q"], query.shape[2]), key[None], value[None], None, *options)
        return tuple(t.view(batch, dims["Q"], t.shape[2]) for t in found)  # type: ignore[return-value]
    if shared[0]:
        key = key.expand(batch, -1, -1)
    if shared[1]:
        value = value.expand(batch, -1, -1)
    read, weights, index = OP(query, key, value, mask, *options)
    return read, weights, index


def check_slots(op: str, k: int) -> None:
    """k is an integer in 1 .. MOST."""
    if not isinstance(k, (int, torch.SymInt)) or isinstance(k, bool):
        fail(op, "k", "an integer", type(k).__name__, TypeError)
    if not 1 <= k <= MOST:
        fail(op, "k", f"1 to {MOST}", k)


def _allocate(query, key, value, mask, k, similarity, scale, few):
    batch, queries, _ = query.shape
    slots = (batch, queries, k)
    return new_empty(query, (batch, queries, value.shape[2])), new_empty(query, slots), new_empty(query, slots, torch.int64)


def _products(query, key, value, mask, k, similarity, scale, few):
    batch, queries, width = query.shape
    slots, chosen = batch * queries * k, batch * queries * torch.sym_min(k, key.shape[-2])
    scores = Product(query.numel() * key.shape[-2], "query", "key", gradient=chosen * width)
    return scores, Product(slots * value.shape[-1], "query key", "value")


NAME = "topk_read"
# By whether key and value are shared by the batch.
SIGNATURES = {
    shared: Signature(
        NAME, query="B Q D", key="N D" if shared[0] else "B N D", value="N V" if shared[1] else "B N V", mask=("B N | None", torch.bool)
    )
    for shared in ((False, False), (False, True), (True, False), (True, True))
}
# `few`: queries of one batch entry of the caller, by which kernels choose how they sum: folding the batch must change no bit.
OP = define_op(
    NAME,
    inputs=(Arg("query"), Arg("key"), Arg("value"), Arg("mask", differentiable=False, optional=True)),
    outputs=(Out("read"), Out("weights"), Out("index", differentiable=False, save=True)),
    options="SymInt k, str similarity, float scale, SymInt few",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

"""The k best of S * S product keys, by two searches among S."""

from __future__ import annotations

import torch

from memkernels._checks import Signature
from memkernels._registry import Arg, Out, Product, define_op, new_empty
from memkernels.ops.topk_read import check_slots


def product_key_search(query: torch.Tensor, subkeys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of S * S keys that are pairs of subkeys, for each head: two products, two top-k, sums and the last top-k in one.

    Formula:
        ``s_p[n] = query[b, h, p] . subkeys[h, p, n]`` for the halves p = 0, 1; the score of key ``i1 * S + i2`` is ``s_0[i1] + s_1[i2]``,
        and the k largest are returned, best first, ties to the lowest index

    Args:
        query: "B NH 2 D", float64, float32, bfloat16 or float16, any strides: the two halves of the query of each head.
        subkeys: "NH 2 S D", same dtype and device; any strides.
        k: 1 to 4096; may be more than S * S.

    Returns:
        (scores "B NH k", index int64 "B NH k"), contiguous; score -inf and index -1 where there are no more keys.

    Gradients:
        To ``query`` and ``subkeys`` through the scores, of any order; the choice itself is constant. Subkeys that nobody chose get 0.

    Numerics:
        Products and sums in float32 (float64 for float64); scores are rounded once, after the choice. Only pairs of the a-th and b-th
        best subkeys with a * b <= k compete: as many others are at least as good as any further one; where one of those rounds to the k-th
        score, the lowest of all indices of that score are kept. Memory beyond inputs and outputs does
        not grow with S * S or B * S. Deterministic; the result depends neither on the number of threads nor on the batch.

    Raises:
        ValueError: a size does not fit, k outside 1 .. 4096. TypeError: a dtype or device differs, or k is not an integer.

    Source:
        Lample et al., Large Memory Layers with Product Keys (2019), section 3.1.

    Example:
        >>> import torch, memkernels as mk
        >>> subkeys = torch.tensor([[[[1.0], [2.0]], [[5.0], [3.0]]]])
        >>> mk.product_key_search(torch.ones(1, 1, 2, 1), subkeys, 3)
        (tensor([[[7., 6., 5.]]]), tensor([[[2, 0, 3]]]))
    """
    SIGNATURE(query, subkeys)
    check_slots(NAME, k)
    scores, index = OP(query, subkeys, k)
    return scores, index


def _allocate(query, subkeys, k):
    slots = (query.shape[0], query.shape[1], k)
    return new_empty(query, slots), new_empty(query, slots, torch.int64)


def _products(query, subkeys, k):
    batch, heads, _, width = query.shape
    chosen = 2 * batch * heads * torch.sym_min(k, subkeys.shape[2]) * width  # each slot chose a subkey of either half
    return (Product(query.numel() * subkeys.shape[2], "query", "subkeys", gradient=chosen),)


NAME = "product_key_search"
SIGNATURE = Signature(NAME, query="B NH 2 D", subkeys="NH 2 S D")
# Heads do not depend on each other and all tensors have them: a dimension of vmap becomes more of them.
OP = define_op(
    NAME,
    inputs=(Arg("query", batch=1), Arg("subkeys")),
    outputs=(Out("scores", batch=1), Out("index", differentiable=False, save=True, batch=1)),
    options="SymInt k",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

"""Softmax attention to keys and values that lie in pages of a shared pool: decoding with a paged cache."""

from __future__ import annotations

import torch

from memkernels import _compat
from memkernels._checks import Signature, as_index, check_flag, fail
from memkernels._compat import values_known
from memkernels._registry import Arg, Out, define_op, empty_like, new_empty
from memkernels.ops._attention import attention_products, softmax_scale


def paged_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each row of the batch to its own keys, which lie in pages that rows may share.

    Formula:
        Key j of row b is ``key_pages[page_table[b, j // S], j % S]`` for j < lengths[b], its value likewise;
        ``s[q, j] = scale * query[q] . key[j]``, ``lse[q] = log sum_j exp(s[q, j])``, ``out[q] = sum_j exp(s[q, j] - lse[q]) * value[j]``.

    Args:
        query: "B NH Q D", float64, float32, bfloat16 or float16, any strides.
        key_pages: "P S NHk D", same dtype and device: P pages of S slots. NHk divides NH: query head h reads key head h // (NH // NHk).
        value_pages: "P S NHk V"; V may differ from D.
        page_table: int64 or int32 "B M": the pages of each row, in order. Entries behind its last page are not looked at.
        lengths: int64 or int32 "B": how many keys each row has, 0 to M S.
        scale: factor of the scores, default 1 / sqrt(D).
        is_causal: the last query of row b stands at its last key, the one before it at the key before, and so on; none sees further.
        return_lse: also return the log-sum-exp.

    Returns:
        out: "B NH Q V", dtype of the query, contiguous; 0 where a query sees no key. With ``return_lse``: (out, lse "B NH Q"), lse
        float32 (float64 for float64), natural logarithm, -inf where a query sees no key.

    Gradients:
        To ``query``, ``key_pages`` and ``value_pages``, also through ``lse``, of any order. Where rows share a page its gradients are added
        in the order of the rows. Slots that no row uses get 0, and what they hold (NaN too) reaches nothing.

    Numerics:
        Sums and softmax in float32 (float64 for float64). Keys are split into runs of a fixed length, joined in order: a row's result
        depends on neither the batch nor the number of threads. Deterministic. lengths and pages are checked where they lie on the CPU;
        those of a CUDA tensor are never waited for, and a page that does not exist is then one that is not seen.

    Raises:
        ValueError: a size does not fit, a scale that is not finite, or a length is not in 0..M S. IndexError: a used entry of page_table
            is no page.
        TypeError: a dtype differs or is not a floating one, or page_table or lengths are not int64 or int32.

    Source:
        Kwon et al., Efficient Memory Management for Large Language Model Serving with PagedAttention (2023).

    Example:
        >>> import torch, memkernels as mk
        >>> pages = torch.arange(6.0).reshape(3, 2, 1, 1)
        >>> table, lengths = torch.tensor([[2, 0], [1, -1]]), torch.tensor([3, 1])
        >>> mk.paged_attention(torch.zeros(2, 1, 1, 1), pages, pages, table, lengths).flatten()
        tensor([3., 2.])
    """
    page_table, lengths = as_index(NAME, "page_table", page_table), as_index(NAME, "lengths", lengths)
    dims = SIGNATURE(query, key_pages, value_pages, page_table, lengths)
    heads, key_heads = dims["NH"], dims["NHk"]
    if heads % key_heads if key_heads else heads:
        fail(NAME, "key_pages", f"a divisor of {heads} heads", f"shape {tuple(key_pages.shape)}")
    _check_values(page_table, lengths, dims)
    if not (is_causal.__class__ is return_lse.__class__ is bool):
        check_flag(NAME, "is_causal", is_causal)
        check_flag(NAME, "return_lse", return_lse)
    scale = softmax_scale(NAME, scale, dims["D"])
    out, lse, _ = OP(query, key_pages, value_pages, page_table, lengths, scale, is_causal)
    return (out, lse) if return_lse else out


def _check_values(page_table, lengths, dims):
    """Reads them only where that is free: on a CPU, outside of transforms and tracing; the C++ kernel looks in any case."""
    if torch.compiler.is_compiling():
        return
    most, size, pages = dims["M"] * dims["S"], dims["S"], dims["P"]
    fit = _compat.integers_fit(lengths, 0, most, _compat.ANY)
    if fit is None or (fit and _compat.integers_fit(page_table, 0, pages - 1, _compat.ANY) is not False):
        return
    found = lengths.tolist()  # or an entry of the table is no page: does a length use it?
    if not fit:
        fail(NAME, "lengths", f"values in 0..M*S={most}", f"{min(found)}..{max(found)}")
    longest = -(-max(found) // size) if size else 0
    table = page_table if longest == dims["M"] else page_table[:, :longest]
    for b, (row, length) in enumerate(zip(table.tolist(), found, strict=True)):
        used = row[: -(-length // size)] if length else ()
        if used and (min(used) < 0 or max(used) >= pages):
            bad = min(used) if min(used) < 0 else max(used)
            fail(NAME, "page_table", f"pages in 0..{pages - 1}", f"{bad} in row {b}", IndexError)


def _allocate(query, key_pages, value_pages, page_table, lengths, scale, is_causal):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, queries, width = query.shape
    out = empty_like(query) if width == value_pages.shape[3] else new_empty(query, (batch, heads, queries, value_pages.shape[3]))
    return out, new_empty(query, (batch, heads, queries), wide), new_empty(query, (batch, heads, queries, 2), wide)


def _products(query, key_pages, value_pages, page_table, lengths, scale, is_causal):
    _, heads, queries, width = query.shape
    keys = int(lengths.sum()) if values_known(lengths) else page_table.numel() * key_pages.shape[1]
    return attention_products(heads * queries * keys, width, value_pages.shape[3])


NAME = "paged_attention"
SIGNATURE = Signature(
    NAME, query="B NH Q D", key_pages="P S NHk D", value_pages="P S NHk V", page_table=("B M", torch.int64),
    lengths=("B", torch.int64),
)  # fmt: skip
OP = define_op(
    NAME,
    inputs=(
        Arg("query"),
        Arg("key_pages", batch=None),
        Arg("value_pages", batch=None),
        Arg("page_table", differentiable=False),
        Arg("lengths", differentiable=False),
    ),
    outputs=(Out("out", save=True), Out("lse"), Out("stats", differentiable=False, save=True)),
    options="float scale, bool is_causal",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

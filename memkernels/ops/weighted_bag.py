"""Weighted sums of the rows of a table that an index names: how a product-key memory is read."""

from __future__ import annotations

from typing import Any

import torch

from memkernels._checks import Signature, as_index, check_flag
from memkernels._registry import Arg, Out, define_op, new_empty
from memkernels.ops._index import check_index


def weighted_bag(table: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, *, sparse: bool = False) -> torch.Tensor:
    """Weighted sum of the table rows that each bag names.

    Formula:
        ``out[b] = sum_j weight[b, j] * table[index[b, j]]`` over the j with ``index[b, j] != -1``

    Args:
        table: "K D", float64, float32, bfloat16 or float16, any strides.
        index: "B J", int64 or int32: rows of the table, in 0 .. K - 1, or -1 = absent. A row named twice counts twice.
        weight: "B J", same dtype and device as the table.
        sparse: the gradient of the table is a coalesced `torch.sparse_coo` tensor of the rows that were named, in rising order, instead
            of a dense one: for tables so large that writing all of a gradient costs more than the rest (and torch.optim.SparseAdam).

    Returns:
        out: "B D", same dtype, contiguous; 0 for a bag without rows.

    Gradients:
        To ``table`` and ``weight``, of any order. A row that nobody names gets 0, an absent place of ``weight`` too.

    Numerics:
        Sums in float32 (float64 for float64), rounded once. In backward the places are sorted by row, and each row adds up what it is
        given in the order of the places: no atomics, the same bits in every run and with any number of threads. An absent row is
        never read and its weight neither: NaN there reaches nothing. The rows are not copied; memory beyond inputs and outputs is
        O(B J) integers. With ``sparse``, nothing of the size of the table is allocated; that call learns the number of rows from
        the values (on a GPU it waits for the device, torch.compile breaks its graph there) and torch.func transforms refuse it.

    Raises:
        ValueError: a size does not fit. TypeError: a dtype or device differs, or ``sparse`` is not True or False.
        IndexError: an index outside -1 .. K - 1, on a CPU. On a GPU, where looking would wait for the device, such a place is absent.

    Source:
        Lample et al., Large Memory Layers with Product Keys (2019), equation 4.

    Example:
        >>> import torch, memkernels as mk
        >>> mk.weighted_bag(torch.tensor([[1.0], [10.0]]), torch.tensor([[1, 1, 0], [-1, 0, -1]]), torch.full((2, 3), 0.5))
        tensor([[10.5000],
                [ 0.5000]])
    """
    index = as_index(NAME, "index", index)
    dims = SIGNATURE(table, index, weight)
    if sparse.__class__ is not bool:
        check_flag(NAME, "sparse", sparse)
    check_index(NAME, index, dims["K"], "K")
    if sparse and torch.is_grad_enabled() and table.requires_grad:
        return _SparseTable.apply(table, index, weight)
    (out,) = OP(table, index, weight)
    return out


class _SparseTable(torch.autograd.Function):
    """The op with a sparse gradient of the table, which the torch op, whose outputs are dense, cannot return.

    That gradient is the dense one of a table of the named rows alone, so the same kernels make it.
    """

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(table, index, weight)
        (out,) = OP(table, index, weight)
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        table, index, weight = ctx.saved_tensors
        dtable = dweight = None
        if ctx.needs_input_grad[0]:
            rows, place = torch.unique(index, return_inverse=True)
            absent = int(rows.numel() > 0 and bool(rows[0] < 0))
            compact = table.new_zeros(1, table.shape[1]).expand(rows.shape[0] - absent, -1)  # its values do not matter
            (values,) = _gradients(dout, (compact, place - absent, weight), 0)
            dtable = torch.sparse_coo_tensor(rows[absent:][None], values, table.shape, is_coalesced=True, check_invariants=False)
        if ctx.needs_input_grad[2]:
            (dweight,) = _gradients(dout, (table, index, weight), 2)
        return dtable, None, dweight


def _gradients(dout: torch.Tensor, inputs: tuple[torch.Tensor, ...], wanted: int) -> tuple[Any, ...]:
    """The gradient of one input; under create_graph with a graph of its own."""
    if not torch.is_grad_enabled():
        return (OP.gradients((dout,), inputs, (), (), [wanted == 0, wanted == 2])[wanted // 2],)
    given = [t if t.requires_grad or i != wanted else t.detach().requires_grad_() for i, t in enumerate(inputs)]
    return torch.autograd.grad(OP(*given)[0], given[wanted], dout, create_graph=True)


def _allocate(table, index, weight):
    return (new_empty(table, (index.shape[0], table.shape[1])),)


NAME = "weighted_bag"
SIGNATURE = Signature(NAME, table="K D", index=("B J", torch.int64), weight="B J")
OP = define_op(
    NAME,
    inputs=(Arg("table", batch=None), Arg("index", differentiable=False), Arg("weight")),
    outputs=(Out("out"),),
    allocate=_allocate,
    autocast="float32",
)

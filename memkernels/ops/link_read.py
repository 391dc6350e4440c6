"""Following the temporal links of a DNC, forwards and backwards."""

from __future__ import annotations

import torch

from memkernels._checks import Signature
from memkernels._registry import Arg, Out, Product, define_op, new_empty


def link_read(link: torch.Tensor, read_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What was written after and before the rows that were read, in one pass over the links.

    Formula:
        ``forward[b, r, h] = link[b, h] read_weights[b, r]``, ``backward[b, r, h] = link[b, h]^T read_weights[b, r]``

    Args:
        link: "B H N N", float64, float32, bfloat16 or float16; any strides.
        read_weights: "B R N", same dtype and device; any number of read heads R.

    Returns:
        forward "B R H N", backward "B R H N"; same dtype, contiguous.

    Gradients:
        To both arguments, of any order.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64; rounded once, at the end. Sums over rows are taken in runs of
        128 that are added in order. Deterministic; a batch row does not depend on the other rows.

    Raises:
        ValueError: a size differs from what another argument says.
        TypeError: a dtype or device differs or is not a floating one.

    Source:
        Graves et al., Hybrid computing using a neural network with dynamic external memory (2016), Methods, temporal memory linkage.

    Example:
        >>> import torch, memkernels as mk
        >>> link = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]])  # row 1 was written after row 0
        >>> mk.link_read(link, torch.tensor([[[1.0, 0.0]]]))
        (tensor([[[[0., 1.]]]]), tensor([[[[0., 0.]]]]))
    """
    SIGNATURE(link, read_weights)
    return OP(link, read_weights)  # type: ignore[return-value]


def _allocate(link, read_weights):
    batch, heads, rows, _ = link.shape
    shape = (batch, read_weights.shape[1], heads, rows)
    return new_empty(link, shape), new_empty(link, shape)


def _products(link, read_weights):
    return (Product(2 * read_weights.shape[1] * link.numel(), "link", "read_weights"),)


SIGNATURE = Signature("link_read", link="B H N N", read_weights="B R N")
OP = define_op(
    "link_read",
    inputs=(Arg("link"), Arg("read_weights")),
    outputs=(Out("forward"), Out("backward")),
    allocate=_allocate,
    autocast="float32",
    products=_products,
)

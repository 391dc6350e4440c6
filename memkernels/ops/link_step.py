"""The temporal links of a DNC: which row was written after which."""

from __future__ import annotations

import torch

from memkernels._checks import Signature
from memkernels._registry import Arg, Out, Product, define_op, empty_like, new_empty


def link_step(
    link: torch.Tensor, precedence: torch.Tensor, write_weights: torch.Tensor, read_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of the temporal links, updated and followed in one pass over them: `link_update`, then `link_read`.

    Formula:
        ``new_link[i, j] = (1 - w[i] - w[j]) * link[i, j] + w[i] * precedence[j]``, 0 where i = j;
        ``new_precedence = (1 - sum w) * precedence + w``; ``forward[r] = new_link q[r]``, ``backward[r] = new_link^T q[r]``,
        for every write head h with w = write_weights[b, h] and every read head with q = read_weights[b].

    Args:
        link: "B H N N", float64, float32, bfloat16 or float16; any strides. link[i, j]: how far row i was written after row j.
        precedence: "B H N", same dtype and device: how far each row was the one written last.
        write_weights: "B H N", same dtype and device; in [0, 1], sums to at most 1. Any number of write heads H.
        read_weights: "B R N", same dtype and device: the read weights of the step before; any number of read heads R.

    Returns:
        new_link "B H N N", new_precedence "B H N", forward "B R H N", backward "B R H N"; same dtype, contiguous. Arguments within their
        bounds leave rows and columns of the link with sums of at most 1.

    Gradients:
        To all four arguments, of any order. The diagonal of `link` is not looked at and gets 0.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64; each output is rounded once, so forward and backward are
        those of new_link before it is rounded. Deterministic; a batch row does not depend on the other rows.

    Raises:
        ValueError: a size differs from what another argument says.
        TypeError: a dtype or device differs or is not a floating one.

    Source:
        Graves et al., Hybrid computing using a neural network with dynamic external memory (2016), Methods, temporal memory linkage;
        several heads as in their code.

    Example:
        >>> import torch, memkernels as mk
        >>> first, second = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 1.0, 0.0]]])
        >>> link, last = mk.link_update(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3), first)
        >>> link, last, forward, backward = mk.link_step(link, last, second, first)
        >>> forward  # after the row written first comes the second one
        tensor([[[[0., 1., 0.]]]])
    """
    SIGNATURE(link, precedence, write_weights, read_weights)
    return OP(link, precedence, write_weights, read_weights)  # type: ignore[return-value]


def link_update(link: torch.Tensor, precedence: torch.Tensor, write_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The temporal links after a write. It is `link_step` with no read heads; reading too, `link_step` saves a pass over the matrix.

    Formula:
        ``new_link[i, j] = (1 - w[i] - w[j]) * link[i, j] + w[i] * precedence[j]``, 0 where i = j;
        ``new_precedence = (1 - sum w) * precedence + w`` with w = write_weights[b, h].

    Args:
        link: "B H N N". precedence: "B H N". write_weights: "B H N". As in `link_step`.

    Returns:
        new_link "B H N N" and new_precedence "B H N"; same dtype, contiguous.

    Gradients, numerics, errors, source: those of `link_step`, by whose name the errors go.

    Example:
        >>> import torch, memkernels as mk
        >>> link, last = mk.link_update(torch.zeros(1, 1, 2, 2), torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]))
        >>> link  # row 1 was written after row 0
        tensor([[[[0., 0.],
                  [1., 0.]]]])
    """
    nobody = write_weights[:, :0] if isinstance(write_weights, torch.Tensor) and write_weights.dim() == 3 else write_weights
    return link_step(link, precedence, write_weights, nobody)[:2]


def _allocate(link, precedence, write_weights, read_weights):
    batch, heads, rows = precedence.shape
    shape = (batch, read_weights.shape[1], heads, rows)
    return empty_like(link), empty_like(precedence), new_empty(link, shape), new_empty(link, shape)


def _products(link, precedence, write_weights, read_weights):
    return (Product(2 * read_weights.shape[1] * link.numel(), "link precedence write_weights", "read_weights"),)


SIGNATURE = Signature("link_step", link="B H N N", precedence="B H N", write_weights="B H N", read_weights="B R N")
OP = define_op(
    "link_step",
    inputs=(Arg("link"), Arg("precedence"), Arg("write_weights"), Arg("read_weights")),
    outputs=(Out("new_link"), Out("new_precedence"), Out("forward"), Out("backward")),
    allocate=_allocate,
    autocast="float32",
    products=_products,
)

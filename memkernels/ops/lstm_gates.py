"""`lstm_gates`: the pointwise half of an LSTM step."""

from __future__ import annotations

import torch

from memkernels._checks import Signature
from memkernels._registry import Arg, Out, define_op, empty_like


def lstm_gates(gates: torch.Tensor, cell: torch.Tensor, *, peephole: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns the pre-activations of the four gates and the old cell into the new hidden state and the new cell.

    With gates = [z_i, z_f, z_g, z_o] and c' the old cell::

        i = sigmoid(z_i + p_i * c')     f = sigmoid(z_f + p_f * c')     g = tanh(z_g)
        c = f * c' + i * g              o = sigmoid(z_o + p_o * c)      h = o * tanh(c)

    where p is zero without `peephole`.

    Args:
        gates: "B 4H", floating; pre-activations in the order i, f, g, o of torch.nn.LSTM, any finite value.
        cell: "B H", same dtype and device; the old cell c'.
        peephole: "3 H" or None, same dtype and device; rows p_i, p_f, p_o.

    Returns:
        (h "B H", c "B H").

    Gradients:
        To gates, cell and peephole, of any order. Backward keeps the inputs alone (h and c may be changed in place) and computes
        activations again.

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. Rows are independent of B, bit for bit.

    Raises:
        ValueError: on a shape that does not fit. TypeError: on dtypes that differ or are not floating.

    Source:
        Hochreiter and Schmidhuber 1997; peepholes: Gers, Schraudolph and Schmidhuber 2002, section 3.

    Example:
        >>> import torch
        >>> import memkernels as mk
        >>> h, c = mk.lstm_gates(torch.zeros(1, 8), torch.ones(1, 2))
        >>> c
        tensor([[0.5000, 0.5000]])
    """
    SIGNATURE(gates, cell, peephole)
    h, c = OP(gates, cell, peephole)
    return h, c


def _allocate(gates, cell, peephole):
    return empty_like(cell), empty_like(cell)


SIGNATURE = Signature("lstm_gates", gates="B 4H", cell="B H", peephole="3 H | None")
OP = define_op(
    "lstm_gates",
    inputs=(Arg("gates"), Arg("cell"), Arg("peephole", optional=True, batch=None)),
    outputs=(Out("h"), Out("c")),
    allocate=_allocate,
    autocast="float32",
)

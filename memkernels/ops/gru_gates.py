"""`gru_gates`: the pointwise half of a GRU step."""

from __future__ import annotations

import torch

from memkernels._checks import Signature
from memkernels._registry import Arg, Out, define_op, empty_like


def gru_gates(gates_input: torch.Tensor, gates_hidden: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Turns the two pre-activations of the three gates and the old hidden state into the new hidden state.

    With gates_input = [x_r, x_z, x_n] (from the input), gates_hidden = [h_r, h_z, h_n] (from the old hidden state h')::

        r = sigmoid(x_r + h_r)    z = sigmoid(x_z + h_z)    n = tanh(x_n + r * h_n)    h = n + z * (h' - n)

    Args:
        gates_input: "B 3H", floating; in the order r, z, n of torch.nn.GRU, any finite value.
        gates_hidden: "B 3H", same dtype and device; apart from gates_input, because r gates h_n alone.
        hidden: "B H", same dtype and device; the old hidden state h'.

    Returns:
        h "B H".

    Gradients:
        To all three, of any order. Backward keeps the inputs alone (h may be changed in place) and computes activations again.

    Numerics:
        float16 and bfloat16 are computed in float32 and rounded once. Rows are independent of B, bit for bit.

    Raises:
        ValueError: on a shape that does not fit. TypeError: on dtypes that differ or are not floating.

    Source:
        Cho et al. 2014, in the form of torch.nn.GRU (the reset gate acts after the product with the recurrent weights).

    Example:
        >>> import torch
        >>> import memkernels as mk
        >>> mk.gru_gates(torch.zeros(1, 6), torch.zeros(1, 6), torch.ones(1, 2))
        tensor([[0.5000, 0.5000]])
    """
    SIGNATURE(gates_input, gates_hidden, hidden)
    (h,) = OP(gates_input, gates_hidden, hidden)
    return h


def _allocate(gates_input, gates_hidden, hidden):
    return (empty_like(hidden),)


SIGNATURE = Signature("gru_gates", gates_input="B 3H", gates_hidden="B 3H", hidden="B H")
OP = define_op(
    "gru_gates",
    inputs=(Arg("gates_input"), Arg("gates_hidden"), Arg("hidden")),
    outputs=(Out("h"),),
    allocate=_allocate,
    autocast="float32",
)

"""`rnn`: a whole Elman layer (tanh or relu) over time, with resets, lengths, heads and both directions."""

from __future__ import annotations

import torch

from memkernels._checks import Signature, check_choice
from memkernels._registry import Out, define_op, empty_like, new_empty
from memkernels.ops._recurrent import (
    LAYER_INPUTS,
    check_flags,
    check_heads,
    check_lengths,
    check_reset_state,
    entering,
    layer_products,
    needs_gradients,
)

NONLINEARITIES = ("tanh", "relu")


def rnn(
    input: torch.Tensor,
    h0: torch.Tensor | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    reset: torch.Tensor | None = None,
    reset_state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
    num_heads: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs an Elman layer over T steps; one direction of one layer of torch.nn.RNN, with its weights.

    At each step, with h' the state that enters it::

        h = tanh(input[t] @ weight_ih.T + bias_ih + h' @ weight_hh.T + bias_hh)        or relu(...)

    Args:
        input: "T B I", floating. T, B and I may be 0; T = 0 returns the state.
        h0: "B H", same dtype and device, or None for zeros.
        weight_ih: "H I". weight_hh: "H H/NH". bias_ih, bias_hh: "H" or None.
        nonlinearity: "tanh" or "relu"; relu's gradient is 0 where its result is 0.
        reset: "T B" bool. The state that enters step t of row b is replaced where reset[t, b]: an episode starts there.
        reset_state: what it is replaced by, "H" (a learned state), "B H" or "T B H"; None for zeros. Needs `reset`.
        lengths: "B" int64 in 0..T. Row b is lengths[b] long: outputs past it are 0 and the final state is the one at its end.
        reverse: run from the last step of each row (lengths[b] - 1) to the first; outputs stay at their step. reset[t, b] then
            replaces the state that enters step t in running order.
        num_heads: NH, a divisor of H: the recurrent weights are block-diagonal, unit j sees the H/NH entries of h' that belong to
            head j // (H/NH).

    Returns:
        (output "T B H", h_n "B H").

    Gradients:
        To all floating arguments, of any order; none crosses a reset or the end of a row. A call that needs gradients keeps the
        output alone.

    Numerics:
        Products are summed in float32 (float64 for float64). In half precision h meets the weights of the next step as it is
        returned where a matrix unit multiplies (AMX, Triton), in float32 elsewhere. On CPUs with AMX the large products of
        float32 are taken from three bfloat16 parts an operand (docs/ops/lstm.md): no less accurate, but all below 2^-126 is 0.
        Results do not depend on B or on the number of threads, bit for bit. relu in bfloat16 does without AMX: h rounded would
        take 0 for units just above it.

    Raises:
        ValueError: on a shape that does not fit, an unknown nonlinearity, or a length outside 0..T (CPU only: on a GPU lengths are
            clamped, to avoid a sync). TypeError: on dtypes that differ.

    Source:
        Elman 1990, in the form of torch.nn.RNN.

    Example:
        >>> import torch
        >>> import memkernels as mk
        >>> layer = torch.nn.RNN(3, 4)
        >>> x = torch.randn(5, 2, 3)
        >>> output, h_n = mk.rnn(x, None, *(p for p in layer.parameters()))
        >>> torch.allclose(output, layer(x)[0], atol=1e-6)
        True
    """
    sizes = SIGNATURE(input, weight_hh, weight_ih, bias_ih, bias_hh, reset, lengths, h0)
    if num_heads.__class__ is not int or num_heads != 1 or sizes["D"] != sizes["H"]:
        check_heads("rnn", num_heads, weight_hh, sizes["H"], sizes["H"])
    if nonlinearity not in NONLINEARITIES:
        check_choice("rnn", "nonlinearity", nonlinearity, NONLINEARITIES)
    if h0 is None:
        h0 = input.new_zeros((sizes["B"], sizes["H"]))
    if lengths is not None:
        check_lengths("rnn", lengths, input)
    if reverse.__class__ is not bool:
        check_flags("rnn", reverse=reverse)
    if reset_state is not None:
        check_reset_state("rnn", reset, reset_state)
        reset_state = entering("rnn", "reset_state", reset_state, input, sizes["H"])
    floating = (input, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    training = needs_gradients((*floating, reset_state))
    output, h_n = OP(*floating, reset, reset_state, lengths, nonlinearity == "relu", reverse, num_heads, training)
    return output, h_n


def _allocate(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, relu, reverse, num_heads, training):
    return new_empty(input, (*input.shape[:2], h0.shape[1])), empty_like(h0)


def _products(input, h0, weight_ih, weight_hh, *_):
    return layer_products(input, weight_ih, weight_hh)


SIGNATURE = Signature(
    "rnn", input="T B I", weight_hh="H D", weight_ih="H I", bias_ih="H | None", bias_hh="H | None",
    reset=("T B | None", torch.bool), lengths=("B | None", torch.int64), h0="B H | None",
)  # fmt: skip
OP = define_op(
    "rnn",
    inputs=LAYER_INPUTS,
    outputs=(Out("output", save=True, batch=1), Out("h_n")),
    options="bool relu, bool reverse, int num_heads, bool training",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

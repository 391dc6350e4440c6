"""`gru`: a whole GRU layer over time, with resets, lengths, heads and both directions."""

from __future__ import annotations

import torch

from memkernels._checks import Signature
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


def gru(
    input: torch.Tensor,
    h0: torch.Tensor | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    *,
    reset: torch.Tensor | None = None,
    reset_state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
    num_heads: int = 1,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a GRU layer over T steps; one direction of one layer of torch.nn.GRU, with its weights.

    At each step, with h' the state that enters it::

        x_r, x_z, x_n = input[t] @ weight_ih.T + bias_ih        h_r, h_z, h_n = h' @ weight_hh.T + bias_hh
        r = sigmoid(x_r + h_r)    z = sigmoid(x_z + h_z)    n = tanh(x_n + r * h_n)    h = n + z * (h' - n)

    Args:
        input: "T B I", floating. T, B and I may be 0; T = 0 returns the state.
        h0: "B H", same dtype and device, or None for zeros.
        weight_ih: "3H I"; gate order r, z, n. weight_hh: "3H H/NH". bias_ih, bias_hh: "3H" or None.
        reset: "T B" bool. The state that enters step t of row b is replaced where reset[t, b]: an episode starts there.
        reset_state: what it is replaced by, "H" (a learned state), "B H" or "T B H"; None for zeros. Needs `reset`.
        lengths: "B" int64 in 0..T. Row b is lengths[b] long: outputs past it are 0 and the final state is the one at its end.
        reverse: run from the last step of each row (lengths[b] - 1) to the first; outputs stay at their step. reset[t, b] then
            replaces the state that enters step t in running order.
        num_heads: NH, a divisor of H: the recurrent weights are block-diagonal, the gates of unit j see the H/NH entries of h' that
            belong to head j // (H/NH).
        recompute: keep the outputs alone and compute the gates again in backward, by one large product.

    Returns:
        (output "T B H", h_n "B H").

    Gradients:
        To all floating arguments, of any order; none crosses a reset or the end of a row. A call that needs gradients keeps
        output and gates (r, z, n, h_n), with `recompute` the output, in the input's dtype; any other call keeps nothing.

    Numerics:
        Products are summed in float32 (float64 for float64). In half precision h meets the weights of the next step as it is
        returned where a matrix unit multiplies (AMX, Triton), in float32 elsewhere. On CPUs with AMX the large products of
        float32 are taken from three bfloat16 parts an operand (docs/ops/lstm.md): no less accurate, but all below 2^-126 is 0.
        Results do not depend on B or on the number of threads, bit for bit.

    Raises:
        ValueError: on a shape that does not fit, or a length outside 0..T (CPU only: on a GPU lengths are clamped, to avoid
            a sync). TypeError: on dtypes that differ.

    Source:
        Cho et al. 2014, in the form of torch.nn.GRU.

    Example:
        >>> import torch
        >>> import memkernels as mk
        >>> layer = torch.nn.GRU(3, 4)
        >>> x = torch.randn(5, 2, 3)
        >>> output, h_n = mk.gru(x, None, *(p for p in layer.parameters()))
        >>> torch.allclose(output, layer(x)[0], atol=1e-6)
        True
    """
    sizes = SIGNATURE(input, weight_hh, weight_ih, bias_ih, bias_hh, reset, lengths, h0)
    if num_heads.__class__ is not int or num_heads != 1 or sizes["D"] != sizes["H"]:
        check_heads("gru", num_heads, weight_hh, sizes["H"], sizes["H"])
    if h0 is None:
        h0 = input.new_zeros((sizes["B"], sizes["H"]))
    if lengths is not None:
        check_lengths("gru", lengths, input)
    if not (reverse.__class__ is recompute.__class__ is bool):
        check_flags("gru", reverse=reverse, recompute=recompute)
    if reset_state is not None:
        check_reset_state("gru", reset, reset_state)
        reset_state = entering("gru", "reset_state", reset_state, input, sizes["H"])
    floating = (input, h0, weight_ih, weight_hh, bias_ih, bias_hh)
    training = needs_gradients((*floating, reset_state))
    output, h_n, _ = OP(*floating, reset, reset_state, lengths, reverse, num_heads, recompute, training)
    return output, h_n


def _allocate(
    input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse, num_heads, recompute, training
):  # fmt: skip
    steps, batch, _ = input.shape
    hidden = h0.shape[1]
    return (
        new_empty(input, (steps, batch, hidden)),
        empty_like(h0),
        new_empty(input, (steps, batch, 4 * hidden)) if training and not recompute else None,
    )


def _products(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse, num_heads, recompute, training):
    return layer_products(input, weight_ih, weight_hh, recompute)


SIGNATURE = Signature(
    "gru", input="T B I", weight_hh="3H D", weight_ih="3H I", bias_ih="3H | None", bias_hh="3H | None",
    reset=("T B | None", torch.bool), lengths=("B | None", torch.int64), h0="B H | None",
)  # fmt: skip
OP = define_op(
    "gru",
    inputs=LAYER_INPUTS,
    outputs=(
        Out("output", save=True, batch=1),
        Out("h_n"),
        Out("gates", differentiable=False, save=True, batch=1),
    ),
    options="bool reverse, int num_heads, bool recompute, bool training",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

"""`lstm`: a whole LSTM layer over time, with resets, lengths and both directions."""

from __future__ import annotations

from typing import Any

import torch

from memkernels._checks import Signature, check_flag, check_tensor, fail
from memkernels._compat import functorch_active, jit_tracing, plain_call
from memkernels._registry import Arg, Out, define_op, empty_like, new_empty


def lstm(
    input: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor] | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    *,
    reset: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    reverse: bool = False,
    return_cells: bool = False,
) -> Any:
    """Runs an LSTM layer over T steps; one direction of one layer of torch.nn.LSTM, with its weights.

    At each step, with h', c' the state that enters it::

        i, f, g, o = input[t] @ weight_ih.T + bias_ih + h' @ weight_hh.T + bias_hh
        c = sigmoid(f) * c' + sigmoid(i) * tanh(g)        h = sigmoid(o) * tanh(c)

    Args:
        input: "T B I", floating. T, B and I may be 0; T = 0 returns the state.
        state: (h0 "B H", c0 "B H"), same dtype and device, or None for zeros.
        weight_ih: "4H I"; gate order i, f, g, o. weight_hh: "4H H". bias_ih, bias_hh: "4H" or None.
        reset: "T B" bool. The state that enters step t of row b is zero where reset[t, b]: an episode starts there.
        lengths: "B" int64 in 0..T. Row b is lengths[b] long: outputs past it are 0 and the final state is the one at its end.
        reverse: run from the last step of each row (lengths[b] - 1) to the first; outputs stay at their step. reset[t, b] then
            clears the state that enters step t in running order.
        return_cells: also return the cell of every step.

    Returns:
        (output "T B H", (h_n "B H", c_n "B H")); with `return_cells` (output, (h_n, c_n), cells "T B H").

    Gradients:
        To all floating arguments, of any order; none crosses a reset or the end of a row. A call that needs gradients keeps
        output, cells and activated gates in the input's dtype; any other call keeps nothing.

    Numerics:
        Products are summed in float32 (float64 for float64) and c is carried in float32 from step to step. In half precision
        h enters the next step as it is returned. Results do not depend on B or on the number of threads, bit for bit.

    Raises:
        ValueError: on a shape that does not fit, or a length outside 0..T (CPU only: on a GPU lengths are clamped, to avoid
            a sync). TypeError: on dtypes that differ, or a state that is no pair of tensors.

    Source:
        Hochreiter and Schmidhuber 1997, in the form of torch.nn.LSTM.

    Example:
        >>> import torch
        >>> import memkernels as mk
        >>> layer = torch.nn.LSTM(3, 4)
        >>> x = torch.randn(5, 2, 3)
        >>> output, (h_n, c_n) = mk.lstm(x, None, *(p for p in layer.parameters()))
        >>> torch.allclose(output, layer(x)[0], atol=1e-6)
        True
    """
    h0, c0 = (None, None) if state is None else _pair(state)
    sizes = SIGNATURE(input, weight_hh, weight_ih, bias_ih, bias_hh, reset, lengths, h0, c0)
    if h0 is None:
        h0 = c0 = input.new_zeros((sizes["B"], sizes["H"]))
    if lengths is not None:
        _check_lengths(lengths, input)
    if not (reverse.__class__ is return_cells.__class__ is bool):
        check_flag("lstm", "reverse", reverse)
        check_flag("lstm", "return_cells", return_cells)
    floating = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh)
    # A trace may be run with and without gradients later, and must be the same each time it is made.
    training = (
        jit_tracing() or functorch_active() or (torch.is_grad_enabled() and True in [t is not None and t.requires_grad for t in floating])
    )
    output, h_n, c_n, cells, _ = OP(*floating, reset, lengths, reverse, return_cells, training)
    return (output, (h_n, c_n), cells) if return_cells else (output, (h_n, c_n))


def _pair(state):
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        fail("lstm", "state", "a pair (h0, c0) or None", type(state).__name__, TypeError)
    h0, c0 = state
    if h0 is None or c0 is None:
        check_tensor("lstm", "h0" if h0 is None else "c0", None)
    return h0, c0


def _check_lengths(lengths, input):
    """Reads the values only where that is free: on a CPU, outside of transforms and tracing; the C++ kernel looks in any case."""
    if not torch.compiler.is_compiling() and lengths.device.type == "cpu" and plain_call((lengths,)) and lengths.numel():
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > input.shape[0]:
            fail("lstm", "lengths", f"values in 0..T={input.shape[0]}", f"{low}..{high}")


def _allocate(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse, return_cells, training):
    steps, batch, _ = input.shape
    hidden = weight_hh.shape[1]
    return (
        new_empty(input, (steps, batch, hidden)),
        empty_like(h0),
        empty_like(c0),
        new_empty(input, (steps, batch, hidden)) if training or return_cells else None,
        new_empty(input, (steps, batch, 4 * hidden)) if training else None,
    )


SIGNATURE = Signature(
    "lstm", input="T B I", weight_hh="4H H", weight_ih="4H I", bias_ih="4H | None", bias_hh="4H | None",
    reset=("T B | None", torch.bool), lengths=("B | None", torch.int64), h0="B H | None", c0="B H | None",
)  # fmt: skip
OP = define_op(
    "lstm",
    inputs=(
        Arg("input", batch=1),
        Arg("h0"),
        Arg("c0"),
        Arg("weight_ih", batch=None),
        Arg("weight_hh", batch=None),
        Arg("bias_ih", optional=True, batch=None),
        Arg("bias_hh", optional=True, batch=None),
        Arg("reset", differentiable=False, optional=True, batch=1),
        Arg("lengths", differentiable=False, optional=True),
    ),
    outputs=(
        Out("output", save=True, batch=1),
        Out("h_n"),
        Out("c_n"),
        Out("cells", save=True, batch=1),
        Out("gates", differentiable=False, save=True, batch=1),
    ),
    options="bool reverse, bool return_cells, bool training",
    allocate=_allocate,
    autocast="matmul",
)

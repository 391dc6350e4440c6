"""`lstm`: a whole LSTM layer over time, with the variants that cuDNN and oneDNN leave out."""

from __future__ import annotations

from typing import Any

import torch

from memkernels._checks import Signature, check_choice, check_number, fail
from memkernels._registry import Arg, Out, Product, define_op, empty_like, new_empty
from memkernels.ops._recurrent import (
    check_flags,
    check_heads,
    check_lengths,
    check_reset_state,
    entering,
    layer_products,
    needs_gradients,
    pair,
)

OUTPUT_GATES = ("standard", "cell")
_NO_ZONEOUT = (0.0, 0.0)


def lstm(
    input: torch.Tensor,
    state: tuple[torch.Tensor, torch.Tensor] | None,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias_ih: torch.Tensor | None = None,
    bias_hh: torch.Tensor | None = None,
    *,
    reset: torch.Tensor | None = None,
    reset_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    lengths: torch.Tensor | None = None,
    peephole: torch.Tensor | None = None,
    layer_norm: tuple[torch.Tensor, torch.Tensor] | None = None,
    zoneout: tuple[float, float] = _NO_ZONEOUT,
    recurrent_dropout: float = 0.0,
    output_gate: str = "standard",
    weight_co: torch.Tensor | None = None,
    weight_hr: torch.Tensor | None = None,
    reverse: bool = False,
    num_heads: int = 1,
    recompute: bool = False,
    training: bool = True,
    seed: torch.Tensor | None = None,
    return_cells: bool = False,
) -> Any:
    """Runs an LSTM layer over T steps; one direction of one layer of torch.nn.LSTM, with its weights. All options combine.

    At each step, with h', c' the state that enters it::

        i, f, g, o = input[t] @ weight_ih.T + bias_ih + h' @ weight_hh.T + bias_hh
        c = sigmoid(f) * c' + sigmoid(i) * tanh(g)        h = sigmoid(o) * tanh(c)

    Args:
        input: "T B I", floating. T, B and I may be 0; T = 0 returns the state.
        state: (h0 "B P", c0 "B H"), same dtype and device, or None for zeros. P = H without `weight_hr`.
        weight_ih: "4H I"; gate order i, f, g, o. weight_hh: "4H P/NH". bias_ih, bias_hh: "4H" or None.
        reset: "T B" bool. The state that enters step t of row b is replaced where reset[t, b]: an episode starts there.
        reset_state: what it is replaced by, a pair (h, c), each "P" ("H" for c; a learned state), "B P" or "T B P"; None for zeros.
            Needs `reset`.
        lengths: "B" int64 in 0..T. Row b is lengths[b] long: outputs past it are 0 and the final state is the one at its end.
        peephole: "3 H", rows p_i, p_f, p_o: i += p_i * c', f += p_f * c', o += p_o * c, before the sigmoid.
        layer_norm: (gamma "9H", beta "9H"), parts input 4H, hidden 4H, cell H: the gates are LN(input[t] @ weight_ih.T) +
            LN(h' @ weight_hh.T) + biases, and h = o * tanh(LN(c)); LN(x) = (x - mean) / sqrt(variance + 1e-5) * gamma + beta over a
            whole row. c itself is not normalised.
        zoneout: (probability for h, for c), each 0 to 1, with which a unit keeps the value that entered the step. With
            `training=False` the expectation: h = p * h' + (1 - p) * h.
        recurrent_dropout: probability, at least 0 and below 1, with which a unit of h' is dropped where it enters the gates, one mask a
            sequence; the others are scaled by 1 / (1 - p). Outputs and the carried state are whole. Nothing with `training=False`.
        output_gate: "cell": the output gate sees c and not the input, o = (h' @ weight_hh.T)_o + c @ weight_co.T + biases; the o rows
            of weight_ih are ignored (with layer_norm the input part is normalised over its first 3H; c @ weight_co.T is not).
        weight_co: "H H", with output_gate="cell" only.
        weight_hr: "P H": h = (o * tanh(c)) @ weight_hr.T, torch.nn.LSTM's proj_size.
        reverse: run from the last step of each row (lengths[b] - 1) to the first; outputs stay at their step. reset[t, b] then
            replaces the state that enters step t in running order.
        num_heads: NH, a divisor of P and H: the recurrent weights are block-diagonal, the gates of unit j see the P/NH entries of h'
            that belong to head j // (H/NH).
        recompute: keep the outputs alone and compute gates and cells again in backward, by one large product a weight and a scan.
        training: whether zoneout and recurrent dropout draw.
        seed: int64 "1", what they draw from; None: taken from torch's generator. The masks are a function of (seed, step, row, unit).
        return_cells: also return the cell of every step.

    Returns:
        (output "T B P", (h_n "B P", c_n "B H")); with `return_cells` (output, (h_n, c_n), cells "T B H").

    Gradients:
        To all floating arguments, of any order; none crosses a reset or the end of a row. A call that needs gradients keeps
        output, cells and activated gates in the input's dtype, with `recompute` the output; any other call keeps nothing.

    Numerics:
        Products are summed in float32 (float64 for float64) and c is carried in float32 from step to step. In half precision h
        meets the weights of the next step as it is returned where a matrix unit multiplies (AMX, Triton), in float32 elsewhere.
        On CPUs with AMX the large products of float32 are taken from three bfloat16 parts an operand (docs/ops/lstm.md): no less
        accurate, but all below 2^-126 is 0. Results do not depend on B or on the number of threads, bit for bit; masks are the
        same on every backend.

    Raises:
        ValueError: on a shape that does not fit, a probability out of range, weight_co without output_gate="cell" or the other way
            round, or a length outside 0..T (CPU only: on a GPU lengths are clamped, to avoid a sync). TypeError: on dtypes that
            differ, or a state that is no pair of tensors.

    Source:
        Hochreiter and Schmidhuber 1997, in the form of torch.nn.LSTM. Peepholes: Gers et al. 2002. Layer norm: Ba et al. 2016, in the
        form of haste. Zoneout: Krueger et al. 2017. Recurrent dropout: Gal and Ghahramani 2016. Projection: Sak et al. 2014.

    Example:
        >>> import torch
        >>> import memkernels as mk
        >>> layer = torch.nn.LSTM(3, 4)
        >>> x = torch.randn(5, 2, 3)
        >>> output, (h_n, c_n) = mk.lstm(x, None, *(p for p in layer.parameters()))
        >>> torch.allclose(output, layer(x)[0], atol=1e-6)
        True
    """
    h0, c0 = (None, None) if state is None else pair("lstm", "state", state, "a pair (h0, c0) or None", ("h0", "c0"))
    extra: Any = _NONE
    drawn: Any = _NOTHING_DRAWN
    if (
        (peephole is layer_norm is weight_co is weight_hr is reset_state is seed is None)
        and isinstance(zoneout, tuple)
        and zoneout == _NO_ZONEOUT
        and isinstance(recurrent_dropout, float)
        and recurrent_dropout == 0.0
        and (num_heads.__class__ is int and num_heads == 1 and output_gate == "standard")
    ):
        sizes = SIGNATURE(input, weight_hh, weight_ih, bias_ih, bias_hh, reset, lengths, h0, c0)
        width = sizes["H"]
    else:
        norm = (None, None) if layer_norm is None else pair("lstm", "layer_norm", layer_norm, "a pair (gamma, beta) or None", _NORM)
        _check_output_gate(output_gate, weight_co)
        signature = OPTIONS if weight_hr is None else PROJECTED
        given = (bias_ih, bias_hh, weight_hr, peephole, *norm, weight_co, reset, lengths, seed, h0, c0)
        sizes = signature(input, weight_ih, weight_hh, *given)
        letter = "H" if weight_hr is None else "P"
        width = sizes[letter]
        check_heads("lstm", num_heads, weight_hh, sizes["H"], width, letter)
        resets = _reset_states(reset, reset_state, input, (width, letter), sizes["H"])
        drawn, seed = _probabilities(zoneout, recurrent_dropout, training, seed, input)
        extra = (weight_hr, peephole, *norm, weight_co), resets
    if h0 is None:
        h0, c0 = input.new_zeros((sizes["B"], width)), input.new_zeros((sizes["B"], sizes["H"]))
    if lengths is not None:
        check_lengths("lstm", lengths, input)
    if not (reverse.__class__ is recompute.__class__ is training.__class__ is return_cells.__class__ is bool):
        check_flags("lstm", reverse=reverse, recompute=recompute, training=training, return_cells=return_cells)
    weights, (reset_h, reset_c) = extra
    floating = (input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, *weights)
    saving = needs_gradients(floating if reset_h is None else (*floating, reset_h, reset_c))
    output, h_n, c_n, cells, _ = OP(
        *floating, reset, reset_h, reset_c, lengths, seed, reverse, num_heads, *drawn, recompute, return_cells, saving
    )  # fmt: skip
    return (output, (h_n, c_n), cells) if return_cells else (output, (h_n, c_n))


_NORM = ("layer_norm_gamma", "layer_norm_beta")
_NONE = ((None, None, None, None, None), (None, None))
_NOTHING_DRAWN = (0.0, 0.0, 0.0, False)  # zoneout_h, zoneout_c, recurrent_dropout, expected


def _check_output_gate(output_gate, weight_co):
    check_choice("lstm", "output_gate", output_gate, OUTPUT_GATES)
    if (output_gate == "cell") != (weight_co is not None):
        expected, got = ("a tensor", "None") if weight_co is None else ("None", "a tensor")
        fail("lstm", "weight_co", f"{expected} with output_gate={output_gate!r}", got)


def _reset_states(reset, reset_state, input, width_h, hidden):
    if reset_state is None:
        return None, None
    check_reset_state("lstm", reset, reset_state)
    h, c = pair("lstm", "reset_state", reset_state, "a pair (h, c) or None", ("reset_state_h", "reset_state_c"))
    return entering("lstm", "reset_state_h", h, input, *width_h), entering("lstm", "reset_state_c", c, input, hidden)


def _probabilities(zoneout, recurrent_dropout, training, seed, input):
    """(zoneout_h, zoneout_c, recurrent_dropout, expected) and the seed, None where nothing is drawn."""
    if not isinstance(zoneout, (tuple, list)) or len(zoneout) != 2:
        fail("lstm", "zoneout", "a pair of probabilities", repr(zoneout), TypeError)
    check_flags("lstm", training=training)
    zoneout_h, zoneout_c = (float(check_number("lstm", "zoneout", p)) for p in zoneout)
    for p in (zoneout_h, zoneout_c):
        if not 0.0 <= p <= 1.0:
            fail("lstm", "zoneout", "probabilities in 0..1", p)
    dropout = float(check_number("lstm", "recurrent_dropout", recurrent_dropout))
    if not 0.0 <= dropout < 1.0:
        fail("lstm", "recurrent_dropout", "a probability, at least 0 and below 1", dropout)
    if zoneout_h == zoneout_c == 0.0 and (dropout == 0.0 or not training):
        return _NOTHING_DRAWN, None
    if not training:
        return (zoneout_h, zoneout_c, 0.0, True), None
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=input.device)
    return (zoneout_h, zoneout_c, dropout, False), seed


def _allocate(
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias, weight_co, reset, reset_h, reset_c,
    lengths, seed, reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected, recompute, return_cells, training,
):  # fmt: skip
    steps, batch, _ = input.shape
    hidden, saving = c0.shape[1], training and not recompute
    return (
        new_empty(input, (steps, batch, h0.shape[1])),
        empty_like(h0),
        empty_like(c0),
        new_empty(input, (steps, batch, hidden)) if saving or return_cells else None,
        new_empty(input, (steps, batch, 4 * hidden)) if saving else None,
    )


def _products(
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias, weight_co, reset, reset_h, reset_c,
    lengths, seed, reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected, recompute, *_,
):  # fmt: skip
    used = weight_ih if weight_co is None else weight_ih[: 3 * c0.shape[1]]
    more = ((weight, name) for weight, name in ((weight_hr, "weight_hr"), (weight_co, "weight_co")) if weight is not None)
    again, steps = int(recompute), input.shape[0] * input.shape[1]
    squares = (Product(steps * weight.numel(), "*", name, again=again) for weight, name in more)
    return *layer_products(input, used, weight_hh, recompute), *squares


def _signature(width):
    """Of the calls with options; `width`: the letter of the width of h."""
    return Signature(
        "lstm", input="T B I", weight_ih="4H I", weight_hh="4H D", bias_ih="4H | None", bias_hh="4H | None", weight_hr="P H | None",
        peephole="3 H | None", layer_norm_gamma="9H | None", layer_norm_beta="9H | None", weight_co="H H | None",
        reset=("T B | None", torch.bool), lengths=("B | None", torch.int64), seed=("1 | None", torch.int64),
        h0=f"B {width} | None", c0="B H | None",
    )  # fmt: skip


SIGNATURE = Signature(
    "lstm", input="T B I", weight_hh="4H H", weight_ih="4H I", bias_ih="4H | None", bias_hh="4H | None",
    reset=("T B | None", torch.bool), lengths=("B | None", torch.int64), h0="B H | None", c0="B H | None",
)  # fmt: skip
OPTIONS, PROJECTED = _signature("H"), _signature("P")
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
        Arg("weight_hr", optional=True, batch=None),
        Arg("peephole", optional=True, batch=None),
        Arg("norm_weight", optional=True, batch=None),
        Arg("norm_bias", optional=True, batch=None),
        Arg("weight_co", optional=True, batch=None),
        Arg("reset", differentiable=False, optional=True, batch=1),
        Arg("reset_h", optional=True, batch=1),
        Arg("reset_c", optional=True, batch=1),
        Arg("lengths", differentiable=False, optional=True),
        Arg("seed", differentiable=False, optional=True, batch=None, by_row=True),
    ),
    outputs=(
        Out("output", save=True, batch=1),
        Out("h_n"),
        Out("c_n"),
        Out("cells", save=True, batch=1),
        Out("gates", differentiable=False, save=True, batch=1),
    ),
    options="bool reverse, int num_heads, float zoneout_h, float zoneout_c, float recurrent_dropout, bool expected, bool recompute, "
    "bool return_cells, bool training",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

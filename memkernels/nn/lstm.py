"""`LSTM`: torch.nn.LSTM's parameters, arguments and meaning, every layer and direction one call of `memkernels.lstm`."""

from __future__ import annotations

from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from memkernels._checks import check_choice, fail
from memkernels.nn._arguments import check_probability, state_pair
from memkernels.nn._recurrent import Recurrent, Segments, States
from memkernels.ops.lstm import OUTPUT_GATES, lstm

State = tuple[Tensor, Tensor]


class LSTM(Recurrent):
    """Drop-in for `torch.nn.LSTM`, plus resets, lengths and the variants that cuDNN and oneDNN leave out; all of them combine.

    ``i, f, g, o = W_ih x + b_ih + W_hh h + b_hh``;  ``c = sigmoid(f) c' + sigmoid(i) tanh(g)``;  ``h = sigmoid(o) tanh(c)``, and
    ``h = W_hr h`` when `proj_size` is given. Parameters have the names, order, shapes and initial distribution of torch.nn.LSTM, so
    state_dicts load both ways; those of options come after them. It derives from `torch.nn.RNNBase`, not from `torch.nn.LSTM`, because
    torch.compile refuses instances of the latter; this one compiles into one graph, trains in eval mode, and has double backward.

    Args:
        input_size: features I of the input.
        hidden_size: features H of the cell.
        num_layers: stacked layers L.
        bias: whether the layers have `bias_ih` and `bias_hh`.
        batch_first: input and output are "B T I" instead of "T B I"; states are never affected.
        dropout: probability of zeroing an output element of every layer but the last, in training mode.
        bidirectional: a second set of weights runs from the end to the start (D = 2 directions); outputs are concatenated.
        proj_size: if positive, h has this many features P: a projection of the cell output.
        device, dtype: of the parameters.
        peephole: adds `weight_peephole_l{k}` "3 H": gates i and f see the old cell, gate o the new one.
        layer_norm: adds `norm_weight_l{k}` "9H" (ones) and `norm_bias_l{k}` "9H" (zeros): layer norm of the input's share of the gates
            (4H), of the hidden state's (4H), and of the cell (H) before its tanh.
        output_gate: "cell" adds `weight_co_l{k}` "H H": the output gate sees the new cell instead of the input.
        zoneout: probability, or a pair (for h, for c), with which a unit keeps its old value, in training mode; the expectation otherwise.
        recurrent_dropout: probability with which a unit of h is dropped where it enters the gates, one mask a sequence, in training mode.
        num_heads: NH: the recurrent weights are block-diagonal, `weight_hh_l{k}` is "4H P/NH".
        recompute: keep the outputs alone for backward and compute gates and cells again there.
        learned_reset: adds `reset_h_l{k}` "P" and `reset_c_l{k}` "H" (zeros): the state an episode starts with.

    Source: Hochreiter and Schmidhuber 1997; the options' sources stand at `memkernels.lstm`.

    Example:
        >>> layer = LSTM(10, 20, num_layers=2, batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([2, 3, 20]))
    """

    OPTIONS: ClassVar[dict[str, Any]] = {
        "peephole": False, "layer_norm": False, "output_gate": "standard", "zoneout": (0.0, 0.0), "recurrent_dropout": 0.0,
        "num_heads": 1, "recompute": False, "learned_reset": False,
    }  # fmt: skip
    peephole: bool
    layer_norm: bool
    output_gate: str
    zoneout: tuple[float, float]
    recurrent_dropout: float
    recompute: bool

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        peephole: bool = False,
        layer_norm: bool = False,
        output_gate: str = "standard",
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        num_heads: int = 1,
        recompute: bool = False,
        learned_reset: bool = False,
    ) -> None:
        check_choice("LSTM", "output_gate", output_gate, OUTPUT_GATES)
        check_probability("LSTM", "recurrent_dropout", recurrent_dropout)
        if recurrent_dropout == 1:
            fail("LSTM", "recurrent_dropout", "a number in [0, 1)", recurrent_dropout)
        super().__init__(
            "LSTM",
            (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size),
            {"device": device, "dtype": dtype},
            {
                "peephole": peephole, "layer_norm": layer_norm, "output_gate": output_gate, "zoneout": _pair(zoneout),
                "recurrent_dropout": float(recurrent_dropout), "num_heads": num_heads, "recompute": recompute,
                "learned_reset": learned_reset,
            },
        )  # fmt: skip

    def forward(
        self,
        input,
        hx: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        reset_state: State | None = None,
        return_cells: bool = False,
    ) -> Any:
        """Runs all layers over all steps.

        Args:
            input: "T B I", "B T I" with `batch_first`, "T I" without a batch, or a PackedSequence.
            hx: (h_0 "L*D B P or H", c_0 "L*D B H"), without B for unbatched input; zeros if None.
            reset: bool, laid out as the input without its feature dimension (for a PackedSequence: as its padded form, in the caller's
                batch order). Where True, the state that enters this step of this row, in every layer and direction, is replaced by
                `reset_state`, or what `learned_reset` learned, or zero.
            lengths: int64 "B": valid steps of every row; on any device, never synchronised. Outputs past the end are 0, and the final
                state is the one at the end. A PackedSequence carries its own.
            reset_state: a pair shaped like hx, or with the steps before the batch ("L*D T B H"; never batch_first). Needs `reset`.
            return_cells: also return the cells of the last layer.

        Returns:
            output "T B D*H" (or "B T D*H", "T D*H", PackedSequence, as the input), (h_n, c_n) shaped like hx; with `return_cells`
            a third: the cells c, laid out as the output.

        Gradients: to the input, all states and all parameters; twice differentiable. Gradients do not cross a reset.
        Raises: ValueError, RuntimeError as torch.nn.LSTM does for a wrong rank, size or dtype.
        """
        state = state_pair("LSTM", hx)
        starts = None if reset_state is None else _two("reset_state", reset_state)
        output, last, cells = self._forward(input, state, Segments(reset, starts, lengths), return_cells)
        return (output, last, cells) if return_cells else (output, last)

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Shape of c_0 for a checked input, as torch.nn.LSTM tells it; `get_expected_hidden_size` tells that of h_0."""
        count, batch, _ = self.get_expected_hidden_size(input, batch_sizes)
        return count, batch, self.hidden_size

    def check_forward_args(self, input: Tensor, hidden: State, batch_sizes: Tensor | None) -> None:  # type: ignore[override]
        """torch.nn.LSTM's check of an input and a pair of states."""
        self.check_input(input, batch_sizes)
        self.check_hidden_size(hidden[0], self.get_expected_hidden_size(input, batch_sizes), "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(hidden[1], self.get_expected_cell_size(input, batch_sizes), "Expected hidden[1] size {}, got {}")

    def permute_hidden(self, hx: State, permutation: Tensor | None) -> State:  # type: ignore[override]
        """Both states with their rows in another order."""
        return hx if permutation is None else (hx[0].index_select(1, permutation), hx[1].index_select(1, permutation))

    def _widths(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    def _option_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        if self.peephole:
            shapes["weight_peephole"] = (3, hidden)
        if self.layer_norm:
            shapes["norm_weight"] = shapes["norm_bias"] = (9 * hidden,)
        if self.output_gate == "cell":
            shapes["weight_co"] = (hidden, hidden)
        if self.learned_reset:
            shapes["reset_h"], shapes["reset_c"] = (self.proj_size or hidden,), (hidden,)
        return shapes

    def _direction(
        self, x: Tensor, state: States, weights: dict[str, Tensor], segments: Segments, reverse: bool, cells: bool
    ) -> tuple[Tensor, States, Tensor | None]:
        results = lstm(
            x, state, weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih"), weights.get("bias_hh"),
            reset=segments.reset, reset_state=segments.reset_state, lengths=segments.lengths, peephole=weights.get("weight_peephole"),
            layer_norm=(weights["norm_weight"], weights["norm_bias"]) if self.layer_norm else None, zoneout=self.zoneout,
            recurrent_dropout=self.recurrent_dropout, output_gate=self.output_gate, weight_co=weights.get("weight_co"),
            weight_hr=weights.get("weight_hr"), reverse=reverse, num_heads=self.num_heads, recompute=self.recompute,
            training=self.training, return_cells=cells,
        )  # fmt: skip
        return results if cells else (*results, None)


def _pair(zoneout: Any) -> tuple[float, float]:
    """One probability for h and c, or one for each."""
    both = (zoneout, zoneout) if isinstance(zoneout, Real) else _two("zoneout", zoneout)
    for probability in both:
        check_probability("LSTM", "zoneout", probability)
    return float(both[0]), float(both[1])


def _two(argument: str, got: Any) -> tuple[Any, Any]:
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        fail("LSTM", argument, "a pair", repr(got) if not torch.is_tensor(got) else "one tensor", TypeError)
    return got[0], got[1]

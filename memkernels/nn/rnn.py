"""`RNN`: torch.nn.RNN's parameters, arguments and meaning, every layer and direction one call of `memkernels.rnn`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memkernels.nn._single_state import SingleState, refuse_unknown
from memkernels.ops.rnn import rnn

_MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU"}


class RNN(SingleState):
    """Drop-in for `torch.nn.RNN`, plus resets and lengths.

    ``h = tanh(W_ih x + b_ih + W_hh h' + b_hh)``, or relu. Parameters have the names, order, shapes and initial distribution of
    torch.nn.RNN, so state_dicts load both ways; those of options come after them. It derives from `torch.nn.RNNBase` (torch.compile
    refuses torch.nn.RNN), compiles into one graph, trains in eval mode, and has double backward.

    Args:
        input_size: features I of the input.
        hidden_size: features H of the state.
        num_layers: stacked layers L.
        nonlinearity: "tanh" or "relu".
        bias: whether the layers have `bias_ih` and `bias_hh`.
        batch_first: input and output are "B T I" instead of "T B I"; states are never affected.
        dropout: probability of zeroing an output element of every layer but the last, in training mode.
        bidirectional: a second set of weights runs from the end to the start (D = 2 directions); outputs are concatenated.
        device, dtype: of the parameters.
        num_heads: NH: the recurrent weights are block-diagonal, `weight_hh_l{k}` is "H H/NH".
        learned_reset: adds `reset_h_l{k}` "H" (zeros): the state an episode starts with.

    Source: Elman 1990, in the form of torch.nn.RNN.

    Example:
        >>> layer = RNN(10, 20, num_layers=2, nonlinearity="relu")
        >>> output, h_n = layer(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        num_heads: int = 1,
        learned_reset: bool = False,
        **unknown: Any,
    ) -> None:
        refuse_unknown("RNN", unknown)
        if nonlinearity not in _MODES:
            raise ValueError(f"Unknown nonlinearity {nonlinearity!r}. Select from 'tanh' or 'relu'.")
        super().__init__(
            _MODES[nonlinearity],
            (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0),
            {"device": device, "dtype": dtype},
            {"num_heads": num_heads, "learned_reset": learned_reset},
        )
        self.nonlinearity = nonlinearity

    def _layer(self, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return rnn(*tensors, nonlinearity=self.nonlinearity, **options)

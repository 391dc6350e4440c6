"""`GRU`: torch.nn.GRU's parameters, arguments and meaning, every layer and direction one call of `memkernels.gru`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from memkernels.nn._single_state import SingleState, refuse_unknown
from memkernels.ops.gru import gru


class GRU(SingleState):
    """Drop-in for `torch.nn.GRU`, plus resets and lengths.

    ``r, z = sigmoid(W_ih x + b_ih + W_hh h' + b_hh)``;  ``n = tanh(W_in x + b_in + r (W_hn h' + b_hn))``;  ``h = n + z (h' - n)``.
    Parameters have the names, order, shapes and initial distribution of torch.nn.GRU, so state_dicts load both ways; those of options
    come after them. It derives from `torch.nn.RNNBase` (torch.compile refuses torch.nn.GRU), compiles into one graph, trains in eval
    mode, and has double backward.

    Args:
        input_size: features I of the input.
        hidden_size: features H of the state.
        num_layers: stacked layers L.
        bias: whether the layers have `bias_ih` and `bias_hh`.
        batch_first: input and output are "B T I" instead of "T B I"; states are never affected.
        dropout: probability of zeroing an output element of every layer but the last, in training mode.
        bidirectional: a second set of weights runs from the end to the start (D = 2 directions); outputs are concatenated.
        device, dtype: of the parameters.
        num_heads: NH: the recurrent weights are block-diagonal, `weight_hh_l{k}` is "3H H/NH".
        recompute: keep the outputs alone for backward and compute the gates again there.
        learned_reset: adds `reset_h_l{k}` "H" (zeros): the state an episode starts with.

    Source: Cho et al. 2014, in the form of torch.nn.GRU.

    Example:
        >>> layer = GRU(10, 20, num_layers=2, batch_first=True)
        >>> output, h_n = layer(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([2, 3, 20]))
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"num_heads": 1, "recompute": False, "learned_reset": False}
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
        device=None,
        dtype=None,
        *,
        num_heads: int = 1,
        recompute: bool = False,
        learned_reset: bool = False,
        **unknown: Any,
    ) -> None:
        refuse_unknown("GRU", unknown)
        super().__init__(
            "GRU",
            (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0),
            {"device": device, "dtype": dtype},
            {"num_heads": num_heads, "recompute": recompute, "learned_reset": learned_reset},
        )

    def _layer(self, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return gru(*tensors, recompute=self.recompute, **options)

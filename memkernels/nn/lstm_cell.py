"""`LSTMCell`: torch.nn.LSTMCell's parameters, arguments and meaning, its pointwise part one call of `memkernels.lstm_gates`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memkernels.nn._arguments import check_sizes, refuse_script, state_pair
from memkernels.nn._cell import entering
from memkernels.ops.lstm_gates import lstm_gates


class LSTMCell(torch.nn.LSTMCell):
    """Drop-in for `torch.nn.LSTMCell`: one step of an LSTM.

    ``i, f, g, o = W_ih x + b_ih + W_hh h + b_hh``;  ``c = sigmoid(f) c' + sigmoid(i) tanh(g)``;  ``h = sigmoid(o) tanh(c)``.

    Args:
        input_size: features I of the input.
        hidden_size: features H of the state.
        bias: whether there are `bias_ih` and `bias_hh`.
        device, dtype: of the parameters.

    Example:
        >>> cell = LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h.shape
        torch.Size([3, 20])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        check_sizes("LSTMCell", 0, input_size=input_size, hidden_size=hidden_size)
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: "B I" or "I".
            hx: (h "B H", c "B H"), or "H" each for an input without a batch; zeros if None.

        Returns:
            The next (h, c), shaped like hx.

        Gradients: to the input, the state and all parameters; twice differentiable.
        Raises: ValueError for a wrong rank, RuntimeError for a wrong size, as torch.nn.LSTMCell.
        """
        x, (h, c) = entering(self, input, state_pair("LSTMCell", hx), 2)
        gates = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        h, c = lstm_gates(gates, c.to(gates.dtype))
        return (h, c) if input.dim() == 2 else (h.squeeze(0), c.squeeze(0))

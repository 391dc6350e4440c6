"""`GRUCell`: torch.nn.GRUCell's parameters, arguments and meaning, its pointwise part one call of `memkernels.gru_gates`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memkernels.nn._arguments import check_sizes, refuse_script
from memkernels.nn._cell import entering
from memkernels.ops.gru_gates import gru_gates


class GRUCell(torch.nn.GRUCell):
    """Drop-in for `torch.nn.GRUCell`: one step of a GRU.

    ``r, z = sigmoid(W_ih x + b_ih + W_hh h' + b_hh)``;  ``n = tanh(W_in x + b_in + r (W_hn h' + b_hn))``;  ``h = n + z (h' - n)``.

    Args:
        input_size: features I of the input.
        hidden_size: features H of the state.
        bias: whether there are `bias_ih` and `bias_hh`.
        device, dtype: of the parameters.

    Example:
        >>> cell = GRUCell(10, 20)
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None) -> None:
        check_sizes("GRUCell", 0, input_size=input_size, hidden_size=hidden_size)
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: "B I" or "I".
            hx: "B H", or "H" for an input without a batch; zeros if None.

        Returns:
            The next h, shaped like hx.

        Gradients: to the input, the state and all parameters; twice differentiable.
        Raises: ValueError for a wrong rank, RuntimeError for a wrong size, as torch.nn.GRUCell.
        """
        x, (h,) = entering(self, input, None if hx is None else (hx,), 1)
        gates = F.linear(x, self.weight_ih, self.bias_ih)
        h = gru_gates(gates, F.linear(h, self.weight_hh, self.bias_hh), h.to(gates.dtype))
        return h if input.dim() == 2 else h.squeeze(0)

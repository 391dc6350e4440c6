"""`RNNCell`: torch.nn.RNNCell, with this package's checks; two products and one pointwise function leave nothing to fuse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memkernels.nn._arguments import check_sizes, refuse_script
from memkernels.nn._cell import entering

_FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu}


class RNNCell(torch.nn.RNNCell):
    """Drop-in for `torch.nn.RNNCell`: one step of an Elman network, ``h = tanh(W_ih x + b_ih + W_hh h' + b_hh)``, or relu.

    Args:
        input_size: features I of the input.
        hidden_size: features H of the state.
        bias: whether there are `bias_ih` and `bias_hh`.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters.

    Example:
        >>> cell = RNNCell(10, 20)
        >>> cell(torch.randn(3, 10)).shape
        torch.Size([3, 20])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", device=None, dtype=None) -> None:
        check_sizes("RNNCell", 0, input_size=input_size, hidden_size=hidden_size)
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: "B I" or "I".
            hx: "B H", or "H" for an input without a batch; zeros if None.

        Returns:
            The next h, shaped like hx.

        Gradients: to the input, the state and all parameters; twice differentiable.
        Raises: ValueError for a wrong rank, RuntimeError for a wrong size or an unknown nonlinearity, as torch.nn.RNNCell.
        """
        x, (h,) = entering(self, input, None if hx is None else (hx,), 1)
        if self.nonlinearity not in _FUNCTIONS:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        total = F.linear(x, self.weight_ih, self.bias_ih) + F.linear(h, self.weight_hh, self.bias_hh)
        h = _FUNCTIONS[self.nonlinearity](total)
        return h if input.dim() == 2 else h.squeeze(0)

"""What the cells share: torch's checks of one step, with torch's errors."""

from __future__ import annotations

import torch
from torch import Tensor

from memkernels.nn._arguments import check_inputs

States = tuple[Tensor, ...]


def entering(cell: torch.nn.RNNCellBase, input: Tensor, hx: States | None, states: int) -> tuple[Tensor, States]:
    """Input and states with a batch dimension, zeros for absent states; refuses what does not fit."""
    name = cell._get_name()
    check_inputs(name, input=input)
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    for index, part in enumerate(hx or ()):
        which = "hidden" if states == 1 else f"hx[{index}]"
        check_inputs(name, **{which: part})
        if part.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected {which} to be 1D or 2D, got {part.dim()}D instead")
    x = input if input.dim() == 2 else input.unsqueeze(0)
    if x.shape[1] != cell.input_size:
        raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]} expected {cell.input_size}")
    if hx is None:
        return x, (torch.zeros(x.shape[0], cell.hidden_size, dtype=x.dtype, device=x.device),) * states
    hx = hx if input.dim() == 2 else tuple(part.unsqueeze(0) for part in hx)
    for index, part in enumerate(hx):
        if part.shape[0] != x.shape[0]:
            raise RuntimeError(f"Input batch size {x.shape[0]} doesn't match hidden{index} batch size {part.shape[0]}")
        if part.shape[1:] != (cell.hidden_size,):
            got = part.shape[1] if part.dim() > 1 else 1
            raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {got}, expected {cell.hidden_size}")
    return x, hx

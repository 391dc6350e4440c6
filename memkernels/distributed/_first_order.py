"""Gradients that say so when somebody differentiates them: what travelled between ranks is differentiated once."""

from __future__ import annotations

from typing import Any

import torch


def first_order(op: str, gradients: tuple[Any, ...], of: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients (None among them); where a graph is made of a backward, they hang on the tensors they depend on, and who goes there is
    told, and not given zero. (`once_differentiable` gives zero where the upstream gradient is constant.)"""
    return _FirstOrder.apply(op, len(gradients), *gradients, *of) if torch.is_grad_enabled() else gradients


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Any) -> Any:
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(f"{ctx.op}: gradients: expected to be taken once, got a second derivative (first order only)")

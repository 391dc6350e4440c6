"""What the public functions of the recurrent family share: checks of states, lengths, heads and flags."""

from __future__ import annotations

from typing import Any

import torch

from memkernels import _compat
from memkernels._checks import check_dense, check_flag, check_floating, check_tensor, fail
from memkernels._compat import functorch_active, jit_tracing
from memkernels._registry import Arg, Product

# What a layer with one state takes besides its options.
LAYER_INPUTS = (
    Arg("input", batch=1),
    Arg("h0"),
    Arg("weight_ih", batch=None),
    Arg("weight_hh", batch=None),
    Arg("bias_ih", optional=True, batch=None),
    Arg("bias_hh", optional=True, batch=None),
    Arg("reset", differentiable=False, optional=True, batch=1),
    Arg("reset_h", optional=True, batch=1),
    Arg("lengths", differentiable=False, optional=True),
)


def pair(op: str, argument: str, got: Any, expected: str, names: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tensors given as one argument."""
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        fail(op, argument, expected, type(got).__name__, TypeError)
    first, second = got
    if first is None or second is None:
        check_tensor(op, names[0] if first is None else names[1], None)
    return first, second


def check_lengths(op: str, lengths: torch.Tensor, input: torch.Tensor) -> None:
    """Reads the values only where that is free: on a CPU, outside of transforms and tracing; the C++ kernel looks in any case."""
    if not torch.compiler.is_compiling() and _compat.integers_fit(lengths, 0, input.shape[0], _compat.ANY) is False:
        low, high = (int(v) for v in torch.aminmax(lengths))
        fail(op, "lengths", f"values in 0..T={input.shape[0]}", f"{low}..{high}")


def check_flags(op: str, **flags: Any) -> None:
    for name, flag in flags.items():
        check_flag(op, name, flag)


def check_heads(op: str, num_heads: Any, weight_hh: torch.Tensor, hidden: int, width: int, letter: str = "H") -> None:
    """num_heads divides the hidden units and the width of the state that enters them, and weight_hh has the width of one head."""
    if not isinstance(num_heads, (int, torch.SymInt)) or isinstance(num_heads, bool):
        fail(op, "num_heads", "an int", repr(num_heads), TypeError)
    if num_heads < 1 or hidden % num_heads or width % num_heads:
        fail(op, "num_heads", f"a divisor of {_sizes(hidden, width, letter)}", num_heads)
    if weight_hh.shape[1] * num_heads != width:
        factor = weight_hh.shape[0] // hidden if hidden else 1
        first = "H" if factor == 1 else f"{factor}H"
        fail(op, "weight_hh", f"[{first} {letter}/{num_heads}] with {_sizes(hidden, width, letter)}", f"shape {tuple(weight_hh.shape)}")


def _sizes(hidden: int, width: int, letter: str) -> str:
    return f"H={hidden}" if letter == "H" else f"H={hidden}, {letter}={width}"


def entering(op: str, name: str, got: torch.Tensor, input: torch.Tensor, width: int, letter: str = "H") -> torch.Tensor:
    """A state to reset to, "H", "B H" or "T B H", expanded to "T B H"."""
    check_tensor(op, name, got)
    check_dense(op, name, got)
    full = (input.shape[0], input.shape[1], width)
    if not 1 <= got.dim() <= 3 or tuple(got.shape) != full[3 - got.dim() :]:
        sizes = f"T={full[0]}, B={full[1]}, {letter}={width}"
        fail(op, name, f"[{letter}], [B {letter}] or [T B {letter}] with {sizes}", f"shape {tuple(got.shape)}")
    check_floating(op, input=input, **{name: got})
    return got.expand(full)


def check_reset_state(op: str, reset: Any, reset_state: Any) -> None:
    if reset is None and reset_state is not None:
        fail(op, "reset_state", "None without reset", type(reset_state).__name__)


def needs_gradients(floating: tuple[torch.Tensor | None, ...]) -> bool:
    """A trace may be run with and without gradients later, and must be the same each time it is made."""
    return (
        jit_tracing() or functorch_active() or (torch.is_grad_enabled() and True in [t is not None and t.requires_grad for t in floating])
    )


def layer_products(input: torch.Tensor, weight_ih: torch.Tensor, weight_hh: torch.Tensor, recompute: bool = False) -> tuple[Product, ...]:
    """What a layer multiplies at all steps: inputs, and states, which follow from every input; "recompute" runs forward again."""
    steps, again = input.shape[0] * input.shape[1], int(recompute)
    from_state = Product(steps * weight_hh.numel(), "*", "weight_hh", again=again)
    return Product(steps * weight_ih.numel(), "input", "weight_ih", again=again), from_state

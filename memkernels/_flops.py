"""The matrix products of an op, and how many floating operations they take: for torch.utils.flop_counter and the benchmarks' floors."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from memkernels import _compat

COUNTER = "torch.utils.flop_counter"


class Product(NamedTuple):
    """A matrix product in the formula of an op.

    Args:
        pairs: its multiplications, each with an addition: M * N * K of "M K" by "K N".
        left, right: names of the inputs that either factor follows from; backward multiplies once for each factor with an input that
            needs a gradient. "*": any input.
        gradient: pairs of such a product of backward, where they are fewer.
        again: times that backward computes the product itself again.
    """

    pairs: int
    left: str = "*"
    right: str = "*"
    gradient: int | None = None
    again: int = 0

    def backward(self, needed: set[str]) -> int:
        """Pairs of backward for the gradients of these inputs."""
        factors = sum(bool(needed if names == "*" else needed.intersection(names.split())) for names in (self.left, self.right))
        return factors * (self.pairs if self.gradient is None else self.gradient) + self.again * self.pairs


def forward_flops(products: Iterable[Product]) -> int:
    """Floating operations of forward."""
    return 2 * sum(p.pairs for p in products)


def backward_flops(products: Iterable[Product], needed: Iterable[str]) -> int:
    """Floating operations of backward for the gradients of the inputs that are needed."""
    names = set(needed)
    return 2 * sum(p.backward(names) for p in products) if names else 0


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function once, after a module was imported for the first time."""

    def __init__(self, name: str, call: Callable[[], None]):
        self.name, self.call = name, call

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_call(module: Any) -> None:
                execute(module)
                self.call()

            spec.loader.exec_module = then_call  # type: ignore[method-assign]
        return spec


_formulas: dict[Any, Callable[..., int]] = {}  # by op packet: those that torch's counter has not got yet


def register(packet: Any, formula: Callable[..., int]) -> None:
    """Give torch's counter a formula, (*arguments of the op) -> flops: at once if it is imported, else as soon as it is.

    To import it here would take Triton along, and a tenth of a second.
    """
    if not _formulas and COUNTER not in sys.modules:
        sys.meta_path.insert(0, _WhenImported(COUNTER, _hand_over))
    _formulas[packet] = _by_position(packet, formula)
    if COUNTER in sys.modules:
        _hand_over()


def _hand_over() -> None:
    while _formulas:
        packet, formula = _formulas.popitem()
        sys.modules[COUNTER].register_flop_formula(packet, get_raw=True)(formula)


def _by_position(packet: Any, formula: Callable[..., int]) -> Callable[..., int]:
    names = _compat.argument_names(packet)

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, *(kwargs[name] for name in names[len(args) :]))

    return count

"""A spec's call as the op sees it, and the same function as plain torch: what autograd, transforms and compilers are checked against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from cases import Case

from memkernels import _backends, _compat, _registry
from memkernels.testing import compare, inputs
from memkernels.testing.spec import Tensors


def flat_call(case: Case, given: Tensors) -> tuple[_registry.RoutedOp, tuple[Any, ...]]:
    """The registered op and the flat arguments that the public function passes to it when every floating input needs a gradient."""
    names = case.differentiable(given)
    leaves = {n: t.detach().requires_grad_() if n in names else t for n, t in given.items()}
    return case.spec.call(lambda *a, **k: _registry.capture(case.spec.function, *a, **k), leaves, case.options)


def floats(op: _registry.RoutedOp, args: tuple[Any, ...]) -> list[bool]:
    """For each differentiable input of the op: whether this call has it as a floating tensor."""
    return [t is not None and t.is_floating_point() for t, a in zip(args, op.inputs) if a.differentiable]


def backward_arguments(op: _registry.RoutedOp, args: tuple[Any, ...], outputs: Any, seed: int = 0) -> list[Any]:
    """Arguments of the backward op: random upstream gradients, inputs, saved outputs, options, every gradient asked for."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = [
        None if t is None else torch.randn(t.shape, dtype=torch.float64, generator=inputs.generator("flat", seed, i)).to(t.dtype)
        for i, t in enumerate(outputs)
    ]
    douts = [g for g, o in zip(values, op.outputs) if o.differentiable]
    saved = [None if t is None else t.detach() for t, o in zip(outputs, op.outputs) if o.save]
    tensors, options = args[: len(op.inputs)], args[len(op.inputs) :]
    return [*douts, *(None if t is None else t.detach() for t in tensors), *saved, *options, floats(op, args)]


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, every op is its reference's forward in plain torch: no op, no Function, no vmap rule."""
    routed, call_kind = _registry.RoutedOp._route, _compat.call_kind
    _compat.call_kind = lambda args, inputs: _compat.ROUTED
    _registry.RoutedOp._route = lambda self, args: tuple(_backends.reference(self.name).forward(*args))  # type: ignore[method-assign]
    try:
        yield
    finally:
        _registry.RoutedOp._route, _compat.call_kind = routed, call_kind  # type: ignore[method-assign]


def of_tensors(case: Case, given: Tensors, forced: bool = True) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """(function of the differentiable inputs alone, those inputs): what gradcheck, torch.func and export take.

    The function returns the outputs that carry a gradient, and always all of them.
    """
    names = case.differentiable(given)
    rest = {n: t for n, t in given.items() if n not in names}
    leaves = {n: given[n].detach().requires_grad_() for n in names}
    live = [i for i, t in enumerate(case.call({**rest, **leaves})) if t.requires_grad]
    order = list(given)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = {**rest, **dict(zip(names, tensors))}
        arguments = {n: values[n] for n in order}
        if forced:
            with compare.using(case.backend):
                outputs = inputs.tensors_of(case.spec.call(case.spec.function, arguments, case.options))
        else:
            outputs = inputs.tensors_of(case.spec.call(case.spec.function, arguments, case.options))
        return tuple(outputs[i] for i in live)

    return function, [given[n].detach() for n in names]

"""What an op declares, and what follows from it alone: schemas, fakes, and the calls into a backend."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from memkernels import _backends, _compat
from memkernels._flops import Product, backward_flops, forward_flops


@dataclass(frozen=True)
class Arg:
    """A tensor argument. `batch` is the axis of B in it, None for a tensor that the whole batch shares.

    `by_row`: what it does to a row depends on the place of the row in the batch (a seed), so that vmap may not fold into the batch.
    """

    name: str
    differentiable: bool = True
    optional: bool = False
    batch: int | None = 0
    by_row: bool = False


@dataclass(frozen=True)
class Out:
    """An output. `save`: backward receives it."""

    name: str
    differentiable: bool = True
    save: bool = False
    batch: int | None = 0


class Op:
    """A declared op; `_registry.define_op` gives it its torch ops and its autograd Functions.

    Args:
        name: op name. inputs, outputs: the tensors in order. options: schema text of the other arguments.
        allocate: (*inputs, *options) -> fresh contiguous outputs, None for one that is not asked for. autocast: "matmul" or "float32".
        products: (*inputs, *options) -> the matrix products of the formula.
    """

    op: Any  # torch.ops.memkernels.<name>.default
    backward_op: Any
    function: Any  # the autograd.Function
    eager_apply: Any  # its apply on plain tensors, without functorch's bookkeeping

    def __init__(
        self,
        name: str,
        inputs: tuple[Arg, ...],
        outputs: tuple[Out, ...],
        options: str,
        allocate: Callable[..., tuple[torch.Tensor, ...]],
        autocast: str,
        products: Callable[..., tuple[Product, ...]] | None = None,
    ):
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.options, self.allocate, self.autocast = options, allocate, autocast
        self.products = products or (lambda *args: ())
        self.reference = _backends.reference(name)
        self.n_inputs = len(inputs)
        self.saved = tuple(o for o in outputs if o.save)
        self.differentiable = tuple(i for i, a in enumerate(inputs) if a.differentiable)
        self.differentiable_outputs = tuple(i for i, o in enumerate(outputs) if o.differentiable)
        self.saved_outputs = tuple(i for i, o in enumerate(outputs) if o.save)
        self.by_row = tuple(i for i, a in enumerate(inputs) if a.by_row)
        # Where the arguments of the backward op end: upstream gradients, inputs, saved outputs, then options and needs.
        self.end_douts = len(self.differentiable_outputs)
        self.end_inputs = self.end_douts + len(inputs)
        self.end_saved = self.end_inputs + len(self.saved)

    def schemas(self) -> tuple[str, str]:
        """The schema of the op and of its backward."""
        inputs = [(a.name, a.optional) for a in self.inputs]
        douts = [(f"d{self.outputs[i].name}", True) for i in self.differentiable_outputs]
        saved = [(f"saved_{o.name}", True) for o in self.saved]
        options = f", {self.options}" if self.options else ""
        forward = f"{self.name}({_tensors(inputs)}{options}) -> {_returns(len(self.outputs))}"
        gradients = _returns(len(self.differentiable))
        backward = f"{self.name}_backward({_tensors(douts + inputs + saved)}{options}, bool[] needs) -> {gradients}"
        return forward, backward

    def run(self, *args: Any) -> Any:
        """The torch op: forward on the backend that was chosen."""
        return single(filled(self.compute(*args), args[0]))

    def run_fake(self, *args: Any) -> Any:
        return single(filled(self.allocate(*args), args[0]))

    def compute(self, *args: Any) -> tuple[torch.Tensor | None, ...]:
        """All outputs; None for one that was not asked for."""
        module, is_reference = _backends.choose(self.name, _device_type(args[0]), args)
        if is_reference:
            return self.allocate(*args) if args[0].is_meta else fresh(module.forward(*args), args)
        outputs = self.allocate(*args)
        module.forward(*outputs, *args)
        return outputs

    def run_backward(self, *args: Any) -> Any:
        """The torch op of backward; arguments as in its schema."""
        doutputs, inputs = args[: self.end_douts], args[self.end_douts : self.end_inputs]
        found = self.gradients(doutputs, inputs, args[self.end_inputs : self.end_saved], args[self.end_saved : -1], args[-1])
        return single(filled(found, inputs[0]))

    def gradients(self, doutputs: Any, inputs: Any, saved: Any, options: Any, needs: Any) -> list[torch.Tensor | None]:
        """One gradient per differentiable input, None where `needs` says so."""
        module, is_reference = _backends.choose(self.name, _device_type(inputs[0]), (*inputs, *options))
        if is_reference:
            found = module.backward(*doutputs, *inputs, *saved, *options)
            return self._reference_gradients(found, (*doutputs, *inputs, *saved), inputs, needs)
        gradients = _compat.empty_gradients(inputs, self.differentiable, needs)
        if saved:  # contiguous, as forward made them: vmap rules hand over views
            saved = [t if t is None else t.contiguous() for t in saved]
        module.backward(*gradients, *doutputs, *inputs, *saved, *options)
        return gradients

    def _reference_gradients(self, found: Any, given: Any, inputs: Any, needs: Any) -> list[torch.Tensor | None]:
        tensors = [inputs[i] for i in self.differentiable]
        kept = iter(fresh(tuple(g.to(t.dtype).expand(t.shape) for g, t, need in zip(found, tensors, needs) if need), given))
        return [next(kept) if need else None for need in needs]

    def run_backward_fake(self, *args: Any) -> Any:
        inputs, needs = args[self.end_douts : self.end_inputs], args[-1]
        return single(filled(tuple(empty_like(inputs[i]) if need else None for i, need in zip(self.differentiable, needs)), inputs[0]))

    def flops(self, *args: Any) -> int:
        """Floating operations of the matrix products of forward; arguments as in its schema."""
        return forward_flops(self.products(*args))

    def backward_flops(self, *args: Any) -> int:
        """Those of backward; arguments as in its schema."""
        needed = (self.inputs[i].name for i, need in zip(self.differentiable, args[-1]) if need)
        return backward_flops(self.products(*args[self.end_douts : self.end_inputs], *args[self.end_saved : -1]), needed)

    def pure_backward(self, doutputs: Any, inputs: Any, options: Any, needs: Any) -> tuple[torch.Tensor, ...]:
        """The reference gradient as a function of upstream gradients and inputs alone: saved outputs are computed again."""
        outputs = self.reference.forward(*inputs, *options)
        found = self.reference.backward(*doutputs, *inputs, *(outputs[i] for i in self.saved_outputs), *options)
        wanted = ((g, inputs[i]) for g, i, need in zip(found, self.differentiable, needs) if need)
        return tuple(g.to(t.dtype).expand(t.shape) for g, t in wanted)


def _tensors(names: list[tuple[str, bool]]) -> str:
    return ", ".join(f"Tensor{'?' if optional else ''} {name}" for name, optional in names)


def _returns(n: int) -> str:
    return "Tensor" if n == 1 else f"({', '.join(['Tensor'] * n)})"


def _device_type(tensor: torch.Tensor) -> str:
    """`tensor.device.type`, for tensors on a CPU in a quarter of the time."""
    return "cpu" if tensor.is_cpu else tensor.device.type


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of the same size and type."""
    return _compat.empty(tensor, None, None)


def new_empty(like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A contiguous tensor on the device of `like`, of its dtype unless one is given; for a small call faster than `like.new_empty`."""
    return _compat.empty(like, shape, dtype)


def new_empties(like: torch.Tensor, *shapes_and_dtypes: Any) -> Any:
    """`new_empty` of several, each given by its shape and its dtype, one after the other; None where the shape is None.

    A small call spends more on its outputs than on the kernel; made in one call they take two thirds of the time.
    """
    return _compat.empties(like, *shapes_and_dtypes)


def filled(outputs: Iterable[torch.Tensor | None], like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Torch ops return tensors only: an empty one stands for None."""
    return tuple([new_empty(like, (0,)) if t is None else t for t in outputs])


def picker(places: tuple[int, ...]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that takes the items at these places out of a tuple; the first few, as they mostly are, without a loop."""
    if places == tuple(range(len(places))):
        return operator.itemgetter(slice(len(places)))
    return lambda items: tuple([items[i] for i in places])


def single(outputs: tuple[Any, ...]) -> Any:
    """A torch op with one output returns the tensor, not a tuple of it."""
    return outputs[0] if len(outputs) == 1 else outputs


def fresh(outputs: tuple[torch.Tensor, ...], inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Contiguous outputs that alias neither an input nor each other: what the fakes promise and torch.library demands."""
    taken = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
    found = []
    for out in outputs:
        out = out.contiguous()
        storage = out.untyped_storage().data_ptr()
        found.append(out.clone() if out.numel() == 0 or storage in taken else out)
        taken.add(storage)
    return tuple(found)

"""What an op declares, and what follows from it alone: schemas, fakes, and the calls into a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from memkernels import _backends


@dataclass(frozen=True)
class Arg:
    """A tensor argument. `batch` is the axis of B in it, None for a tensor that the whole batch shares."""

    name: str
    differentiable: bool = True
    optional: bool = False
    batch: int | None = 0


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
        allocate: (*inputs, *options) -> fresh contiguous outputs. autocast: "matmul" or "float32".
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
    ):
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.options, self.allocate, self.autocast = options, allocate, autocast
        self.reference = _backends.reference(name)
        self.saved = tuple(o for o in outputs if o.save)
        self.differentiable = tuple(i for i, a in enumerate(inputs) if a.differentiable)
        self.differentiable_outputs = tuple(i for i, o in enumerate(outputs) if o.differentiable)
        self.saved_outputs = tuple(i for i, o in enumerate(outputs) if o.save)
        # Where the arguments of the backward op end: upstream gradients, inputs, saved outputs, then options and needs.
        self.end_douts = len(self.differentiable_outputs)
        self.end_inputs = self.end_douts + len(inputs)
        self.end_saved = self.end_inputs + len(self.saved)

    def schemas(self) -> tuple[str, str]:
        """The schema of the op and of its backward."""
        inputs = [(a.name, a.optional) for a in self.inputs]
        douts = [(f"d{self.outputs[i].name}", True) for i in self.differentiable_outputs]
        saved = [(f"saved_{o.name}", False) for o in self.saved]
        options = f", {self.options}" if self.options else ""
        forward = f"{self.name}({_tensors(inputs)}{options}) -> {_returns(len(self.outputs))}"
        gradients = _returns(len(self.differentiable))
        backward = f"{self.name}_backward({_tensors(douts + inputs + saved)}{options}, bool[] needs) -> {gradients}"
        return forward, backward

    def run(self, *args: Any) -> Any:
        """Forward on the backend that was chosen."""
        module, is_reference = _backends.choose(self.name, args)
        if is_reference:
            return single(fresh(module.forward(*args), args))
        outputs = self.allocate(*args)
        module.forward(*outputs, *args)
        return single(outputs)

    def run_fake(self, *args: Any) -> Any:
        return single(self.allocate(*args))

    def run_backward(self, *args: Any) -> Any:
        """Backward on the backend that was chosen; arguments as in the backward op's schema."""
        inputs, needs = args[self.end_douts : self.end_inputs], args[-1]
        module, is_reference = _backends.choose(self.name, (*inputs, *args[self.end_saved : -1]))
        if is_reference:
            return single(self._reference_gradients(module.backward(*args[:-1]), args, inputs, needs))
        gradients = [inputs[i].new_empty(inputs[i].shape) if need else None for i, need in zip(self.differentiable, needs)]
        saved = (t.contiguous() for t in args[self.end_inputs : self.end_saved])  # as forward made them: vmap rules hand over views
        module.backward(*gradients, *args[: self.end_inputs], *saved, *args[self.end_saved : -1])
        return single(tuple(inputs[0].new_empty(0) if g is None else g for g in gradients))

    def _reference_gradients(self, found: Any, args: Any, inputs: Any, needs: Any) -> tuple[torch.Tensor, ...]:
        tensors = [inputs[i] for i in self.differentiable]
        kept = (g.to(t.dtype).expand(t.shape) if need else inputs[0].new_empty(0) for g, t, need in zip(found, tensors, needs))
        return fresh(tuple(kept), args)

    def run_backward_fake(self, *args: Any) -> Any:
        inputs, needs = args[self.end_douts : self.end_inputs], args[-1]
        shapes = ((inputs[i].shape, inputs[i]) if need else ((0,), inputs[0]) for i, need in zip(self.differentiable, needs))
        return single(tuple(like.new_empty(shape) for shape, like in shapes))

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

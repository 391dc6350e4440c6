"""The one path every op takes (design.md section 2): schema, fakes, chooser, gradient, vmap, router. An op file only declares."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from memkernels import _backends, _vmap
from memkernels._compat import forward_ad_active, functorch_active

LIBRARY = torch.library.Library("memkernels", "DEF")
OPS: dict[str, Op] = {}
_TAGS = (torch.Tag.pt2_compliant_tag,)


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


@dataclass(frozen=True)
class Op:
    """A registered op. Call it with all inputs and options, positionally; it returns the tuple of all outputs."""

    name: str
    inputs: tuple[Arg, ...]
    outputs: tuple[Out, ...]
    options: str
    allocate: Callable[..., tuple[torch.Tensor, ...]]
    autocast: str
    made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def op(self) -> Any:
        return self.made["op"]

    @property
    def backward_op(self) -> Any:
        return self.made["backward_op"]

    @property
    def function(self) -> Any:
        return self.made["function"]

    @property
    def reference(self) -> Any:
        return self.made["reference"]

    @property
    def saved(self) -> tuple[Out, ...]:
        return tuple(o for o in self.outputs if o.save)

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        if _captured is not None and _captured.owner == threading.get_ident():
            raise _Captured(self, args)
        device = args[0].device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self._route(_autocast(self, args, device))
        return self._route(args)

    def _route(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        functorch = functorch_active()
        if forward_ad_active() or (functorch and torch.compiler.is_compiling()):
            return tuple(self.reference.forward(*args))
        out = self.made["function"].apply(*args) if functorch else self.made["op"](*args)
        return out if isinstance(out, tuple) else (out,)


class _Captured(Exception):
    """Carries the op and its flat arguments out of a public function."""

    def __init__(self, op: Op, args: tuple[Any, ...]):
        self.op, self.args_flat = op, args


@dataclass(frozen=True)
class _Capture:
    owner: int


_captured: _Capture | None = None
_capture_lock = threading.Lock()


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Op, tuple[Any, ...]]:
    """The op that a public function would call, and the flat arguments it would pass; nothing is computed."""
    global _captured
    with _capture_lock:
        _captured = _Capture(threading.get_ident())
        try:
            function(*args, **kwargs)
        except _Captured as found:
            return found.op, found.args_flat
        finally:
            _captured = None
    raise ValueError(f"{getattr(function, '__name__', function)} calls no memkernels op")


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Every backend with the reason why it cannot run this call, or None; the first None in order is the one that runs.

    Args:
        op: name of a public op, e.g. "content_read", or the public function. args, kwargs: what one would pass to it.

    Returns:
        {backend: reason or None}, best backend for the device first.

    Example:
        >>> import torch, memkernels as mk
        >>> mk.explain("memory_read", torch.ones(1, 2, 3), torch.ones(1, 1, 2))["reference"] is None
        True
    """
    if isinstance(op, str):
        import memkernels

        if op not in OPS:
            raise ValueError(f"explain: op: expected one of {', '.join(sorted(OPS))}, got {op!r}")
        op = getattr(memkernels, op)
    found, flat = capture(op, *args, **kwargs)
    device = _backends.device_type(flat)
    order = _backends.ORDER.get(device, ("reference",))
    names = (*order, *(n for n in _backends.NAMES if n not in order))
    return {name: _backends.refusal(name, found.name, device, flat) for name in names}


def _autocast(op: Op, args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """torch's autocast rule: float32 and half inputs go to one dtype, float64 stays."""
    target = torch.get_autocast_dtype(device) if op.autocast == "matmul" else torch.float32
    cast = [
        a.to(target) if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
        for a in args[: len(op.inputs)]
    ]
    return (*cast, *args[len(op.inputs) :])


def _single(outputs: tuple[Any, ...]) -> Any:
    return outputs[0] if len(outputs) == 1 else outputs


def _fresh(outputs: tuple[torch.Tensor, ...], inputs: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Contiguous outputs that alias neither an input nor each other: what the fakes promise and torch.library demands."""
    taken = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
    fresh = []
    for out in outputs:
        out = out.contiguous()
        storage = out.untyped_storage().data_ptr()
        fresh.append(out.clone() if out.numel() == 0 or storage in taken else out)
        taken.add(storage)
    return tuple(fresh)


def _forward_impl(op: Op, *args: Any) -> Any:
    _, module = _backends.choose(op.name, args)
    if _backends.is_reference(module):
        return _single(_fresh(module.forward(*args), args))
    outputs = op.allocate(*args)
    module.forward(*outputs, *args)
    return _single(outputs)


def _split(op: Op, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], tuple[Any, ...], Any]:
    """Arguments of the backward op -> d<outputs>, inputs, saved outputs, options, needs."""
    a = sum(o.differentiable for o in op.outputs)
    b = a + len(op.inputs)
    c = b + len(op.saved)
    return args[:a], args[a:b], args[b:c], args[c:-1], args[-1]


def _gradients(op: Op, inputs: tuple[Any, ...], needs: list[bool]) -> list[torch.Tensor | None]:
    """One fresh tensor per differentiable input that needs a gradient, None for the others."""
    differentiable = [t for t, arg in zip(inputs, op.inputs) if arg.differentiable]
    return [t.new_empty(t.shape) if need else None for t, need in zip(differentiable, needs)]


def _filled(gradients: list[Any], inputs: tuple[Any, ...]) -> Any:
    return _single(tuple(inputs[0].new_empty(0) if g is None else g for g in gradients))


def _backward_impl(op: Op, *args: Any) -> Any:
    doutputs, inputs, saved, options, needs = _split(op, args)
    _, module = _backends.choose(op.name, (*inputs, *options))
    if not _backends.is_reference(module):
        gradients = _gradients(op, inputs, needs)
        module.backward(*gradients, *doutputs, *inputs, *saved, *options)
        return _filled(gradients, inputs)
    found = module.backward(*doutputs, *inputs, *saved, *options)
    differentiable = [t for t, arg in zip(inputs, op.inputs) if arg.differentiable]
    kept = [g.to(t.dtype).expand(t.shape) if need else t.new_empty(0) for g, t, need in zip(found, differentiable, needs) if t is not None]
    kept_iter = iter(_fresh(tuple(kept), args))
    return _filled([None if t is None else next(kept_iter) for t in differentiable], inputs)


def _backward_fake(op: Op, *args: Any) -> Any:
    _, inputs, _, _, needs = _split(op, args)
    return _filled(_gradients(op, inputs, needs), inputs)


def _schemas(op: Op) -> tuple[str, str]:
    def tensors(names: list[tuple[str, bool]]) -> str:
        return ", ".join(f"Tensor{'?' if optional else ''} {name}" for name, optional in names)

    def returns(n: int) -> str:
        return "Tensor" if n == 1 else f"({', '.join(['Tensor'] * n)})"

    inputs = [(a.name, a.optional) for a in op.inputs]
    douts = [(f"d{o.name}", True) for o in op.outputs if o.differentiable]
    saved = [(f"saved_{o.name}", False) for o in op.saved]
    options = f", {op.options}" if op.options else ""
    n_gradients = sum(a.differentiable for a in op.inputs)
    return (
        f"{op.name}({tensors(inputs)}{options}) -> {returns(len(op.outputs))}",
        f"{op.name}_backward({tensors(douts + inputs + saved)}{options}, bool[] needs) -> {returns(n_gradients)}",
    )


def _backward_function(op: Op) -> type[torch.autograd.Function]:
    """The Function of the backward op: its own backward differentiates the reference, so every order is right."""

    def forward(*args: Any) -> Any:
        return op.backward_op(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        doutputs, tensors, saved, options, needs = _split(op, inputs)
        ctx.save_for_backward(*doutputs, *tensors)
        ctx.rest = options, needs, len(inputs)

    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        options, needs, n_args = ctx.rest
        leaves = ctx.saved_tensors
        n_douts = len(leaves) - len(op.inputs)
        active = [
            i
            for i, t in enumerate(leaves)
            if t is not None and t.is_floating_point() and (i < n_douts or op.inputs[i - n_douts].differentiable)
        ]
        pure = partial(_pure_backward, op, leaves, active, n_douts, options, needs)
        values, pullback = torch.func.vjp(pure, *(leaves[i] for i in active))
        asked = [c for c, need in zip(cotangents, needs) if need]
        found = pullback(tuple(torch.zeros_like(v) if c is None else c for c, v in zip(asked, values)))
        gradients: list[Any] = [None] * n_args
        for i, gradient in zip(active, found):
            gradients[i] = gradient
        return tuple(gradients)

    axes = (
        *(o.batch for o in op.outputs if o.differentiable),
        *(a.batch for a in op.inputs),
        *(o.batch for o in op.saved),
    )
    out_axes = tuple(a.batch for a in op.inputs if a.differentiable)

    def sums_over_batch(args: tuple[Any, ...]) -> bool:
        return any(need and axis is None for need, axis in zip(args[-1], out_axes))

    namespace = {"forward": forward, "setup_context": setup_context, "backward": backward}
    function = type(_class_name(op, "BackwardFunction"), (torch.autograd.Function,), {k: staticmethod(v) for k, v in namespace.items()})
    function.vmap = staticmethod(_vmap.rule(function.apply, axes, out_axes, sums_over_batch))  # type: ignore[attr-defined]
    op.made["backward_vmap"] = _vmap.rule(op.backward_op, axes, out_axes, sums_over_batch)
    return function


def _pure_backward(op: Op, leaves: Any, active: list[int], n_douts: int, options: Any, needs: Any, *primals: torch.Tensor) -> Any:
    """The backward as a function of upstream gradients and inputs alone: saved outputs are computed again."""
    values = list(leaves)
    for i, primal in zip(active, primals):
        values[i] = primal
    doutputs, inputs = values[:n_douts], values[n_douts:]
    outputs = op.reference.forward(*inputs, *options)
    saved = [t for t, o in zip(outputs, op.outputs) if o.save]
    found = op.reference.backward(*doutputs, *inputs, *saved, *options)
    differentiable = [t for t, arg in zip(inputs, op.inputs) if arg.differentiable]
    return tuple(g.to(t.dtype).expand(t.shape) for g, t, need in zip(found, differentiable, needs) if need)


def _forward_function(op: Op, backward_function: Any) -> type[torch.autograd.Function]:
    n_inputs = len(op.inputs)
    differentiable = [i for i, a in enumerate(op.inputs) if a.differentiable]

    def forward(*args: Any) -> Any:
        return op.op(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        fixed = [t for t, o in zip(outputs, op.outputs) if not o.differentiable]
        if fixed:
            ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:n_inputs], *(t for t, o in zip(outputs, op.outputs) if o.save))
        ctx.options, ctx.backend = inputs[n_inputs:], _backends.forced.get()

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        doutputs = [g for g, o in zip(grads, op.outputs) if o.differentiable]
        result: list[Any] = [None] * (n_inputs + len(ctx.options))
        saved = ctx.saved_tensors
        needs = [bool(ctx.needs_input_grad[i]) and saved[i] is not None for i in differentiable]
        if all(g is None for g in doutputs) or not any(needs):
            return tuple(result)
        args = (*doutputs, *saved, *ctx.options, needs)
        first_order = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        with _as_in_forward(ctx.backend, saved):
            found = op.backward_op(*args) if first_order else backward_function.apply(*args)
        for i, need, gradient in zip(differentiable, needs, found if isinstance(found, tuple) else (found,)):
            result[i] = gradient if need else None
        return tuple(result)

    axes, out_axes = tuple(a.batch for a in op.inputs), tuple(o.batch for o in op.outputs)
    namespace = {"forward": forward, "setup_context": setup_context, "backward": backward}
    function = type(_class_name(op, "Function"), (torch.autograd.Function,), {k: staticmethod(v) for k, v in namespace.items()})
    function.vmap = staticmethod(_vmap.rule(function.apply, axes, out_axes, lambda args: False))  # type: ignore[attr-defined]
    op.made["vmap"] = _vmap.rule(op.op, axes, out_axes, lambda args: False)
    return function


@contextlib.contextmanager
def _restored(name: str | None, device: str, autocast: bool) -> Any:
    with _backends.backend(name), torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        yield


_NOTHING = contextlib.nullcontext()


def _as_in_forward(name: str | None, saved: tuple[Any, ...]) -> Any:
    """Backward may run in another thread or context: with the backend forward was forced to, and never under autocast."""
    device = saved[0].device.type
    autocast = torch.is_autocast_enabled(device)
    return _restored(name, device, autocast) if autocast or name is not None else _NOTHING


def _class_name(op: Op, suffix: str) -> str:
    return "".join(part.capitalize() for part in op.name.split("_")) + suffix


def _no_second_order(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}_backward: cannot be differentiated as a raw op; call the public function memkernels.{name}")

    return refuse


def define_op(
    name: str,
    *,
    inputs: tuple[Arg, ...],
    outputs: tuple[Out, ...],
    allocate: Callable[..., tuple[torch.Tensor, ...]],
    options: str = "",
    autocast: str = "float32",
) -> Op:
    """Register `memkernels::<name>` and `memkernels::<name>_backward` with fakes, gradient and vmap.

    Args:
        name: op name. inputs, outputs: the tensors in order. options: schema text of the other arguments.
        allocate: (*inputs, *options) -> fresh contiguous outputs; on fake tensors it is the fake kernel.
        autocast: "matmul" (inputs go to the autocast dtype) or "float32".
    """
    op = Op(name, inputs, outputs, options, allocate, autocast)
    op.made["reference"] = _backends.reference(name)
    schema, backward_schema = _schemas(op)
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.define(backward_schema, tags=_TAGS)
    LIBRARY.impl(name, partial(_forward_impl, op), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{name}_backward", partial(_backward_impl, op), "CompositeExplicitAutograd")
    op.made["op"] = getattr(torch.ops.memkernels, name).default
    op.made["backward_op"] = getattr(torch.ops.memkernels, f"{name}_backward").default
    torch.library.register_fake(f"memkernels::{name}", lambda *args: _single(allocate(*args)), lib=LIBRARY)
    torch.library.register_fake(f"memkernels::{name}_backward", partial(_backward_fake, op), lib=LIBRARY)
    op.made["backward_function"] = backward_function = _backward_function(op)
    op.made["function"] = function = _forward_function(op, backward_function)
    torch.library.register_autograd(op.op, function.backward, setup_context=function.setup_context, lib=LIBRARY)  # type: ignore[attr-defined]
    torch.library.register_autograd(op.backward_op, _no_second_order(name), lib=LIBRARY)
    torch.library.register_vmap(op.op, op.made["vmap"], lib=LIBRARY)
    torch.library.register_vmap(op.backward_op, op.made["backward_vmap"], lib=LIBRARY)
    OPS[name] = op
    return op


def define_inplace(name: str, of: Op) -> Callable[..., None]:
    """Register `memkernels::<name>`: the op `of` with its one output written into its first input; no autograd."""
    first, *others = of.inputs
    rest = "".join(f", Tensor{'?' if a.optional else ''} {a.name}" for a in others) + (f", {of.options}" if of.options else "")
    LIBRARY.define(f"{name}(Tensor(a!) {first.name}{rest}) -> ()", tags=_TAGS)

    def run(*args: Any) -> None:
        _, module = _backends.choose(of.name, args)
        if _backends.is_reference(module):
            args[0].copy_(module.forward(*args)[0])
        else:
            module.forward(args[0], *args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memkernels::{name}", lambda *args: None, lib=LIBRARY)
    return getattr(torch.ops.memkernels, name).default

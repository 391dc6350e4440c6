"""The two autograd Functions of an op: the gradient by the backward op, and the gradient of that by the reference."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from memkernels import _backends, _compat, _vmap
from memkernels._compat import PLAIN_CALL, autocast_enabled, eager_apply, functorch_active, untraced
from memkernels._op import Op, filled, picker


def attach(op: Op) -> None:
    """Make the Functions of an op whose torch ops are registered; sets `function`, `eager_apply`, and returns nothing."""
    general = _general_backward(op)
    op.function = _forward_function(op, general)
    op.eager_apply = eager_apply(_eager_function(op, general))


def vmap_rules(op: Op) -> tuple[Any, Any]:
    """The vmap rules of the raw ops, for torch.library.register_vmap."""
    return _forward_rule(op, op.op), _backward_rule(op, op.backward_op)


def refuse_second_order(name: str) -> Any:
    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}_backward: cannot be differentiated as a raw op; call the public function memkernels.{name}")

    return refuse


def _class(op: Op, suffix: str, **methods: Any) -> Any:
    name = "".join(part.capitalize() for part in op.name.split("_")) + suffix
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


def _forward_rule(op: Op, call: Any) -> Any:
    def depends_on_rows(args: tuple[Any, ...]) -> bool:
        return any(args[i] is not None for i in op.by_row)

    return _vmap.rule(call, [a.batch for a in op.inputs], [o.batch for o in op.outputs], depends_on_rows)


def _backward_rule(op: Op, call: Any) -> Any:
    douts = [op.outputs[i].batch for i in op.differentiable_outputs]
    out_axes = [op.inputs[i].batch for i in op.differentiable]

    def must_loop(args: tuple[Any, ...]) -> bool:
        sums_over_batch = any(need and axis is None for need, axis in zip(args[-1], out_axes))
        return sums_over_batch or any(args[op.end_douts + i] is not None for i in op.by_row)

    return _vmap.rule(call, [*douts, *(a.batch for a in op.inputs), *(o.batch for o in op.saved)], out_axes, must_loop)


def _forward_function(op: Op, general: Any) -> Any:
    n_inputs = len(op.inputs)
    fixed = tuple(i for i, o in enumerate(op.outputs) if not o.differentiable)

    def forward(*args: Any) -> Any:
        return op.op(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if fixed:
            ctx.mark_non_differentiable(*(outputs[i] for i in fixed))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:n_inputs], *(outputs[i] for i in op.saved_outputs))
        ctx.options, ctx.backend = inputs[n_inputs:], _backends.forced.get()

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        return general(ctx, ctx.saved_tensors, grads)

    function = _class(op, "Function", forward=forward, setup_context=setup_context, backward=backward)
    function.vmap = staticmethod(_forward_rule(op, lambda *args: function.apply(*args)))
    return function


def _general_backward(op: Op) -> Any:
    backward_function = _backward_function(op)

    def backward(ctx: Any, saved: tuple[Any, ...], grads: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
        doutputs = [grads[i] for i in op.differentiable_outputs]
        result: list[Any] = [None] * (len(op.inputs) + len(ctx.options))
        needed = ctx.needs_input_grad
        needs = [bool(needed[i]) and saved[i] is not None for i in op.differentiable]
        if all(g is None for g in doutputs) or True not in needs:
            return tuple(result)
        with _as_in_forward(ctx.backend, saved[0].device.type):
            found = _differentiate(op, backward_function, (*doutputs, *saved, *ctx.options, needs))
        for i, need, gradient in zip(op.differentiable, needs, found if isinstance(found, tuple) else (found,)):
            if need:
                result[i] = gradient
        return tuple(result)

    return backward


def _eager_function(op: Op, general: Any) -> Any:
    """The same Function for plain calls: it computes without the dispatcher and without what only other calls need."""
    n_inputs, n_leading = len(op.inputs), len(op.differentiable)
    fixed = picker(tuple(i for i, o in enumerate(op.outputs) if not o.differentiable))
    kept, given, asked = picker(op.saved_outputs), picker(op.differentiable_outputs), picker(op.differentiable)
    leading = op.differentiable == tuple(range(n_leading))
    all_differentiable = len(op.differentiable_outputs) == len(op.outputs)

    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        outputs = filled(op.compute(*args), args[0])  # as the torch op has it: checkpointing compares what two calls save
        if not all_differentiable:
            ctx.mark_non_differentiable(*fixed(outputs))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:n_inputs], *kept(outputs))
        ctx.options, ctx.backend = args[n_inputs:], _backends.forced.get()
        return outputs

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad  # once: some hooks hand a saved tensor out only once
        plain = not torch.is_grad_enabled() and ctx.backend is None and _compat.call_kind((*grads, *saved), len(grads)) == PLAIN_CALL
        doutputs = given(grads)
        if not plain or all([g is None for g in doutputs]):
            return general(ctx, saved, grads)
        found = op.gradients(doutputs, saved[:n_inputs], saved[n_inputs:], ctx.options, asked(needed))
        if leading:
            return (*found, *(None,) * (len(needed) - n_leading))
        result: list[Any] = [None] * len(needed)
        for i, gradient in zip(op.differentiable, found):
            result[i] = gradient
        return tuple(result)

    return _class(op, "EagerFunction", forward=forward, backward=backward)


def _differentiate(op: Op, backward_function: Any, args: tuple[Any, ...]) -> Any:
    """First order: the backward op. Under create_graph or functorch: the Function around it, which can be differentiated again."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return (untraced(backward_function.apply) if functorch_active() else backward_function.apply)(*args)
    return op.backward_op(*args)


def _backward_function(op: Op) -> Any:
    """Its own backward is the reference's `second_order`, or differentiates the reference: every order is right, never silently zero."""
    explicit = getattr(op.reference, "second_order", None)
    n_saved = op.end_inputs if explicit is None else op.end_saved

    def forward(*args: Any) -> Any:
        return op.backward_op(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:n_saved])
        ctx.options, ctx.needs, ctx.n_args = inputs[op.end_saved : -1], inputs[-1], len(inputs)

    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        saved, asked = ctx.saved_tensors, [c if need else None for c, need in zip(cotangents, ctx.needs)]
        if all(c is None for c in asked):
            return (None,) * ctx.n_args
        found = _explicit(ctx, saved, asked) if explicit else None
        return _by_reference(ctx, saved[: op.end_inputs], asked) if found is None else found

    def _explicit(ctx: Any, saved: tuple[Any, ...], cotangents: list[Any]) -> tuple[Any, ...] | None:
        """The gradient that nobody differentiates again, by the explicit pass if there is one for this call."""
        given = (*saved, *cotangents)
        if torch.is_grad_enabled() or _compat.call_kind(given, len(given)) != PLAIN_CALL:
            return None
        places = [*range(op.end_douts), *(op.end_douts + i for i in op.differentiable)]
        needs = [ctx.needs_input_grad[i] for i in places]
        found = op.reference.second_order(cotangents, needs, *saved, *ctx.options)
        if found is None:
            return None
        gradients: list[Any] = [None] * ctx.n_args
        for i, need, gradient in zip(places, needs, found):
            if need and saved[i] is not None:
                gradients[i] = gradient
        return tuple(gradients)

    def _by_reference(ctx: Any, leaves: tuple[Any, ...], asked: list[Any]) -> tuple[Any, ...]:
        n = op.end_douts
        active = [i for i, t in enumerate(leaves) if t is not None and t.is_floating_point() and (i < n or op.inputs[i - n].differentiable)]

        def pure(*primals: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values = list(leaves)
            for i, primal in zip(active, primals):
                values[i] = primal
            return op.pure_backward(values[:n], values[n:], ctx.options, ctx.needs)

        values, pullback = torch.func.vjp(pure, *(leaves[i] for i in active))[:2]
        cotangents = [c for c, need in zip(asked, ctx.needs) if need]
        found = pullback(tuple(torch.zeros_like(v) if c is None else c for c, v in zip(cotangents, values)))
        gradients: list[Any] = [None] * ctx.n_args
        for i, gradient in zip(active, found):
            gradients[i] = gradient
        return tuple(gradients)

    function = _class(op, "BackwardFunction", forward=forward, setup_context=setup_context, backward=backward)
    function.vmap = staticmethod(_backward_rule(op, lambda *args: function.apply(*args)))
    return function


@contextlib.contextmanager
def _restored(name: str | None, device: str, autocast: bool) -> Any:
    with _backends.backend(name), torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        yield


_NOTHING = contextlib.nullcontext()


def _as_in_forward(name: str | None, device: str) -> Any:
    """Backward may run in another thread or context: with the backend forward was forced to, and never under autocast."""
    autocast = autocast_enabled(device)
    return _restored(name, device, autocast) if autocast or name is not None else _NOTHING

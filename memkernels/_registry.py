"""The one path every op takes (design.md section 2): define_op registers it, the router sends calls. An op file only declares."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from memkernels import _autograd, _backends, _compat, _flops
from memkernels._compat import PLAIN_CALL, RECORDED, ROUTED, autocast_enabled, forward_ad_active, functorch_active, untraced
from memkernels._flops import Product
from memkernels._op import Arg, Op, Out, empty_like, new_empties, new_empty

__all__ = [
    "OPS",
    "Arg",
    "Out",
    "Product",
    "capture",
    "define_inplace",
    "define_op",
    "define_table_op",
    "empty_like",
    "explain",
    "new_empties",
    "new_empty",
]

LIBRARY = torch.library.Library("memkernels", "DEF")
OPS: dict[str, RoutedOp] = {}
INPLACE: dict[str, InplaceOp] = {}
TABLE: dict[str, TableOp] = {}
_TAGS = (torch.Tag.pt2_compliant_tag,)


class RoutedOp(Op):
    """Call it with all inputs and options, positionally; it returns the tuple of all outputs."""

    def __call__(self, *args: Any) -> tuple[torch.Tensor, ...]:
        if torch.compiler.is_compiling():
            return self._routed(args)
        if _capturing is not None and _capturing == threading.get_ident():
            raise _Captured(self, args)
        kind = _compat.call_kind(args, self.n_inputs)
        if kind == PLAIN_CALL:
            return self.compute(*args)  # type: ignore[return-value]
        return self.eager_apply(*args) if kind == RECORDED else self._routed(args)

    def _routed(self, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        device = args[0].device.type
        if autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                out = self._route(_autocast(self, args, device))
        else:
            out = self._route(args)
        return out if isinstance(out, tuple) else (out,)

    def _route(self, args: tuple[Any, ...]) -> Any:
        if functorch_active():
            if torch.compiler.is_compiling() or forward_ad_active():
                return tuple(self.reference.forward(*args))
            # After a graph break inside a transform Dynamo compiles what is below frame by frame, and takes `*args` for a ctx.
            return untraced(self.function.apply)(*args)
        if forward_ad_active():
            return tuple(self.reference.forward(*args))
        return self.op(*args)


class _Captured(Exception):
    """Carries the op and its flat arguments out of a public function."""

    def __init__(self, op: Any, flat: tuple[Any, ...]):
        self.op, self.flat = op, flat


_capturing: int | None = None  # ident of the thread whose next op call is caught
_capture_lock = threading.Lock()


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
    """The op (RoutedOp or TableOp) that a public function would call, and the flat arguments it would pass; nothing is computed."""
    global _capturing
    with _capture_lock:
        _capturing = threading.get_ident()
        try:
            function(*args, **kwargs)
        except _Captured as found:
            return found.op, found.flat
        finally:
            _capturing = None
    raise ValueError(f"{getattr(function, '__name__', function)} calls no memkernels op")


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Every backend with the reason why it cannot run this call, or None; the first None in order is the one that runs.

    Args:
        op: name of a public op, e.g. "content_read", or the public function. args, kwargs: what one would pass to it.

    Returns:
        {backend: reason or None}, best backend for the device first. Under forward-mode AD only the
        reference runs, forced backend or not.

    Example:
        >>> import torch, memkernels as mk
        >>> mk.explain("memory_read", torch.ones(1, 2, 3), torch.ones(1, 1, 2))["reference"] is None
        True
    """
    if isinstance(op, str):
        import memkernels

        known = sorted([*OPS, *INPLACE, *TABLE])
        if op not in known:
            raise ValueError(f"explain: op: expected one of {', '.join(known)}, got {op!r}")
        function: Callable[..., Any] = getattr(memkernels.ops, op)
    else:
        function = op
    found, flat = capture(function, *args, **kwargs)
    device = _device(flat[0])
    order = _backends.ORDER.get(device, ("reference",))
    names = (*order, *(n for n in _backends.NAMES if n not in order))
    forced = _backends.forced_name()
    if forward_ad_active():
        return {name: None if name == "reference" else "forward-mode AD always runs on the reference" for name in names}
    reasons = {name: _backends.refusal(name, found.name, device, flat) for name in names}
    return {n: r if forced in (None, n) else r or f"not asked for: backend {forced!r} is forced" for n, r in reasons.items()}


def _autocast(op: Op, args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """torch's autocast rule: float32 and half inputs go to one dtype, float64 stays."""
    target = torch.get_autocast_dtype(device) if op.autocast == "matmul" else torch.float32
    cast = [
        a.to(target) if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dtype != torch.float64 else a
        for a in args[: len(op.inputs)]
    ]
    return (*cast, *args[len(op.inputs) :])


def define_op(
    name: str,
    *,
    inputs: tuple[Arg, ...],
    outputs: tuple[Out, ...],
    allocate: Callable[..., tuple[torch.Tensor, ...]],
    options: str = "",
    autocast: str = "float32",
    products: Callable[..., tuple[Product, ...]] | None = None,
) -> RoutedOp:
    """Register `memkernels::<name>` and `memkernels::<name>_backward` with fakes, gradient and vmap.

    Args:
        name: op name. inputs, outputs: the tensors in order. options: schema text of the other arguments.
        allocate: (*inputs, *options) -> fresh contiguous outputs; on fake tensors it is the fake kernel.
        autocast: "matmul" (inputs go to the autocast dtype) or "float32".
        products: (*inputs, *options) -> the matrix products of the formula, which flop counters and benchmarks read.
    """
    op = RoutedOp(name, inputs, outputs, options, allocate, autocast, products)
    schema, backward_schema = op.schemas()
    op.op = _define(name, schema, op.run, op.run_fake)
    op.backward_op = _define(f"{name}_backward", backward_schema, op.run_backward, op.run_backward_fake)
    _autograd.attach(op)
    torch.library.register_autograd(op.op, op.function.backward, setup_context=op.function.setup_context, lib=LIBRARY)
    torch.library.register_autograd(op.backward_op, _autograd.refuse_second_order(name), lib=LIBRARY)
    for raw, rule in zip((op.op, op.backward_op), _autograd.vmap_rules(op)):
        torch.library.register_vmap(raw, rule, lib=LIBRARY)
    if products is not None:
        _flops.register(getattr(torch.ops.memkernels, name), op.flops)
        _flops.register(getattr(torch.ops.memkernels, f"{name}_backward"), op.backward_flops)
    OPS[name] = op
    return op


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    LIBRARY.define(schema, tags=_TAGS)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"memkernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.memkernels, name).default


class InplaceOp:
    """A mutating op: the op `of` with its one output written into its first input; no autograd, no transforms."""

    def __init__(self, name: str, of: RoutedOp):
        self.name, self.of = name, of
        first, *others = of.inputs
        rest = "".join(f", Tensor{'?' if a.optional else ''} {a.name}" for a in others) + (f", {of.options}" if of.options else "")
        self.op = _define(name, f"{name}(Tensor(a!) {first.name}{rest}) -> ()", self.run, lambda *args: None)
        _flops.register(getattr(torch.ops.memkernels, name), of.flops)

    def run(self, *args: Any) -> None:
        module, is_reference = _backends.choose(self.of.name, args[0].device.type, args)
        if is_reference:
            args[0].copy_(module.forward(*args)[0])
            return
        module.forward(args[0], *args)
        if not args[0].is_inference():  # so that autograd notices if it has saved this tensor
            torch.autograd.graph.increment_version(args[0])

    def __call__(self, *args: Any) -> None:
        if _capturing is not None and _capturing == threading.get_ident():
            raise _Captured(self.of, args)
        if autocast_enabled(args[0].device.type):  # the memory keeps its dtype, the others follow it
            args = tuple(a.to(args[0].dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
        if torch.compiler.is_compiling():
            self.op(*args)
        elif args[0].is_neg():  # torch's fallback for a sign that is still to be taken wants an op that returns what it wrote
            args[0].copy_(self.of(*args)[0])
        elif _compat.call_kind(args, len(args)) == ROUTED:
            self.op(*args)
        else:
            self.run(*args)


def define_inplace(name: str, of: RoutedOp) -> InplaceOp:
    """Register `memkernels::<name>`, the in-place form of an op with one output."""
    INPLACE[name] = InplaceOp(name, of)
    return INPLACE[name]


class TableOp:
    """An op over the tensors of a hash table or of its rows: integers and bytes, no gradient, no transforms; it may write into its first
    inputs.

    Call it with all inputs and options, positionally; it returns the tuple of all outputs, allocated as in `define_op`.
    """

    def __init__(self, name: str, schema: str, allocate: Callable[..., tuple[torch.Tensor, ...]]):
        self.name, self.allocate = name, allocate
        self.written = schema.count("!)")
        self.op = _define(name, name + schema, self.run, lambda *args: list(allocate(*args)))

    def run(self, *args: Any) -> list[torch.Tensor]:
        module, is_reference = _backends.choose(self.name, _device(args[0]), args)
        if is_reference:
            outputs = module.forward(*args)
        else:
            outputs = self.allocate(*args)
            module.forward(*outputs, *args)
        for written in args[0] if self.written and isinstance(args[0], (list, tuple)) else args[: self.written]:
            if not written.is_inference():
                torch.autograd.graph.increment_version(written)
        return list(outputs)

    def __call__(self, *args: Any) -> list[torch.Tensor]:
        if _capturing is not None and _capturing == threading.get_ident():
            raise _Captured(self, args)
        return self.op(*args) if torch.compiler.is_compiling() else self.run(*args)


def _device(first: Any) -> str:
    return (first[0] if isinstance(first, (list, tuple)) else first).device.type


def define_table_op(name: str, schema: str, allocate: Callable[..., tuple[torch.Tensor, ...]]) -> TableOp:
    """Register `memkernels::<name>`, an op without gradient; its schema is given from the bracket on and returns Tensor[]."""
    TABLE[name] = TableOp(name, schema, allocate)
    return TABLE[name]

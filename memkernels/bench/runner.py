"""Runs specs' benchmark sizes: draw inputs, check against float64, time interleaved with the peers."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import memkernels
from memkernels.bench import memory
from memkernels.bench.environment import floor_seconds, synchronize
from memkernels.bench.peers import Invoke, check_peers, invoke, peer
from memkernels.bench.row import Row
from memkernels.testing import compare
from memkernels.testing.inputs import differentiable, draw, tensors_of, upstream
from memkernels.testing.spec import OpSpec, Sample, Tensors, specs

MODES = ("forward", "backward", "fwd+bwd", "training forward")
CHECK_FLOPS, CHECK_BYTES, CHECK_SCORES = 4e9, 2e8, 1.5e7  # the float64 reference is run at full size up to here


def run(
    ops: Iterable[str] | None = None,
    *,
    quick: bool = True,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    modes: Sequence[str] = ("forward", "fwd+bwd"),
    peers: Sequence[str] = ("eager", "compile"),
    backend: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    seconds: float | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Benchmark ops over their specs' `bench` sizes, each row checked against float64 first.

    Args:
        ops: op names, None for all.
        quick: only each op's first size, with short timings.
        dtypes: what the inputs are.
        modes: "forward" (inference_mode), "backward", "fwd+bwd" (gradients of all inputs), "training forward".
        peers: "eager", "compile" (torch.compile of eager), "without <input>", or a name in the spec's peers; a peer that an op does
            not have is left out, and an op without any is timed alone.
        backend: force one backend; None takes what a user gets.
        device: "cpu" or "cuda".
        threads: torch threads, None leaves them.
        seconds: time to spend on one row; None: 0.3 quick, 1.5 otherwise.
        on_row: called with each row as it is ready (progress display).

    Returns:
        One `Row` per op, size, dtype, mode and peer.

    Raises:
        ValueError: an unknown op, mode or peer. AssertionError: a result is wrong, so its time would mean nothing.
    """
    found = specs()
    for name in ops or ():
        if name not in found:
            raise ValueError(f"bench: ops: expected one of {', '.join(found)}, got {name!r}")
    check_peers(peers)
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"bench: modes: expected one of {', '.join(MODES)}, got {mode!r}")
    rows: list[Row] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for name in ops or found:
            spec = found[name]
            for sample in spec.bench[:1] if quick else spec.bench:
                for dtype in dtypes:
                    case = Case(spec, sample, dtype, device, backend)
                    for row in case.rows(modes, peers, (0.3 if quick else 1.5) if seconds is None else seconds):
                        rows.append(row)
                        if on_row:
                            on_row(row)
    finally:
        torch.set_num_threads(before)
    return rows


class _Recorded(Exception):
    """Carries the arguments that a spec's call makes of inputs and options."""


def _direct(spec: OpSpec, function: Invoke, inputs: Tensors, options: Mapping[str, Any]) -> Callable[[], Any]:
    """The call without the making of its arguments, which would weigh as much as a small op."""
    if not (isinstance(function, partial) and function.func is spec.call):
        return lambda: function(dict(inputs), dict(options))

    def record(*args: Any, **kwargs: Any) -> Any:
        raise _Recorded(args, kwargs)

    try:
        spec.call(record, dict(inputs), dict(options))
    except _Recorded as found:
        return partial(function.args[0], *found.args[0], **found.args[1])
    raise AssertionError(f"{spec.name}: its call calls nothing")


class Call:
    """One function on one set of inputs, with the upstream gradients that its backward gets."""

    def __init__(self, spec: OpSpec, function: Invoke, sample: Sample, inputs: Tensors, backend: str | None = None):
        self.backend = backend
        names = differentiable(spec, inputs)
        leaves = {n: t.detach().requires_grad_() if t is not None and n in names else t for n, t in inputs.items()}
        self.wanted = [t for n in names if (t := leaves[n]) is not None]
        self.upstream: list[torch.Tensor] = []
        self.inputs = list(inputs.values())
        self.infer = _direct(spec, function, inputs, sample.options)
        self.record = _direct(spec, function, leaves, sample.options)

    def _forced(self) -> Any:
        return memkernels.backend(self.backend) if self.backend else nullcontext()

    def forward(self) -> Any:
        with self._forced():
            return self.infer()

    def train(self) -> list[torch.Tensor]:
        with self._forced():
            return [t for t in tensors_of(self.record()) if t.requires_grad]

    def gradients(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if not self.upstream:
            self.upstream = [g for g in upstream(outputs, outputs[0].dtype) if g is not None]
        return [g for g in torch.autograd.grad(outputs, self.wanted, self.upstream, allow_unused=True) if g is not None]

    def extra_mb(self, mode: str, device: str) -> float | None:
        """Peak megabytes of one run beyond inputs and outputs; after `once`, which makes the upstream gradients."""
        graph = self.train() if mode == "backward" else None

        def run() -> list[torch.Tensor]:
            if mode == "forward":
                with torch.inference_mode():
                    return tensors_of(self.forward())
            outputs = graph or self.train()
            return outputs if mode == "training forward" else [*outputs, *self.gradients(outputs)]

        given = [*self.inputs, *self.upstream, *(graph or ())]
        found = memory.extra_bytes(run, given, device)
        return None if found is None else found * 1e-6


@dataclass
class Case:
    """One op at one size and dtype: checked once, then timed in any mode against any peers."""

    spec: OpSpec
    sample: Sample
    dtype: torch.dtype
    device: str = "cpu"
    backend: str | None = None
    checked: str = field(default="", init=False)
    chosen: str = field(default="", init=False)

    def check(self) -> None:
        """Outputs and gradients against the float64 reference, at full size or the largest affordable one; raises when wrong."""
        sample, label = reduced(self.spec, self.sample)
        inputs, explain = draw(self.spec, sample, self.dtype, device=self.device), partial(memkernels.explain, self.spec.name)
        reasons = self.spec.call(lambda *a, **k: explain(*a, **k), dict(inputs), dict(sample.options))
        self.chosen = self.backend or next(name for name, reason in reasons.items() if reason is None)
        for row in compare.measure(self.spec, sample, self.dtype, self.chosen, device=self.device):
            if row.status != "ok":
                raise AssertionError(f"{self.spec.name} {self.sample.name} {row.dtype} on {row.backend}: {row.reason}")
        self.checked = f"float64{label}"

    def rows(self, modes: Sequence[str], peers: Sequence[str], seconds: float) -> Iterable[Row]:
        self.check()
        inputs = draw(self.spec, self.sample, self.dtype, device=self.device)
        ours = Call(self.spec, invoke(self.spec), self.sample, inputs, self.backend)
        known = {name: function for name in peers if (function := peer(self.spec, name)) is not None}
        others = {name: Call(self.spec, function, self.sample, inputs) for name, function in known.items()}
        for mode in modes:
            ready, notes = dict(others), {}
            for name, call in others.items():
                try:
                    once(call, mode, self.device, 1)
                except Exception as error:  # a peer that cannot run this is a fact of its row
                    notes[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
                    del ready[name]
            mine, *theirs = interleaved([ours, *ready.values()], mode, self.device, seconds)
            times = dict(zip(ready, theirs, strict=True))
            extra, extras = ours.extra_mb(mode, self.device), {name: call.extra_mb(mode, self.device) for name, call in ready.items()}
            for name in others or ("",):
                found = self.row(mode, mine, name, times.get(name), notes.get(name, ""))
                yield replace(found, extra_mb=extra, peer_extra_mb=extras.get(name))

    def row(self, mode: str, mine: float, name: str, theirs: float | None, note: str) -> Row:
        d, item = self.sample.dims, self.dtype.itemsize
        parts = {"backward": ("backward",), "fwd+bwd": ("forward", "backward")}.get(mode, ("forward",))
        moved = {"forward": self.spec.bytes(d, item), "backward": self.spec.bytes_backward(d, item)}
        flops = dict(zip(("forward", "backward"), self.spec.flops(self.sample), strict=True))
        least = sum(moved[part] for part in parts)
        return Row(
            op=self.spec.name,
            size=self.sample.name,
            dtype=str(self.dtype).removeprefix("torch."),
            mode=mode,
            threads=torch.get_num_threads(),
            device=self.device,
            backend=self.chosen,
            level=(memkernels.cpu_level() or "") if self.chosen == "cpp" else "",
            peer=name,
            ms=mine * 1e3,
            peer_ms=None if theirs is None else theirs * 1e3,
            ratio=None if theirs is None else theirs / mine,
            gb_s=least / mine * 1e-9,
            floor=floor_seconds(least, sum(flops[part] for part in parts), self.dtype, self.device) / mine,
            checked=self.checked,
            note=note,
        )


def reduced(spec: OpSpec, sample: Sample) -> tuple[Sample, str]:
    """The sample, or one whose largest dimension is halved until the float64 reference is affordable, and a label that says so."""
    dims = dict(sample.dims)
    while 4 * spec.flops(replace(sample, dims=dims))[0] > CHECK_FLOPS or spec.bytes(dims, 8) > CHECK_BYTES or scores(dims) > CHECK_SCORES:
        largest = max(dims, key=lambda name: dims[name])
        if dims[largest] <= 16:
            break
        dims = {name: n // 2 if n == dims[largest] else n for name, n in dims.items()}
    changed = [f"{name}={n}" for name, n in dims.items() if n != sample.dims[name]]
    return replace(sample, dims=dims), f" at {', '.join(changed)}" if changed else ""


def scores(dims: Mapping[str, int]) -> int:
    """Elements of the score matrix that an unfused attention writes; 0 for other ops."""
    for queries, keys in (("Q", "K"), ("Tq", "Tk")):
        if {"NH", queries, keys} <= dims.keys():
            return dims.get("B", 1) * dims["NH"] * dims[queries] * dims[keys]
    return 0


def once(call: Call, mode: str, device: str, inner: int) -> float:
    """Seconds of one run, averaged over `inner` runs back to back."""
    graphs = [call.train() for _ in range(inner)] if mode == "backward" else []
    with torch.inference_mode() if mode == "forward" else nullcontext():
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(inner):
            if mode == "forward":
                call.forward()
            elif mode == "training forward":
                call.train()
            else:
                call.gradients(graphs.pop() if graphs else call.train())
        synchronize(device)
        return (time.perf_counter() - begin) / inner


def alternating(makers: Sequence[Callable[[], Callable[[], Any]]], seconds: float) -> list[float]:
    """Median seconds of what each maker returns, made anew, untimed, for every run; one round runs each once."""
    times: list[list[float]] = [[] for _ in makers]
    begin = time.perf_counter()
    while len(times[0]) < 3 or time.perf_counter() - begin < seconds * len(makers):
        for make, found in zip(makers, times):
            run = make()
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def interleaved(calls: Sequence[Call], mode: str, device: str, seconds: float) -> list[float]:
    """Median seconds of each call; one round runs every call once, so drift of the machine hits all alike. No garbage collection."""
    inner = []
    for call in calls:
        once(call, mode, device, 1)
        inner.append(max(1, min(1000, int(2e-3 / max(once(call, mode, device, 1), 1e-7)))))
    times: list[list[float]] = [[] for _ in calls]
    begin, collecting = time.perf_counter(), gc.isenabled()
    gc.disable()  # as timeit does: a pass over all objects of torch and its compiler takes as long as thousands of small calls
    try:
        while len(times[0]) < 3 or (time.perf_counter() - begin < seconds * len(calls) and len(times[0]) < 200):
            for call, n, found in zip(calls, inner, times):
                found.append(once(call, mode, device, n))
    finally:
        if collecting:
            gc.enable()
    return [statistics.median(found) for found in times]

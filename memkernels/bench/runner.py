"""Runs specs' benchmark sizes: draw inputs, check against float64, time interleaved with the peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

import memkernels
from memkernels.bench.environment import floor_seconds, synchronize
from memkernels.bench.peers import peer_function
from memkernels.bench.row import Row
from memkernels.testing import compare
from memkernels.testing.inputs import draw
from memkernels.testing.spec import OpSpec, Sample, specs

MODES = ("forward", "backward", "fwd+bwd")
CHECK_FLOPS, CHECK_BYTES = 4e9, 2e8  # the float64 reference is run at full size up to here


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
        dtypes, modes: what to run; modes are "forward" (inference_mode), "backward", "fwd+bwd".
        peers: "eager", "compile" (torch.compile of eager), or a name in the spec's or `memkernels.bench.peers`' list; a peer that an op
            does not have is left out.
        backend: force one backend; None takes what a user gets.
        device: "cpu" or "cuda".
        threads: torch threads, None leaves them.
        seconds: time to spend on one timing of one row; None: 0.3 quick, 1.5 otherwise.
        on_row: called with each row as it is ready (progress display).

    Returns:
        One `Row` per op, size, dtype, mode and peer.
    """
    found = specs()
    for name in ops or ():
        if name not in found:
            raise ValueError(f"bench: ops: expected one of {', '.join(found)}, got {name!r}")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"bench: modes: expected one of {', '.join(MODES)}, got {mode!r}")
    seconds = (0.3 if quick else 1.5) if seconds is None else seconds
    rows: list[Row] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for name in ops or found:
            spec = found[name]
            for sample in spec.bench[:1] if quick else spec.bench:
                for dtype in dtypes:
                    case = Case(spec, sample, dtype, device, backend)
                    for row in case.rows(modes, peers, seconds):
                        rows.append(row)
                        if on_row:
                            on_row(row)
    finally:
        torch.set_num_threads(before)
    return rows


def outputs(found: Any) -> list[torch.Tensor]:
    """The floating tensors of a function's result, in order."""
    return [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor) and t.is_floating_point()]


class Call:
    """One function on one set of inputs, with the upstream gradients that its backward gets."""

    def __init__(self, spec: OpSpec, function: Callable[..., Any], sample: Sample, inputs: Mapping[str, torch.Tensor | None]):
        self.spec, self.function, self.options = spec, function, dict(sample.options)
        self.plain = dict(inputs)
        self.leaves = {
            name: t.detach().requires_grad_() if t is not None and spec.inputs[name].dtype is None else t for name, t in inputs.items()
        }
        self.wanted = [t for t in self.leaves.values() if t is not None and t.requires_grad]
        self.upstream: list[torch.Tensor] = []

    def forward(self) -> Any:
        return self.spec.call(self.function, dict(self.plain), dict(self.options))

    def train(self) -> list[torch.Tensor]:
        found = outputs(self.spec.call(self.function, dict(self.leaves), dict(self.options)))
        return [t for t in found if t.requires_grad]

    def gradients(self, found: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        if not self.upstream:
            generator = torch.Generator().manual_seed(1)
            drawn = (torch.randn(t.shape, dtype=torch.float64, generator=generator) for t in found)
            self.upstream = [d.to(t.dtype).to(t.device) for d, t in zip(drawn, found)]
        return torch.autograd.grad(found, self.wanted, self.upstream, allow_unused=True)


class Case:
    """One op at one size and dtype: checked once, then timed in any mode against any peer."""

    def __init__(self, spec: OpSpec, sample: Sample, dtype: torch.dtype, device: str = "cpu", backend: str | None = None):
        self.spec, self.sample, self.dtype, self.device, self.backend = spec, sample, dtype, device, backend

    def check(self) -> str:
        """Outputs and gradients against the float64 reference, at full size or the largest affordable one; raises when wrong."""
        sample, label = reduced(self.spec, self.sample)
        for row in compare.measure(self.spec, sample, self.dtype, self.backend_name(), device=self.device):
            if row.status != "ok":
                raise AssertionError(f"{self.spec.name} {self.sample.name} {row.dtype} on {row.backend}: {row.reason}")
        return f"float64{label}"

    @cache  # noqa: B019 (a case lives as long as its rows)
    def backend_name(self) -> str:
        """The forced backend, or the one that a user gets for this call."""
        inputs = draw(self.spec, reduced(self.spec, self.sample)[0], self.dtype, device=self.device)
        reasons = self.spec.call(partial(memkernels.explain, self.spec.name), dict(inputs), dict(self.sample.options))
        return self.backend or next(name for name, reason in reasons.items() if reason is None)

    def rows(self, modes: Sequence[str], peers: Sequence[str], seconds: float) -> Iterable[Row]:
        checked = self.check()
        inputs = draw(self.spec, self.sample, self.dtype, device=self.device)
        ours = Call(self.spec, self.spec.function, self.sample, inputs)
        known = {name: peer_function(self.spec, name, self.sample) for name in peers}
        for mode in modes:
            for name, function in known.items():
                if function is None:
                    continue
                other = Call(self.spec, function, self.sample, inputs)
                yield replace(self.measure(mode, ours, name, other, seconds), checked=checked)

    def measure(self, mode: str, ours: Call, name: str, other: Call, seconds: float) -> Row:
        note, peer_s = "", None
        try:
            mine, peer_s = interleaved([self.under(ours), other], mode, self.device, seconds)
        except Exception as error:  # a peer that cannot run is a fact of the row, ours failing again is not
            note = f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}" if str(error) else f"{name} failed"
            (mine,) = interleaved([self.under(ours)], mode, self.device, seconds)
        d, item = self.sample.dims, self.dtype.itemsize
        moved = {"forward": self.spec.bytes(d, item), "backward": self.spec.bytes_backward(d, item)}
        flops = {"forward": self.spec.flops(d), "backward": 2 * self.spec.flops(d)}
        bytes_, flop = (sum(t.values()) if mode == "fwd+bwd" else t[mode] for t in (moved, flops))
        return Row(
            op=self.spec.name,
            size=self.sample.name,
            dtype=str(self.dtype).removeprefix("torch."),
            mode=mode,
            threads=torch.get_num_threads(),
            device=self.device,
            backend=self.backend_name(),
            level=(memkernels.cpu_level() or "") if self.device == "cpu" else "",
            peer=name,
            ms=mine * 1e3,
            peer_ms=None if peer_s is None else peer_s * 1e3,
            ratio=None if peer_s is None else peer_s / mine,
            gb_s=bytes_ / mine * 1e-9,
            floor=floor_seconds(bytes_, flop, self.dtype, self.device) / mine,
            checked="",
            note=note,
        )

    def under(self, call: Call) -> Call:
        return Forced(call, self.backend) if self.backend else call


class Forced(Call):
    """A call whose forward and backward run under one forced backend."""

    def __init__(self, call: Call, backend: str):
        self.__dict__.update(call.__dict__)
        self.name = backend

    def forward(self) -> Any:
        with memkernels.backend(self.name):
            return super().forward()

    def train(self) -> list[torch.Tensor]:
        with memkernels.backend(self.name):
            return super().train()

    def gradients(self, found: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        with memkernels.backend(self.name):
            return super().gradients(found)


def reduced(spec: OpSpec, sample: Sample) -> tuple[Sample, str]:
    """The sample itself, or one whose largest dimension is halved until the float64 reference is affordable, and a label that says so."""
    dims = dict(sample.dims)
    while 4 * spec.flops(dims) > CHECK_FLOPS or spec.bytes(dims, 8) > CHECK_BYTES or quadratic(dims) > 1.5e7:
        largest = max(dims, key=lambda k: dims[k])
        if dims[largest] <= 16:
            break
        dims[largest] //= 2
    changed = [f"{k}={v}" for k, v in dims.items() if v != sample.dims[k]]
    return replace(sample, dims=dims), f" at {', '.join(changed)}" if changed else ""


def quadratic(dims: Mapping[str, int]) -> int:
    """Elements of the score matrix that an unfused attention writes; 0 for other ops."""
    return dims.get("B", 1) * dims["NH"] * dims["Q"] * dims["K"] if {"NH", "Q", "K"} <= dims.keys() else 0


def once(call: Call, mode: str, device: str, inner: int) -> float:
    """Seconds of one run, averaged over `inner` runs back to back."""
    synchronize(device)
    if mode == "forward":
        with torch.inference_mode():
            begin = time.perf_counter()
            for _ in range(inner):
                call.forward()
            synchronize(device)
            return (time.perf_counter() - begin) / inner
    if mode == "backward":
        found = [call.train() for _ in range(inner)]
        synchronize(device)
        begin = time.perf_counter()
        while found:
            call.gradients(found.pop())
        synchronize(device)
        return (time.perf_counter() - begin) / inner
    begin = time.perf_counter()
    for _ in range(inner):
        call.gradients(call.train())
    synchronize(device)
    return (time.perf_counter() - begin) / inner


def interleaved(calls: Sequence[Call], mode: str, device: str, seconds: float) -> list[float]:
    """Median seconds of each call; one round runs every call once, so drift of the machine hits all alike."""
    inner = []
    for call in calls:
        once(call, mode, device, 1)  # warm-up, compilation
        first = min(once(call, mode, device, 1) for _ in range(2))
        inner.append(max(1, min(1000, int(2e-3 / max(first, 1e-7)))))
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    while len(times[0]) < 5 or (time.perf_counter() - begin < seconds * len(calls) and len(times[0]) < 200):
        for call, n, found in zip(calls, inner, times):
            found.append(once(call, mode, device, n))
        if time.perf_counter() - begin > 20 and len(times[0]) >= 3:
            break
    return [statistics.median(t) for t in times]

"""The one comparison: a kernel against float64, measured with the error that plain torch makes in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import memkernels
from memkernels._checks import BackendError
from memkernels.testing import inputs as make
from memkernels.testing.spec import OpSpec, Sample, Tensors, specs

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("forward", "backward")
ELEMENTS = 256  # so many elements make the largest error of the reference a fair measure
NARROW, MANY = 3.0, 24  # a failure by less than this factor may be the luck of one draw: it is judged over so many
LEVELS = ("baseline", "avx2", "avx512", "amx")
# The float64 reference has no better truth to be measured with, so float64 kernels must agree with it to this part of the largest value.
FLOAT64_FLOOR = 2.0**-40


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is the error divided by the reference's own (not less than the floor); it passes up to `limit`."""

    op: str
    backend: str
    dtype: str
    sample: str
    direction: str
    tensor: str
    error: float
    reference_error: float
    ratio: float
    limit: float
    status: str  # "ok", "fail", "error" (raised) or "unavailable" (the backend says why in `reason`)
    reason: str = ""

    def json(self) -> dict[str, Any]:
        """Plain values; infinite and NaN numbers as text, which strict JSON readers accept."""
        return {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in asdict(self).items()}


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Run on one backend: "reference", "triton", "cpp", or "cpp:avx2" for the C++ kernels of one instruction-set level."""
    name, _, level = backend.partition(":")
    with ExitStack() as stack:
        stack.enter_context(memkernels.backend(name))
        if level:
            before = memkernels.cpu_level()
            memkernels.cpu_level(level)
            stack.callback(memkernels.cpu_level, before)
        yield


def why_not(spec: OpSpec, inputs: Tensors, options: dict[str, Any], backend: str) -> str | None:
    """None, or the reason why this backend cannot run this call."""
    reasons = spec.call(lambda *a, **k: memkernels.explain(spec.name, *a, **k), dict(inputs), dict(options))
    name = backend.partition(":")[0]
    return reasons[name] if name in reasons else f"no backend {name}"


def evaluate(
    spec: OpSpec, inputs: Tensors, options: dict[str, Any], gradients: Callable[..., Any] | None = None
) -> dict[str, torch.Tensor]:
    """Outputs and gradients of one call by name ("output 0", "d memory").

    `gradients(outputs)` gives the upstream gradients; None: forward only. An input that no output depends on has no entry.
    """
    names = make.differentiable(spec, inputs) if gradients is not None else []
    leaves: dict[str, Any] = dict(inputs)
    for name, t in inputs.items():
        if t is not None and t.is_floating_point():
            leaves[name] = t.detach().requires_grad_(name in names)
    outputs = make.tensors_of(spec.call(spec.function, dict(leaves), dict(options)))
    result = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    if gradients is None:
        return result
    pairs = [(t, g) for t, g in zip(outputs, gradients(outputs)) if g is not None]
    if pairs and names:
        grads = torch.autograd.grad([t for t, _ in pairs], [leaves[n] for n in names], [g for _, g in pairs], allow_unused=True)
        result |= {f"d {n}": torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, grads)}
    return result


def error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest absolute difference; infinite when one is not finite where the other (rounded to the dtype) is."""
    if actual.shape != truth.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, truth.to(actual.dtype)) else math.inf
    rounded = truth.to(actual.dtype).double()
    finite = rounded.isfinite()
    if not torch.equal(actual.double()[~finite].nan_to_num(nan=0.5), rounded[~finite].nan_to_num(nan=0.5)):
        return math.inf
    difference = (actual.double() - truth.double())[finite].abs()
    return math.inf if difference.isnan().any() else float(difference.max()) if difference.numel() else 0.0


def floor(truth: torch.Tensor, dtype: torch.dtype) -> float:
    """The error nobody is blamed for: 2 ulp of the largest finite value of the truth."""
    values = truth.double()[truth.isfinite()].abs() if truth.is_floating_point() else truth.new_zeros(0)
    largest = float(values.max()) if values.numel() else 0.0
    if not dtype.is_floating_point or largest == 0.0:
        return 0.0
    if dtype == torch.float64:
        return FLOAT64_FLOOR * max(largest, 1.0)
    info = torch.finfo(dtype)
    return 2.0 * max(2.0 ** math.floor(math.log2(largest)) * info.eps, info.smallest_normal * info.eps)


def judge(name: str, wrong: float, low: float, own: float, limit: float) -> dict[str, Any]:
    """The measured part of a Row, from an error, its floor and the error of the reference."""
    unit = max(own if math.isfinite(own) else 0.0, low / limit)
    ratio = 0.0 if wrong == 0.0 else wrong / unit if unit else math.inf
    reason = "" if ratio <= limit else f"{name}: error {wrong:.3g} is {ratio:.3g} times the reference's {own:.3g}, allowed {limit:g}"
    return dict(tensor=name, error=wrong, reference_error=own, ratio=ratio, limit=limit, status="fail" if reason else "ok", reason=reason)


def measure(
    spec: OpSpec,
    sample: Sample,
    dtype: torch.dtype,
    backend: str,
    *,
    layout: str = "contiguous",
    gradient: str | None = "contiguous",
    seed: int = 0,
    device: str = "cpu",
    inputs: Tensors | None = None,
    drawn: bool = False,
    draws: int = 8,
) -> list[Row]:
    """Outputs and gradients of a backend, each against float64 and the same-dtype reference.

    Args:
        spec, sample, dtype, seed, device: what is drawn, unless `inputs` are given, which keep their strides.
        drawn: the `inputs` given are what would be drawn, so that the truth kept from another call is theirs.
        backend: see `using`.
        layout: a name in `LAYOUTS` for the inputs.
        gradient: a name in `GRADIENT_LAYOUTS` for the upstream gradients; None: forward only.
        draws: the most draws over which the error of the reference is taken, see `own_errors`.

    Returns:
        One row per tensor. The bar is spec.tol times the reference's error, at least 2 ulp of the largest value. Where one element
        decides, both errors are luck: a narrow failure is judged by the largest error of either side over MANY draws.
    """
    drawn = drawn or inputs is None
    given = make.draw(spec, sample, dtype, seed, device) if inputs is None else inputs
    given = given if layout == "contiguous" else make.laid_out(given, layout)
    upstream = _upstream(dtype, gradient, seed)
    with using(backend):
        actual = evaluate(spec, given, dict(sample.options), upstream)
    key = (*_key(spec, sample, dtype, gradient, seed, device), layout if layout in make.OTHER_VALUES else "contiguous")
    if drawn and key in _references:
        truth, own = _references[key]
    else:
        truth, own = _reference(spec, given, dict(sample.options), dtype, upstream)
        if drawn and sum(t.numel() for t in truth.values()) < CACHED:
            _references[key] = truth, own
    own = dict(own)
    for name, (elements, largest) in own_errors(spec, sample, dtype, gradient, seed, device, draws).items() if draws > 1 else ():
        if name in own and (elements < ELEMENTS or layout in make.OTHER_VALUES):  # expanded: many elements, few values
            own[name] = max(own[name], largest)
    direction = {name: DIRECTIONS[name.startswith("d ")] for name in truth}
    limit = {name: spec.tol[name.startswith("d ")] for name in truth}
    found = {name: judge(name, error(actual[name], t), floor(t, actual[name].dtype), own[name], limit[name]) for name, t in truth.items()}
    narrow = [n for n, row in found.items() if draws > 1 and limit[n] < row["ratio"] < NARROW * limit[n]]
    if narrow:
        wrong, low, theirs = _over_draws(spec, sample, dtype, backend, layout, gradient, seed, device)
        found |= {n: judge(n, wrong[n], low[n], theirs[n], limit[n]) for n in narrow}
    kind = str(dtype).removeprefix("torch.")
    return [Row(op=spec.name, backend=backend, dtype=kind, sample=sample.name, direction=direction[n], **row) for n, row in found.items()]


def _upstream(dtype: torch.dtype, gradient: str | None, seed: int) -> Callable[..., Any] | None:
    return None if gradient is None else lambda outputs: make.upstream(outputs, dtype, gradient, seed)


def _over_draws(
    spec: OpSpec, sample: Sample, dtype: torch.dtype, backend: str, layout: str, gradient: str | None, seed: int, device: str
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """By tensor, the largest of MANY draws: errors of the backend, floors, errors of the reference.

    The errors of the reference are also those on as many neighbours of the draw itself, a unit in the last place away: it may be an
    ill-conditioned one, of a thousand times the error of any other, and then no other draw says how large its error there is but for luck.
    """
    wrong: dict[str, float] = {}
    low: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for s in range(seed, seed + 6 * MANY, 6):  # as in `own_errors`
        given = make.laid_out(make.draw(spec, sample, dtype, s, device), layout)
        asked = _upstream(dtype, gradient, s)
        with using(backend):
            actual = evaluate(spec, given, dict(sample.options), asked)
        truth, own = _reference(spec, given, dict(sample.options), dtype, asked)
        for name, t in truth.items():
            wrong[name] = max(wrong.get(name, 0.0), error(actual[name], t))
            low[name] = max(low.get(name, 0.0), floor(t, actual[name].dtype))
            theirs[name] = max(theirs.get(name, 0.0), own[name] if math.isfinite(own[name]) else 0.0)
    here, asked = make.draw(spec, sample, dtype, seed, device), _upstream(dtype, gradient, seed)
    for i in range(MANY):
        given = make.laid_out(make.neighbour(here, i), layout)
        for name, near in _reference(spec, given, dict(sample.options), dtype, asked)[1].items():
            theirs[name] = max(theirs[name], near if math.isfinite(near) else 0.0)
    return wrong, low, theirs


def _reference(
    spec: OpSpec, given: Tensors, options: dict[str, Any], dtype: torch.dtype, upstream: Callable[..., Any] | None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The float64 truth, and the error of the same-dtype reference."""
    with using("reference"):
        truth = evaluate(spec, make.cast(spec, given, torch.float64), options, upstream)
        plain = evaluate(spec, given, options, upstream)
    return truth, {name: error(plain[name], truth[name]) for name in truth}


CACHED = 20_000  # elements up to which the truth of a case is kept: every backend, level and layout asks for it again
_references: dict[tuple[Any, ...], tuple[dict[str, torch.Tensor], dict[str, float]]] = {}
_own: dict[tuple[Any, ...], dict[str, tuple[int, float]]] = {}


def _key(spec: OpSpec, sample: Sample, dtype: torch.dtype, gradient: str | None, seed: int, device: str) -> tuple[Any, ...]:
    case = (spec.name, sample.name, tuple(sample.dims.items()), repr(sample.options), sample.present, id(sample.twist))
    values = gradient if gradient is None or gradient in make.OTHER_VALUES else "contiguous"
    return (*case, dtype, values, seed, device)


def own_errors(
    spec: OpSpec, sample: Sample, dtype: torch.dtype, gradient: str | None, seed: int, device: str, draws: int
) -> dict[str, tuple[int, float]]:
    """By tensor: its number of elements, and the largest error of the reference over several draws.

    A tensor of a few elements is often exact by luck, and no kernel can be held to that: so many draws are taken that about ELEMENTS
    elements were seen, or `draws`. A tensor of that many elements is judged by its own draw alone.
    """
    key = (*_key(spec, sample, dtype, gradient, seed, device), draws)
    if key in _own:
        return _own[key]
    found: dict[str, tuple[int, float]] = {}
    for i in range(1, draws):
        s = seed + 6 * i  # the same outputs of "partial" are kept, for up to three outputs
        given = make.draw(spec, sample, dtype, s, device)
        truth, own = _reference(spec, given, dict(sample.options), dtype, _upstream(dtype, gradient, s))
        for name, t in truth.items():
            finite = own[name] if math.isfinite(own[name]) else 0.0
            if i == 1 or i * t.numel() < ELEMENTS:
                found[name] = (t.numel(), max(found.get(name, (0, 0.0))[1], finite))
        if all(i * elements >= ELEMENTS for elements, _ in found.values()):
            break
    _own[key] = found
    return found


def report(rows: Iterable[Row]) -> str:
    """A text table: one line per op, backend, dtype, sample and direction, its worst tensor."""
    worst: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.op, row.backend, row.dtype, row.sample, row.direction)
        if key not in worst or row.ratio > worst[key].ratio:
            worst[key] = row
    head = f"{'op':<18} {'backend':<12} {'dtype':<9} {'sample':<14} {'direction':<9}"
    head += f" {'error':>9} {'eager':>9} {'ratio':>7} {'limit':>5}  status"
    lines = [
        f"{r.op:<18} {r.backend:<12} {r.dtype:<9} {r.sample:<14} {r.direction:<9}"
        f" {r.error:>9.2e} {r.reference_error:>9.2e} {r.ratio:>7.2f} {r.limit:>5.1f}  {r.status} {r.reason}".rstrip()
        for r in worst.values()
    ]
    return "\n".join([head, *lines])


def levels() -> list[str]:
    """The instruction-set levels of the C++ kernels that this machine can run, lowest first; none without the extension."""
    before, found = memkernels.cpu_level(), []
    for level in LEVELS if before else ():
        try:
            memkernels.cpu_level(level)
        except ValueError:
            continue
        found.append(level)
    memkernels.cpu_level(before)
    return found


def labels() -> list[str]:
    """Every backend that is there, and the C++ one again for each instruction-set level below the highest."""
    there = [name for name, reason in memkernels.backends().items() if reason is None]
    return there + [f"cpp:{level}" for level in reversed(levels()[:-1]) if "cpp" in there]


def verify_case(spec: OpSpec, sample: Sample, dtype: torch.dtype, backend: str, device: str) -> Iterator[Row]:
    """`verify` of one case: its worst tensor in each direction, or a row that says why there is none."""
    empty: dict[str, Any] = dict(op=spec.name, backend=backend, dtype=str(dtype).removeprefix("torch."), sample=sample.name, tensor="")
    numbers: dict[str, Any] = dict(error=math.nan, reference_error=math.nan, ratio=math.nan, limit=math.nan)
    try:
        reason = why_not(spec, make.draw(spec, sample, dtype, device=device), dict(sample.options), backend)
        rows = measure(spec, sample, dtype, backend, device=device) if reason is None else []
        status = "unavailable"
    except Exception as exception:  # a crash of one case is a row of the report, not the end of it
        rows, reason = [], f"{type(exception).__name__}: {exception}"
        status = "unavailable" if isinstance(exception, BackendError) else "error"
    for direction in DIRECTIONS:
        if rows:
            mine = [row for row in rows if row.direction == direction]
            if mine:
                yield max(mine, key=lambda row: (row.status != "ok", row.ratio))
        else:
            yield Row(**empty, **numbers, direction=direction, status=status, reason=reason or "")


def verify(
    ops: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: str = "cpu",
) -> Iterator[Row]:
    """Every op x backend x dtype x sample against float64 on this machine.

    Args:
        ops: op names; None: all.
        backends: see `using`; None: all that are installed, every instruction-set level included.
        dtypes: None: float64, float32, bfloat16, float16.
        device: "cpu" or "cuda".

    Yields:
        One Row per case and direction, the worst tensor of it, with status, ratio and reason.

    Raises:
        ValueError: an unknown op.

    Example:
        >>> all(row.status == "ok" for row in verify(["memory_read"], ["reference"]))
        True
    """
    known = specs()
    for name in ops or known:
        if name not in known:
            raise ValueError(f"verify: ops: expected one of {', '.join(known)}, got {name!r}")
    for name in ops or known:
        for backend in backends or labels():
            for dtype in dtypes or DTYPES:
                for sample in known[name].samples:
                    yield from verify_case(known[name], sample, dtype, backend, device)

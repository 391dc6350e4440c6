"""Inputs drawn from a spec, and the memory layouts that inputs and upstream gradients are given."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from memkernels.testing.spec import OpSpec, Sample, Tensors

Layout = Callable[[torch.Tensor], torch.Tensor]


def generator(*key: Any) -> torch.Generator:
    """A CPU generator seeded by the text of `key`: the same key draws the same numbers on every machine."""
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))


def draw(spec: OpSpec, sample: Sample, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> Tensors:
    """The tensor arguments of one call, in the order of the spec.

    Args:
        spec: the op.
        sample: sizes, which optional inputs are present, and the twist applied last.
        dtype: floating dtype of the call; every dtype draws the same float64 numbers, rounded.
        seed: another seed, other values.
        device: where the tensors live; they are drawn on the CPU.

    Returns:
        Contiguous tensors by name; None for an optional input that is absent.

    Example:
        >>> spec = specs()["memory_read"]
        >>> {name: tuple(t.shape) for name, t in draw(spec, spec.samples[0], torch.float32).items()}
        {'memory': (2, 5, 4), 'weights': (2, 3, 5)}
    """
    drawn: Tensors = {}
    for name, wanted in spec.inputs.items():
        if wanted.optional and name not in sample.present:
            drawn[name] = None
            continue
        numbers = generator(spec.name, sample.name, name, seed)
        drawn[name] = wanted.draw(wanted.shape(sample.dims), wanted.dtype_in(dtype), numbers).to(wanted.dtype_in(dtype))
    if sample.twist is not None:
        drawn = {**drawn, **sample.twist(drawn)}
    return {name: None if t is None else t.to(device, spec.inputs[name].dtype_in(dtype)).contiguous() for name, t in drawn.items()}


def neighbour(given: Tensors, seed: int) -> Tensors:
    """Each number a unit in the last place larger, smaller or as it is; zeros, infinities and integers stay."""
    numbers = torch.Generator().manual_seed(seed)

    def moved(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        steps = torch.randint(-1, 2, t.shape, generator=numbers).to(t.device, t.dtype)
        return torch.where(t.isfinite(), t + t * steps * torch.finfo(t.dtype).eps, t)

    return {name: moved(t) for name, t in given.items()}


def differentiable(spec: OpSpec, inputs: Tensors) -> list[str]:
    """Names of the inputs that gradients are asked for: present and of the call's floating dtype."""
    return [name for name, t in inputs.items() if t is not None and spec.inputs[name].dtype is None]


def cast(spec: OpSpec, inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """The same values in another floating dtype; other inputs stay."""
    names = differentiable(spec, inputs)
    return {name: t.to(spec.inputs[name].dtype_in(dtype)) if t is not None and name in names else t for name, t in inputs.items()}


def tensors_of(result: Any) -> list[torch.Tensor]:
    """All tensors of a result (tensor, None, or nested tuples and lists of them), in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [t for item in result for t in tensors_of(item)]
    return []


def garbage(t: torch.Tensor, shape: Iterable[int]) -> torch.Tensor:
    """Memory that must not be read: NaN, the largest integer, or True."""
    if t.is_floating_point():
        return t.new_full(tuple(shape), float("nan"))
    return t.new_full(tuple(shape), True if t.dtype == torch.bool else torch.iinfo(t.dtype).max)


def contiguous(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous()


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The last two dimensions lie in memory the other way round."""
    return t.mT.contiguous().mT if t.ndim >= 2 else t


def inner_stride(t: torch.Tensor) -> torch.Tensor:
    """Every second element of a row, garbage between."""
    if not t.ndim:
        return t
    view = garbage(t, (*t.shape[:-1], 2 * t.shape[-1]))[..., ::2]
    view.copy_(t)
    return view


def outer_slice(t: torch.Tensor) -> torch.Tensor:
    """The inside of a tensor that is larger in every dimension, garbage around."""
    view = garbage(t, (n + 3 for n in t.shape))
    for axis, n in enumerate(t.shape):
        view = view.narrow(axis, 1, n)
    view.copy_(t)
    return view


def expanded(t: torch.Tensor) -> torch.Tensor:
    """Stride 0 in the first dimension: every slice is the first one (other values than `t`; integers are offsets or places, and stay)."""
    return t[:1].clone().expand(t.shape) if t.ndim and t.dtype != torch.int64 else t


def expanded_inner(t: torch.Tensor) -> torch.Tensor:
    """Stride 0 in the last dimension (other values than `t`; integers stay)."""
    return t[..., :1].clone().expand(t.shape) if t.ndim and t.shape[-1] and t.dtype != torch.int64 else t


def misaligned(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, but one element after an aligned address."""
    flat = garbage(t, (t.numel() + 1,))
    view = flat[1:].view(t.shape)
    view.copy_(t)
    return view


def odd_strides(t: torch.Tensor) -> torch.Tensor:
    """Dimensions of size 1 get strides that nobody may follow."""
    strides = [stride if n != 1 else 1_000_003 + axis for axis, (n, stride) in enumerate(zip(t.shape, t.contiguous().stride()))]
    return t.contiguous().as_strided(t.shape, strides)


def permuted(t: torch.Tensor) -> torch.Tensor:
    """The two dimensions before the last lie in memory the other way round ("B NH Q D" stored as B Q NH D)."""
    return t.transpose(-3, -2).contiguous().transpose(-3, -2) if t.ndim >= 3 else transposed(t)


LAYOUTS: dict[str, Layout] = {
    f.__name__: f for f in (contiguous, transposed, inner_stride, outer_slice, expanded, expanded_inner, misaligned, odd_strides, permuted)
}


def laid_out(inputs: Tensors, layout: str) -> Tensors:
    return {name: None if t is None else LAYOUTS[layout](t) for name, t in inputs.items()}


def _cat_slice(g: torch.Tensor) -> torch.Tensor:
    return torch.cat([g, garbage(g, g.shape)], -1).narrow(-1, 0, g.shape[-1]) if g.ndim else g


def _from_sum(g: torch.Tensor) -> torch.Tensor:
    return g.reshape(-1)[:1].clone().reshape(()).expand(g.shape) if g.numel() else g


GRADIENT_LAYOUTS: dict[str, Layout] = {
    "contiguous": contiguous,
    "from_sum": _from_sum,
    "cat_slice": _cat_slice,
    "transposed": transposed,
    "every_second": inner_stride,
    "partial": contiguous,
}
# The layouts, of inputs and of gradients, that change the values too; the others say the same in another place.
OTHER_VALUES = frozenset({"expanded", "expanded_inner", "from_sum", "partial"})


def upstream(outputs: Sequence[torch.Tensor], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> list[torch.Tensor | None]:
    """Random upstream gradients of these outputs, rounded to `dtype` first so that every dtype gets the same values.

    `layout`: a name in `GRADIENT_LAYOUTS` or `LAYOUTS`; "partial" leaves out all but one, which one by `seed`. An output that is not
    differentiable gets None.
    """
    lay_out = GRADIENT_LAYOUTS[layout] if layout in GRADIENT_LAYOUTS else LAYOUTS[layout]
    live = [i for i, t in enumerate(outputs) if t.requires_grad]
    kept = {live[seed % len(live)]} if layout == "partial" and live else set(live)
    grads: list[torch.Tensor | None] = []
    for i, t in enumerate(outputs):
        values = torch.randn(t.shape, dtype=torch.float64, generator=generator("gradient", i, seed)).to(dtype)
        grads.append(lay_out(values.to(t.device, t.dtype)) if i in kept else None)
    return grads


def sum_outputs(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """A scalar of all differentiable outputs, each element weighted differently."""
    total = outputs[0].new_zeros((), dtype=torch.float64)
    for i, t in enumerate(outputs):
        if t.is_floating_point():
            weight = torch.linspace(0.5 + i, 1.5 + i, max(t.numel(), 1), dtype=torch.float64, device=t.device)[: t.numel()]
            total = total + (t.double().reshape(-1) * weight).sum()
    return total

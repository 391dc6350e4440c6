"""The C++ memory kernels where the specs' small samples do not reach: several tasks per batch entry, long sums, ends of pages, in place."""

import ctypes
import mmap
from functools import cache

import pytest
import torch

import memkernels as mk
from memkernels.testing.compare import error, levels, using

pytest.importorskip("memkernels._C")
LABELS = [f"cpp:{level}" for level in levels()]
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def content_case(options, masked, dtype):
    torch.manual_seed(0)
    batch, rows, width, heads = 2, 1300, 68, 5
    plain = 0.3 if options.get("similarity", "cosine") != "cosine" else 1.0
    args = [
        draw(batch, rows, width, dtype=dtype),
        draw(batch, heads, width, dtype=dtype, scale=plain),
        draw(batch, heads, dtype=dtype, scale=0.3),
    ]
    mask = torch.rand(batch, rows) < 0.6 if masked else None

    def function(memory, key, strength, first=0):
        return mk.content_read(memory, key, strength, mask=None if mask is None else mask[first:], **options)

    return function, args


def write_case(heads, dtype):
    torch.manual_seed(0)
    batch, rows, width = 2, 1300, 68
    weights = torch.softmax(torch.randn(batch, heads, rows, dtype=torch.float64), -1) * 50
    args = [
        draw(batch, rows, width, dtype=dtype),
        weights.to(dtype),
        torch.rand(batch, heads, width).to(dtype),
        draw(batch, heads, width, dtype=dtype),
    ]
    return (lambda *a, first=0: mk.memory_write(*a)), args


CASES = {
    "cosine": lambda dtype: content_case({}, False, dtype),
    "dot_masked": lambda dtype: content_case(dict(similarity="dot"), True, dtype),
    "l2": lambda dtype: content_case(dict(similarity="l2"), False, dtype),
    "write_1": lambda dtype: write_case(1, dtype),
    "write_4": lambda dtype: write_case(4, dtype),
    "write_6": lambda dtype: write_case(6, dtype),
}


def run(function, args, backend, threads=2, first=0, rounded=torch.float64):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = [t[first:].clone().requires_grad_() for t in args]
        with using(backend):
            out = function(*leaves, first=first)
            gradient = torch.randn(2, *out.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            return [out.detach(), *torch.autograd.grad(out, leaves, gradient[first:].to(rounded).to(out.dtype))]
    finally:
        torch.set_num_threads(before)


@cache
def references(case, dtype):
    """In this dtype, and in float64."""
    function, args = CASES[case](dtype)
    return run(function, args, "reference"), run(function, [t.double() for t in args], "reference", rounded=dtype)


@pytest.mark.parametrize("backend", LABELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_many_tasks(case, dtype, backend):
    function, args = CASES[case](dtype)
    got = run(function, args, backend)
    for one, two in zip(run(function, args, backend, threads=1), got):
        assert torch.equal(one, two), "depends on the thread count"
    for alone, together in zip(run(function, args, backend, first=1), got):
        assert torch.equal(alone, together[1:]), "depends on the rest of the batch"
    for i, (actual, reference, truth) in enumerate(zip(got, *references(case, dtype))):
        allowed = max((2 if i == 0 else 3) * error(reference, truth), 2 * torch.finfo(dtype).eps * float(truth.abs().max()))
        assert error(actual, truth) <= allowed, (i, error(actual, truth), error(reference, truth))


def at_page_end(tensor):
    """A copy whose last element lies at the end of a page that is followed by one that may not be touched."""
    page = mmap.PAGESIZE
    pages = -(-tensor.numel() * tensor.element_size() // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + pages * page), page, 0) == 0
    whole = torch.frombuffer(memory, dtype=tensor.dtype, count=pages * page // tensor.element_size())
    return whole[whole.numel() - tensor.numel() :].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("backend", LABELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 19, 64])
def test_nothing_past_the_end_is_touched(width, dtype, backend):
    memory, key, weights = draw(1, 5, width, dtype=dtype), draw(1, 3, width, dtype=dtype), draw(1, 3, 5, dtype=dtype)
    strength = draw(1, 3, dtype=dtype)
    calls = [
        (mk.content_read, [memory, key, strength]),
        (mk.memory_read, [memory, weights]),
        (mk.memory_write, [memory, weights, key, key]),
    ]
    for function, args in calls:
        with using(backend):
            leaves = [at_page_end(t).requires_grad_() for t in args]
            out = function(*leaves)
            gradient = at_page_end(torch.ones_like(out))
            guarded = [out, *torch.autograd.grad(out, leaves, gradient)]
            leaves = [t.clone().requires_grad_() for t in args]
            out = function(*leaves)
            plain = [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]
        assert all(torch.equal(a, b) for a, b in zip(guarded, plain))


@pytest.mark.parametrize("backend", LABELS)
def test_write_in_place_on_any_strides(backend):
    _, args = write_case(3, torch.float32)
    with using(backend), torch.no_grad():
        want = mk.memory_write(*args)
        for memory in (args[0].clone(), args[0].mT.contiguous().mT, torch.zeros(2, 1300, 70)[..., :68].copy_(args[0])):
            assert mk.memory_write_(memory, *args[1:]) is memory
            assert torch.equal(memory, want)


@pytest.mark.parametrize("backend", LABELS)
def test_nan_in_the_memory_is_not_lost(backend):
    memory = torch.full((1, 3, 4), float("nan"))
    with using(backend):
        assert mk.content_read(memory, torch.ones(1, 2, 4), torch.ones(1, 2)).isnan().all()

"""Launch parameters of the Triton kernels as pure functions, and what the generated cases do not reach: splits over long memories."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import memkernels
from memkernels.backends.triton import _launch
from memkernels.backends.triton._attention import dropout_arguments, limits, mask_arguments
from memkernels.backends.triton._common import INTERPRETED

SIZES = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 511, 512, 513, 4096, 65536, 1 << 20)
interpreted = pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a GPU")
DEVICE = "cpu" if INTERPRETED else "cuda"
ROOT = Path(__file__).resolve().parent.parent


def power_of_two(n):
    return n > 0 and n & (n - 1) == 0


def launches():
    for rows in SIZES:
        for width in (0, 1, 16, 17, 64, 500):
            yield rows, width, _launch.memory_write(rows, width)
            for backward in (False, True):
                yield rows, width, _launch.memory_read(rows, 4, width, backward)
                yield rows, width, _launch.content(rows, 4, width, None, backward)


def test_tiles_cover_the_rows():
    for rows, _, launch in launches():
        assert launch.chunk % launch.block_n == 0
        assert launch.splits * launch.chunk >= rows > (launch.splits - 1) * launch.chunk or rows == launch.splits == 0
        assert all(power_of_two(n) for n in (launch.block_r, launch.block_n, launch.block_w, launch.block_v, launch.num_warps))


def test_a_tile_holds_whole_rows():
    for width in SIZES[:14]:
        if width <= _launch.MAX_WIDTH:
            assert _launch.content(100, 4, width, width + 1).block_w >= width
            assert _launch.content(100, 4, width, width + 1).block_v >= width + 1
            assert _launch.memory_write(100, width).block_w >= width


def test_splits_are_bounded():
    assert all(_launch.content(rows, 4, 64, None).splits <= _launch.MAX_SPLITS for rows in SIZES)
    assert _launch.content(512, 4, 64, None).splits == 1
    assert _launch.content(65536, 4, 64, None).splits == 128


def test_launches_are_frozen_and_depend_on_no_batch():
    launch = _launch.content(100, 4, 64, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        launch.block_n = 1
    recurrent = _launch.recurrence, _launch.recurrence_rows
    for function in (
        _launch.content,
        _launch.memory_read,
        _launch.memory_write,
        *recurrent,
        _launch.attention,
        _launch.pointwise,
        _launch.segment,
        _launch.retrieval,
        _launch.quantized_attention,
        _launch.link,
        _launch.pointwise,
    ):
        assert "batch" not in function.__code__.co_varnames


def test_limits_are_reasons():
    assert _launch.refuse_rows(4, 64) is None
    assert "513" in _launch.refuse_rows(4, 64, 513)
    assert "129 heads" in _launch.refuse_rows(129, 16)
    assert "8192" in _launch.refuse_rows(128, 128)


def test_segment_launch():
    for heads in (1, 3, 4, 64):
        for width in (1, 16, 40, 512):
            launch = _launch.segment(heads, width, 7)
            assert launch.block_d >= width and launch.block_v == 16 and launch.block_h >= 1
            assert launch.block_e * launch.block_h * launch.block_d <= 4096 and launch.run % launch.block_e == 0
    assert _launch.segment(4, 16, 16) == _launch.Segment(16, 4, 16, 16, 256, 2)


def test_attention_launch():
    for keys in SIZES:
        for queries in SIZES[1:12]:
            for wide in (False, True):
                for kernel in ("forward", "dkey", "dquery"):
                    launch = _launch.attention(queries, keys, 64, 80, wide, kernel, (9, 0))
                    assert launch.block_m >= 16 and launch.block_d == 64 and launch.block_v == 128
                    assert launch.splits * launch.chunk >= keys
                    assert launch.splits == 1 or launch.chunk % launch.block_n == 0
    for queries in (65, 100, 127):  # a tile is as large as that of many queries, so it has as many warps
        for kernel in ("forward", "dquery"):
            few, many = (_launch.attention(n, 300, 128, 128, False, kernel, (9, 0)) for n in (queries, 4096))
            assert (few.block_m, few.num_warps) == (many.block_m, many.num_warps)
    assert _launch.attention(4, 65536, 64, 64, False, "forward", (9, 0)).splits == 64
    assert _launch.attention(65, 65536, 64, 64, False, "forward", (8, 0)).splits == 1


def recurrence(units, *, gates=4, more=0, norm=False, element=2, backward=True, shared=232448):
    return _launch.recurrence(units, units, gates, more, norm, element, backward, shared)


def test_recurrence_launch():
    assert recurrence(128).resident and not recurrence(129).resident
    assert recurrence(64, element=4).resident and not recurrence(65, element=4).resident
    assert recurrence(100).block_h == recurrence(100).block_p == 128
    assert recurrence(128).ahead == 2 and recurrence(128, shared=166912).ahead == 1
    assert recurrence(128, more=2, norm=True).ahead == 1
    assert not recurrence(128, shared=101376).resident and recurrence(64, shared=101376).resident
    assert not recurrence(64, element=4, more=2, norm=True, shared=101376).resident
    assert _launch.recurrence_rows(1000, whole=True).block_h == 1024
    assert _launch.recurrence_rows(1000, whole=False).block_h == 128


def test_attention_arguments():
    assert limits(5, 9, -1, 0, "top-left") == (-5, 0)
    assert limits(5, 9, 2, 0, "bottom-right") == (2, 4)
    assert dropout_arguments(0.5) == (1 << 31, 2.0)
    assert dropout_arguments(1.0) == (0, 0.0)
    assert mask_arguments(None, 4) == (1, 0, 0, 0, 0)
    assert mask_arguments(torch.zeros(2, 1, 3, 5), 4) == (2, 15, 0, 5, 1)


@pytest.mark.skipif(INTERPRETED, reason="asks torch alone: the run without the interpreter has it")
@pytest.mark.parametrize(
    "setting", ["cuda.matmul.allow_tf32 = word == 'tf32'", "cuda.matmul.fp32_precision = word", "fp32_precision = word"]
)
def test_precision_follows_every_switch_of_torch(setting):
    """A process each: torch refuses to read one kind of switch after the other was set."""
    code = f"""import torch
from memkernels.backends.triton import _common, _matmul
for word in ("tf32", "ieee", "tf32"):
    torch.backends.{setting}
    assert _common.precision(torch.float32) == _matmul.product_precision(torch.float32) == word, word
    assert _common.precision(torch.bfloat16) == "tf32x3"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def both(function, *tensors):
    """Outputs and gradients in float64 by the reference and in float32 by Triton."""
    results = []
    for name, dtype, device in (("reference", torch.float64, "cpu"), ("triton", torch.float32, DEVICE)):
        inputs = [t.to(device, dtype).requires_grad_() for t in tensors]
        with memkernels.backend(name):
            out = function(*inputs)
            results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    return zip(*results, strict=True)


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@interpreted
@pytest.mark.parametrize(
    "function, shapes",
    [
        (memkernels.memory_read, ((1, 1100, 3), (1, 2, 1100))),
        (memkernels.content_read, ((1, 1100, 3), (1, 2, 3), (1, 2))),
        (memkernels.content_address, ((1, 1100, 3), (1, 2, 3), (1, 2))),
        (memkernels.memory_write, ((1, 1100, 3), (1, 2, 1100), (1, 2, 3), (1, 2, 3))),
    ],
)
def test_several_splits(function, shapes):
    for want, got in both(function, *draw(*shapes)):
        torch.testing.assert_close(got.cpu().double(), want, rtol=2e-4, atol=2e-4)


@interpreted
def test_dropout_is_the_reference_mask():
    query, key, value = draw((1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 3))

    def function(q, k, v):
        torch.manual_seed(3)
        return memkernels.attention(q, k, v, dropout_p=0.4)

    if DEVICE == "cpu":
        for want, got in both(function, query, key, value):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@interpreted
def test_values_that_no_query_sees_reach_nothing():
    query, key, value = (t.float().to(DEVICE) for t in draw((1, 1, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4)))
    with memkernels.backend("triton"):
        clean = memkernels.attention(query, key, value, is_causal=True)
        key[..., 5, :], value[..., 5, :] = float("nan"), float("nan")
        dirty = memkernels.attention(query, key, value, is_causal=True)
    assert torch.equal(clean[..., :5, :], dirty[..., :5, :]) and dirty[..., 5, :].isnan().all()


@interpreted
def test_refusals_name_their_reason():
    with memkernels.backend("triton"):
        with pytest.raises(memkernels.BackendError, match="float64 is not supported"):
            memkernels.memory_read(*(t.to(DEVICE) for t in draw((1, 2, 2), (1, 1, 2))))
        with pytest.raises(memkernels.BackendError, match="over the limit of 512"):
            memkernels.content_read(*(t.float().to(DEVICE) for t in draw((1, 2, 600), (1, 1, 600), (1, 1))))


def is_the_reference(op, dims, options, present=()):
    """Outputs and gradients of one call, against the reference in float64."""
    from memkernels.testing import compare, inputs, specs
    from memkernels.testing.spec import Sample

    spec, sample = specs()[op], Sample("given", dims, options, present=present)
    given = inputs.draw(spec, sample, torch.float32, 0, DEVICE)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        given = {name: None if t is None else t.to(dtype) for name, t in given.items()}
        with compare.using(backend):
            found.append(compare.evaluate(spec, given, dict(options), lambda outputs, dtype=dtype: upstream(outputs, dtype)))
    for name, wanted in found[1].items():
        torch.testing.assert_close(found[0][name].double(), wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def upstream(outputs, dtype):
    from memkernels.testing import inputs

    return [None if d is None else d.to(dtype) for d in inputs.upstream(outputs, torch.float32)]


@interpreted
@pytest.mark.parametrize("form", ["graves", pytest.param("pytorch-ntm", marks=pytest.mark.slow)])
def test_ntm_sequence_in_blocks(form):
    """More rows, columns and units than a block; taps that reach around the circle are among the generated samples."""
    is_the_reference("ntm_sequence", dict(T=2, B=1, I=2, H=70, N=260, W=5, R=1, U=2, S=1), dict(form=form))


CONTROLLED = memkernels.DNCController._fields
EXTRA = dict(key_mask=True, sharpen_links=True, deallocate=True, write_gradient=True)


@interpreted
@pytest.mark.parametrize(
    "options, dims",
    [
        (dict(EXTRA, cosine="product", bounded=True, strength="softplus", clip=0.3), dict(T=5, N=5, U=2)),  # segments of 3 and 2 steps
        pytest.param(EXTRA, dict(T=2, N=260, H=70), marks=pytest.mark.slow),  # more of everything than a block
        *(
            pytest.param(dict(dict(write_gradient=True, cosine=cosine), **option), dict(T=3, N=6), marks=pytest.mark.slow)
            for cosine in ("roots", "roots_and_product", "product")
            for option in ({}, *({name: True} for name in (*EXTRA, "bounded")), dict(key_mask=True, bounded=True))
        ),
    ],
    ids="-".join,
)
def test_dnc_sequence(options, dims):
    is_the_reference("dnc_sequence", dict(dict(B=1, I=2, H=3, P=20, W=3, R=2, U=1), **dims), options, CONTROLLED)


@interpreted
def test_dnc_runs_in_one_op():
    torch.manual_seed(0)
    layer = memkernels.nn.DNC(3, 5, slots=6, width=4, read_heads=2).to(DEVICE)
    x = torch.randn(2, 3, 3, device=DEVICE, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        with memkernels.backend(backend):
            output, state = layer(x)
            found.append((output, *state.memory, *torch.autograd.grad(output.square().sum(), (x, *layer.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_dnc_knows_what_its_op_has_no_kernel_for():
    from memkernels.backends.triton import dnc_sequence as module
    from memkernels.nn import _dnc_interface

    limits = (module.MAX_ROWS, _launch.MAX_WIDTH, module.MAX_READERS)
    assert limits == (_dnc_interface.MAX_SLOTS, _dnc_interface.MAX_WIDTH, _dnc_interface.MAX_READ_HEADS)
    with torch.device("meta"):
        for sizes, reason in (((1025, 4, 1), "1025 rows"), ((4, 513, 1), "513 elements"), ((4, 4, 33), "33 read heads")):
            rows, width, readers = sizes
            call = [torch.empty(1, 1, 1), torch.empty(1, rows, width), *[None] * 4, torch.empty(1, readers, rows)]
            assert reason in module.supports(*call)


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_attention_by_descriptors(monkeypatch):
    """TMA, and the one loop that Blackwell's warps share, give the bits of loads by pointers; keys end amid a block, widths amid a tile."""
    from memkernels.backends.triton import attention as module
    from memkernels.backends.triton._launch import Device

    query, key, value = torch.randn(1, 2, 70, 24).bfloat16(), torch.randn(1, 1, 90, 24).bfloat16(), torch.randn(1, 1, 90, 40).bfloat16()
    plans, plan = [], module._plan

    def call(capability, **options):
        monkeypatch.setattr(module, "device_of", lambda device: Device(capability, 232448))
        with memkernels.backend("triton"):
            return memkernels.attention(query, key, value, enable_gqa=True, return_lse=True, **options)

    monkeypatch.setattr(module, "_plan", lambda *a: plans.append(plan(*a)) or plans[-1])
    for causal, special in ((False, True), (True, False)):
        found = [call(capability, is_causal=causal) for capability in ((8, 0), (9, 0), (10, 0))]
        assert [p[1] is not None for p in plans[-3:]] == [False, True, True] and [p[2] for p in plans[-3:]] == [False, False, special]
        assert all(torch.equal(t, wanted) for other in found[1:] for t, wanted in zip(other, found[0], strict=True))


def test_what_has_no_descriptor():
    from memkernels.backends.triton.attention import _descriptor

    rows = torch.zeros(2, 3, 8, 16, dtype=torch.bfloat16)
    assert _descriptor(rows, 64, 16).strides == [384, 128, 16, 1]
    assert _descriptor(rows.transpose(1, 2)[:, :1], 64, 16).strides == [384, 16, 128, 1]  # of one row any stride will do
    odd = torch.zeros(2, 3, 8, 17, dtype=torch.bfloat16)
    flat = torch.zeros(2 * 3 * 8 * 16 + 1, dtype=torch.bfloat16)[1:].reshape(rows.shape)
    for wrong in (odd, flat, rows.mT, rows[:, :1].expand(2, 3, 8, 16), rows[:0]):
        assert _descriptor(wrong, 64, 16) is None


def test_launchers_copy_nothing_from_the_host():
    """Such a copy waits for the device, and no CUDA graph can hold it."""
    waits = {"tensor", "as_tensor", "item", "tolist", "cpu", "nonzero"}
    for path in (ROOT / "memkernels" / "backends" / "triton").glob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
        assert not [f"{path.name}:{n.lineno}" for n in calls if n.func.attr in waits]


def test_grids_of_many_steps_entries_and_places(monkeypatch):
    """CUDA has at most 65,535 programs along the second and third axis."""
    from memkernels.backends.triton import _recurrence, topk_read, weighted_bag

    grids = []
    for module in (_recurrence, topk_read, weighted_bag):
        monkeypatch.setattr(module, "run", lambda kernel, grid, *args, **options: grids.append(grid))
    n, wide, index = 1 << 20, torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    many = wide.expand(n, 1)
    for steps, batch in ((n, 1), (1, n)):
        states = torch.zeros(1, 128)
        layer = _recurrence.Layer(1, steps, batch, 128, 128, 1, torch.float32, states, states, False, None, None, None)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "new_empty", lambda t, *shape, **options: t)  # nothing is launched: no room is needed
            layer.entered(states, states, None, False)
    topk_read.forward(many, many, index.expand(n, 1), *([many[:, None]] * 3), None, 1, "dot", 1.0, False)
    weighted_bag.backward(None, many.mT, wide, wide, index.expand(1, n), many.mT)
    assert len(grids) == 5
    assert all(all(m < 1 << 16 for m in grid[1:]) and grid[0] < 1 << 31 for grid in grids), grids

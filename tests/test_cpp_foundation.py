"""The C++ foundation at every instruction-set level: vector functions, conversions, tails, threads, teams, fork, tensor passing."""

import math
import mmap
import os

import pytest
import torch

_C = pytest.importorskip("memkernels._C")
import memkernels.backends.cpp  # noqa: E402, F401  (binds torch)

LEVELS = _C.supported_levels()
EXACT = {"exp": torch.exp, "log": torch.log, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "sqrt": torch.sqrt}


@pytest.fixture(params=LEVELS)
def level(request):
    _C.set_cpu_level(request.param)
    yield request.param
    _C.set_cpu_level("auto")


def apply(function, x):
    out = torch.full_like(x, float("nan"))
    _C.vec_math(out, x, function)
    return out


def ulps(got, want):
    """Error in units of the last place of `want` (float64), denormal spacing included."""
    info = torch.finfo(got.dtype)
    exponent = torch.frexp(want.abs().clamp_min(info.tiny)).exponent - 1
    spacing = info.eps * torch.exp2(exponent.double())
    return ((got.double() - want) / spacing).abs()


def sample(function, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = {"exp": 110, "sigmoid": 110, "tanh": 12, "log": 80, "sqrt": 80}[function]
    x = torch.cat(
        [torch.rand(20001, generator=generator, dtype=torch.float64) * 2 - 1, torch.linspace(-1, 1, 40001, dtype=torch.float64) * wide]
    )
    x = torch.cat([x, x[:20001] * 1e-6, x[:20001] * 1e-30])
    if function in ("log", "sqrt"):
        x = torch.cat([x.abs(), torch.exp(x.clamp(-80, 80)), torch.tensor([1e-40, 5e-39], dtype=torch.float64)])
    return x.to(dtype)


@pytest.mark.parametrize("function", EXACT)
def test_float32_functions_within_two_ulp(level, function):
    x = sample(function, torch.float32)
    want = EXACT[function](x.double())
    finite = want.abs() <= torch.finfo(torch.float32).max
    error = ulps(apply(function, x)[finite], want[finite])
    assert error.max() <= (3.0 if level == "baseline" else 2.2), (x[finite][error.argmax()], error.max())


@pytest.mark.parametrize("function", EXACT)
def test_float64_functions(level, function):
    x = sample(function, torch.float64)
    want = EXACT[function](x)  # torch's own float64 functions are within 1 ulp
    error = ulps(apply(function, x), want)
    assert error.max() <= 4.5, (x[error.argmax()], error.max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_special_values(level, dtype):
    info, inf, nan = torch.finfo(dtype), math.inf, math.nan
    x = torch.tensor([-inf, inf, nan, 0.0, -0.0, info.tiny, info.max, -info.max, 1000.0, -1000.0], dtype=dtype)
    for function, exact in EXACT.items():
        torch.testing.assert_close(
            apply(function, x), exact(x), rtol=4 * info.eps, atol=0, equal_nan=True, msg=lambda m, f=function: f"{f}: {m}"
        )


def test_exp_rounds_denormal_results(level):
    x = torch.linspace(-104.5, -87, 5000)
    assert (apply("exp", x).double() - torch.exp(x.double())).abs().max() <= 2**-149 * 0.75
    assert apply("exp", torch.tensor([-103.97]))[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives_a_copy(level, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype)
    got = apply("copy", x)
    nan = x.isnan()
    assert torch.equal(got.view(torch.int16)[~nan], bits[~nan]) and got[nan].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(level, dtype):
    x = torch.randn(70001).to(dtype)
    root = x.abs().double().sqrt().float()  # torch's float32 sqrt is MKL's, which on AMD misses the nearest number now and then
    torch.testing.assert_close(apply("sqrt", x.abs()), root.to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(
        apply("exp", x * 8).float(), (x * 8).float().exp().to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=2**-24
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tails_stay_inside_the_page(level, dtype):
    page = mmap.PAGESIZE
    guard = mmap.mmap(-1, 2 * page)
    import ctypes

    base = ctypes.addressof(ctypes.c_char.from_buffer(guard))
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(base + page), page, 0) == 0
    count = page // dtype.itemsize
    whole = torch.frombuffer(guard, dtype=dtype, count=count)
    values = torch.randn(40).to(dtype)
    for n in range(1, 40):
        x = whole[count - n :]
        x.copy_(values[:n])
        assert torch.equal(apply("copy", x), values[:n])
        x.zero_()
        _C.vec_math(x, values[:n].clone(), "copy")
        assert torch.equal(x, values[:n])
        total, largest = _C.vec_reduce(x)
        assert largest == values[:n].max().item() and abs(total - values[:n].double().sum().item()) < 1e-4
        if n < count:
            assert whole[count - n - 1] == 0


def test_parallel_for_visits_each_item_once():
    for n, grain in [(0, 1), (1, 1), (5, 1), (1000, 1), (1000, 7), (3, 100)]:
        assert _C.parallel_visits(n, grain) == [1] * n


def test_team_keeps_step_and_falls_back():
    for size in (1, 2, 3, 64):
        assert _C.team_rounds(size, 2000) == 2000
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _C.team_rounds(2, 100) == 100
    finally:
        torch.set_num_threads(before)


def test_forked_child_runs_serial():
    torch.randn(2000, 2000).softmax(0)
    _C.team_rounds(2, 10)
    child = os.fork()
    if child == 0:
        good = _C.team_rounds(2, 100) == 100 and _C.parallel_visits(1000, 1) == [1] * 1000 and _C.num_threads() == 1
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_wrong_arguments_are_refused():
    x = torch.ones(4)
    with pytest.raises(TypeError, match=r"expected a dense torch.Tensor or None, got list"):
        _C.vec_math([1.0], x, "exp")
    with pytest.raises(ValueError, match=r"vec_math: out: expected float32\[4\], got None"):
        _C.vec_math(None, x, "exp")
    with pytest.raises(ValueError, match="contiguous last dimension"):
        _C.vec_math(torch.ones(2), x[::2], "exp")
    with pytest.raises(ValueError, match="float64, float32, bfloat16 or float16"):
        _C.vec_math(x, torch.ones(4, dtype=torch.int64), "exp")
    with pytest.raises(ValueError, match="cpu_level: level"):
        _C.set_cpu_level("sse9")

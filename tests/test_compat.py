"""The private names of torch that the package relies on are there and mean what we think."""

import pytest
import torch

from memkernels import _compat


class Double(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_functorch_is_seen_inside_transforms_only():
    seen = []
    torch.vmap(lambda x: seen.append(_compat.functorch_active()) or x)(torch.ones(2))
    assert seen == [True]
    assert not _compat.functorch_active()


def test_forward_ad_is_seen_inside_a_level_only():
    with torch.autograd.forward_ad.dual_level():
        assert _compat.forward_ad_active()
    assert not _compat.forward_ad_active()


def test_a_plain_call_is_one_that_nobody_looks_at():
    class Sub(torch.Tensor):
        pass

    plain = torch.ones(2)
    arguments = (plain, None, torch.nn.Parameter(plain), 1.0, "text", [1])
    assert _compat.plain_call(arguments[:-1])
    assert not _compat.plain_call(arguments)
    assert not _compat.plain_call((plain.as_subclass(Sub),))
    assert not _compat.plain_call((plain, torch.empty(1, device="meta").as_subclass(Sub)))


@pytest.mark.parametrize(
    "context",
    [
        torch.utils._python_dispatch.TorchDispatchMode,
        torch.overrides.TorchFunctionMode,
        lambda: torch.device("cpu"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.autograd.forward_ad.dual_level,
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    ],
)
def test_no_call_is_plain_under_a_mode(context):
    plain = torch.ones(2)
    with context():
        assert not _compat.plain_call((plain,))
    assert _compat.plain_call((plain,))


def test_no_call_is_plain_inside_a_transform():
    seen = []
    torch.vmap(lambda x: seen.append(_compat.plain_call(())) or x)(torch.ones(2))
    assert seen == [False]


def test_autocast_is_asked_of_every_device():
    with torch.autocast("cpu", torch.bfloat16):
        assert _compat.autocast_enabled("cpu")
    assert not _compat.autocast_enabled("cpu")
    assert not _compat.autocast_enabled("meta")


KINDS = {"python": _compat._call_kind, "in use": lambda args, inputs: _compat.call_kind(args, inputs)}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_kinds_of_calls(kind):
    plain, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    negative = torch.complex(plain, plain).conj().imag
    assert kind((plain, None, 1.0), 2) == kind((plain, leaf), 1) == _compat.PLAIN_CALL
    assert kind((plain, leaf, "text"), 2) == _compat.RECORDED
    for routed in ((plain, negative), (plain, [1]), (plain, plain.as_subclass(type("Sub", (torch.Tensor,), {})))):
        assert kind(routed, 2) == _compat.ROUTED
    with torch.no_grad():
        assert kind((plain, leaf), 2) == _compat.PLAIN_CALL
    with torch.autograd.forward_ad.dual_level():
        assert kind((plain, leaf), 2) == _compat.ROUTED
    seen = []
    torch.autograd.grad(_Watched.apply(leaf, kind, seen), leaf, torch.eye(2), is_grads_batched=True)
    assert seen == [_compat.ROUTED]


FIT = {"python": _compat._integers_fit, "in use": lambda *args: _compat.integers_fit(*args)}


@pytest.mark.parametrize("fit", FIT.values(), ids=FIT)
def test_integers_fit(fit):
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    flat, square = torch.tensor([-1, 3, 0]), torch.tensor([[0, 1, 1], [2, 5, 6]])
    assert fit(flat, -1, 3, _compat.ANY) and fit(square, 0, 6, _compat.SPANNING) and fit(square, 0, 7, _compat.RISING)
    assert fit(flat[:0], 0, -1, _compat.ANY) and fit(torch.zeros((), dtype=torch.int64).expand(2, 3), 0, 0, _compat.SPANNING)
    for wrong in (torch.tensor([0, least]), torch.tensor([most, 0]), torch.tensor([4]), torch.tensor([-2]).expand(9)):
        assert fit(wrong, -1, 3, _compat.ANY) is False
    assert not fit(square, 0, 7, _compat.SPANNING) and not fit(square, -1, 6, _compat.RISING) and not fit(flat, -1, 3, _compat.RISING)
    assert fit(square.T, 0, 6, _compat.ANY) and not fit(square.T, 0, 6, _compat.SPANNING) and not fit(flat[:0], 0, 0, _compat.RISING)
    long = torch.arange(40000)
    assert fit(long, 0, 39999, _compat.SPANNING) and fit(long[::2], 0, 39998, _compat.SPANNING)
    long[16384] = 16382
    assert fit(long, 0, 39999, _compat.ANY) and not fit(long, 0, 39999, _compat.RISING)
    assert fit(flat.to("meta"), -1, 3, _compat.ANY) is None
    with torch.autograd.forward_ad.dual_level():
        assert fit(flat, -1, 3, _compat.ANY) is None


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kind, seen):
        ctx.kind, ctx.seen = kind, seen
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(ctx.kind((grad,), 1))
        return grad, None, None


@pytest.mark.parametrize("like", [torch.ones(2, 3).T, torch.ones(0, 3), torch.ones(()), torch.ones(2, 3, dtype=torch.bfloat16)])
@pytest.mark.parametrize("shape", [None, (), (0, 4), (2, 0, 3), (5, 4)])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_empty_is_as_torch_makes_it(like, shape, dtype):
    torch.use_deterministic_algorithms(False)  # the fixture for all tests puts it back
    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            found, expected = _compat.empty(like, shape, dtype), _compat.general_empty(like, shape, dtype)
        for what in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(found, what) == getattr(expected, what)
        assert found.stride() == expected.stride() and found.is_inference() == expected.is_inference()


def test_empty_is_filled_where_torch_fills():
    assert torch.are_deterministic_algorithms_enabled()
    assert _compat.empty(torch.ones(3), None, None).isnan().all()


@pytest.mark.parametrize("make", [_compat._empties, lambda *given: _compat.empties(*given)])
def test_empties_are_made_as_each_alone(make):
    like, half = torch.ones(2, 3), torch.bfloat16
    found = make(like, (4,), None, None, half, torch.Size([2, 0]), half, (), torch.int64)
    assert found[1] is None and [(t.shape, t.dtype) for t in found if t is not None] == [
        (torch.Size([4]), torch.float32), (torch.Size([2, 0]), half), (torch.Size([]), torch.int64),
    ]  # fmt: skip
    assert found[0].isnan().all()  # where torch fills
    torch.use_deterministic_algorithms(False)  # the fixture for all tests puts it back
    assert [t.stride() for t in make(like, (2, 3), None, torch.Size([4, 0, 2]), half)] == [(3, 1), (2, 2, 1)]
    assert make(like) == ()
    with pytest.raises((TypeError, ValueError)):
        make(like, (2,))


@pytest.mark.parametrize("make", [_compat._empty_gradients, lambda *given: _compat.empty_gradients(*given)])
def test_empty_gradients_are_made_for_those_that_need_one(make):
    inputs = (torch.ones(2, 3).T, None, torch.ones(0, 3), torch.ones((), dtype=torch.bfloat16))
    found = make(inputs, (0, 1, 2, 3), (True, False, False, True))
    assert found[1] is found[2] is None and found[0].is_contiguous()
    assert [(t.shape, t.dtype) for t in (found[0], found[3])] == [(torch.Size([3, 2]), torch.float32), (torch.Size([]), torch.bfloat16)]
    assert found[0].isnan().all() and found[3].isnan()  # where torch fills
    assert make(list(inputs), (3,), [False]) == [None] and make(inputs, (), ()) == []
    with pytest.raises(IndexError):
        make(inputs, (4,), (True,))


def test_eager_apply_records_the_gradient():
    x = torch.ones(2, requires_grad=True)
    _compat.eager_apply(Double)(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_addresses_are_there():
    assert _compat.torch_parallel_for_address()
    assert _compat.torch_num_threads_address()
    assert type(_compat.dlpack_exchange_api()).__name__ == "PyCapsule"

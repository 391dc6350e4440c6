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


def test_eager_apply_records_the_gradient():
    x = torch.ones(2, requires_grad=True)
    _compat.eager_apply(Double)(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_addresses_are_there():
    assert _compat.torch_parallel_for_address()
    assert _compat.torch_num_threads_address()
    assert type(_compat.dlpack_exchange_api()).__name__ == "PyCapsule"

"""The private names of torch that the package relies on are there and mean what we think."""

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


def test_subclasses_and_modes_intercept():
    class Sub(torch.Tensor):
        pass

    plain = torch.ones(2)
    assert not _compat.intercepted((plain, None, torch.nn.Parameter(plain), 1.0))
    assert _compat.intercepted((plain.as_subclass(Sub),))
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert _compat.intercepted((plain,))


def test_autocast_is_asked_of_every_device():
    with torch.autocast("cpu", torch.bfloat16):
        assert _compat.autocast_enabled("cpu")
    assert not _compat.autocast_enabled("cpu")
    assert not _compat.autocast_enabled("meta")


def test_eager_apply_records_the_gradient():
    x = torch.ones(2, requires_grad=True)
    _compat.eager_apply(Double)(x).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_below_autograd_records_none():
    x = torch.ones(2, requires_grad=True)
    assert not _compat.below_autograd(torch.ops.aten.mul.Tensor, x, x).requires_grad


def test_addresses_are_there():
    assert _compat.torch_parallel_for_address()
    assert _compat.torch_num_threads_address()
    assert type(_compat.dlpack_exchange_api()).__name__ == "PyCapsule"

"""PyTorch's own samples of scaled_dot_product_attention (what its test suite runs on) with mk.attention in its place."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import memkernels as mk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations", exc_type=ImportError)

SDPA = next(info for info in invocations.op_db if info.name == "nn.functional.scaled_dot_product_attention")


def attend(function, sample, dtype, rounded):
    """Outputs and gradients of one sample in a dtype; the upstream gradient has values that `rounded` holds too."""
    tensors = [t.detach().to(dtype).requires_grad_() for t in (sample.input, *sample.args)]
    options = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in sample.kwargs.items()}
    torch.manual_seed(0)
    out = function(*tensors, **options)
    gradient = torch.randn(out.shape, dtype=torch.float64).to(rounded).to(dtype)
    return [out, *torch.autograd.grad(out, tensors, gradient)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_is_sdpa(dtype):
    """As near to float64 as scaled_dot_product_attention (2x its error forward, 3x backward, as everywhere) on all of torch's samples."""
    count = 0
    for sample in SDPA.sample_inputs("cpu", dtype, requires_grad=True):
        if sample.kwargs.get("dropout_p"):  # another random stream: only the shape can be compared
            found, wanted = (f(sample.input, *sample.args, **sample.kwargs) for f in (mk.attention, F.scaled_dot_product_attention))
            assert found.shape == wanted.shape and found.dtype == wanted.dtype
            continue
        exact = attend(F.scaled_dot_product_attention, sample, torch.float64, dtype)
        theirs, ours = attend(F.scaled_dot_product_attention, sample, dtype, dtype), attend(mk.attention, sample, dtype, dtype)
        for times, e, t, o in zip((2, 3, 3, 3), exact, theirs, ours):
            assert o.shape == t.shape and o.dtype == t.dtype
            if dtype == torch.float64:
                torch.testing.assert_close(o, e)
            elif e.numel():
                assert (o.double() - e).abs().max() <= times * (t.double() - e).abs().max() + 8 * torch.finfo(dtype).eps * e.abs().max()
        count += 1
    assert count > 10

"""PyTorch's own samples of scaled_dot_product_attention (what its test suite runs on) with mk.attention in its place."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision_are_as_near_as_the_math_backends(dtype, causal):
    """Their root mean square error is at most 1.2 times that of scaled_dot_product_attention by plain torch ops, over 1,024 keys."""
    torch.manual_seed(0)
    query, key, value, upstream = (torch.randn(1, 2, 1024, 64).to(dtype) for _ in range(4))

    def run(function, wide):
        leaves = [t.to(wide).requires_grad_() for t in (query, key, value)]
        out = function(*leaves, is_causal=causal)
        return [t.double() for t in (out, *torch.autograd.grad(out, leaves, upstream.to(wide)))]

    with sdpa_kernel(SDPBackend.MATH):
        exact, plain = (run(F.scaled_dot_product_attention, wide) for wide in (torch.float64, dtype))
    for mine, theirs, truth in zip(run(mk.attention, dtype), plain, exact):
        assert (mine - truth).square().mean() <= 1.2**2 * (theirs - truth).square().mean()


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 15, 31, 33, 63, 65, 127, 129, 255, 257, 384, 511, 512])
def test_any_head_dimension(width):
    """Up to 512, the values' too, which is another one here."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 2, 19, width).unbind(0)
    value, upstream = torch.randn(2, 1, 2, 19, 513 - width).unbind(0)

    def run(function, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (query, key, value)]
        out = function(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    for found, wanted in zip(run(mk.attention, torch.float32), run(F.scaled_dot_product_attention, torch.float64)):
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=2e-6 * wanted.abs().max().item())


def test_causal_bias():
    """torch.nn.attention.bias: masks without values, read as `is_causal` and a corner."""
    bias = pytest.importorskip("torch.nn.attention.bias")
    query, key = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 7, 4)
    for make, corner in ((bias.causal_upper_left, "top-left"), (bias.causal_lower_right, "bottom-right")):
        found = mk.attention(query, key, key, make(5, 7))
        assert type(found) is torch.Tensor and torch.equal(found, mk.attention(query, key, key, is_causal=True, causal=corner))
        torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, key, make(5, 7)))
        compiled = torch.compile(lambda mask: mk.attention(query, key, key, mask), fullgraph=True, backend="eager")
        assert torch.equal(compiled(make(5, 7)), found)
    with pytest.raises(ValueError, match=r"attn_mask: expected a CausalBias of \(5, 7\), got \(5, 6\)"):
        mk.attention(query, key, key, bias.causal_upper_left(5, 6))
    with pytest.raises(ValueError, match="attn_mask: expected a mask of values with is_causal, window or lengths_k, got CausalBias"):
        mk.attention(query, key, key, bias.causal_upper_left(5, 7), is_causal=True)

"""nn.MultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import itertools
import math

import pytest
import torch

from memkernels import nn

CONSTRUCTORS = [
    dict(),
    dict(bias=False),
    dict(add_bias_kv=True),
    dict(add_zero_attn=True),
    dict(add_bias_kv=True, add_zero_attn=True, kdim=5, vdim=6),
    dict(kdim=5),
    dict(vdim=6, bias=False),
]
TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-11), torch.float32: dict(rtol=1e-4, atol=1e-5)}


def twins(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 3, **kwargs, dtype=dtype)
    torch.manual_seed(0)
    ours = nn.MultiheadAttention(12, 3, **kwargs, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def assert_same(theirs, ours, inputs, dtype=torch.float64, float_masks=(), **kwargs):
    """Same output, weights and gradients to inputs, parameters and float masks."""
    results = []
    for module in (theirs, ours):
        leaves = [t.clone().requires_grad_() for t in inputs]
        own = {k: v.clone().requires_grad_() if k in float_masks else v for k, v in kwargs.items()}
        output, weights = module(*leaves, **own)
        torch.manual_seed(1)
        loss = (output * torch.randn(output.shape, dtype=dtype)).sum()
        if weights is not None:
            loss = loss + (weights * torch.randn(weights.shape, dtype=dtype)).sum()
        module.zero_grad()
        loss.backward()
        grads = [t.grad for t in (*leaves, *module.parameters(), *(own[k] for k in float_masks))]
        results.append([output, *([] if weights is None else [weights]), *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, **TOLERANCE[dtype])


def masks(batch, queries, keys, dtype):
    """No row is masked out entirely: torch gives NaN there."""
    torch.manual_seed(2)
    two, three = torch.rand(queries, keys) < 0.4, torch.rand(batch * 3, queries, keys) < 0.4
    padding = torch.rand(batch, keys) < 0.3
    two[:, 0] = three[:, :, 0] = padding[:, 0] = False
    return {
        "none": dict(),
        "2-D bool": dict(attn_mask=two),
        "3-D bool": dict(attn_mask=three),
        "2-D float": dict(attn_mask=torch.randn(queries, keys, dtype=dtype).masked_fill(two, -math.inf)),
        "3-D float": dict(attn_mask=torch.randn(batch * 3, queries, keys, dtype=dtype)),
        "padding": dict(key_padding_mask=padding),
        "float padding": dict(key_padding_mask=torch.randn(batch, keys, dtype=dtype)),
        "2-D bool and padding": dict(attn_mask=two, key_padding_mask=padding),
        "3-D float and padding": dict(
            attn_mask=torch.randn(batch * 3, queries, keys, dtype=dtype), key_padding_mask=torch.zeros_like(padding, dtype=dtype)
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kwargs", CONSTRUCTORS, ids=str)
def test_every_option(kwargs, batch_first, need_weights, dtype):
    theirs, ours = twins(dtype, batch_first=batch_first, **kwargs)
    torch.manual_seed(3)
    sizes = ((2, 4, 12), (2, 5, kwargs.get("kdim", 12)), (2, 5, kwargs.get("vdim", 12)))
    inputs = [torch.randn(s, dtype=dtype) for s in sizes]
    inputs = inputs if batch_first else [t.transpose(0, 1).contiguous() for t in inputs]
    for name, given in masks(2, 4, 5, dtype).items():
        floats = [k for k in given if "float" in name and not (given[k] == -math.inf).any() and need_weights]
        assert_same(theirs, ours, inputs, dtype, floats, need_weights=need_weights, **given)
    assert_same(theirs, ours, inputs, dtype, need_weights=need_weights, average_attn_weights=False)


@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched(need_weights):
    theirs, ours = twins()
    torch.manual_seed(3)
    inputs = [torch.randn(4, 12, dtype=torch.float64), *torch.randn(2, 5, 12, dtype=torch.float64)]
    for name, given in masks(1, 4, 5, torch.float64).items():
        own = {k: v[0] if k == "key_padding_mask" else v for k, v in given.items()}
        for average in (True, False):
            assert_same(theirs, ours, inputs, need_weights=need_weights, average_attn_weights=average, **own), name


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_and_causal(batch_first):
    theirs, ours = twins(batch_first=batch_first)
    x = torch.randn(6, 6, 12, dtype=torch.float64)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    padding = torch.zeros(6, 6, dtype=torch.bool)
    padding[:, 5] = True
    for need_weights, given in itertools.product((True, False), (dict(), dict(key_padding_mask=padding))):
        expected = theirs(x, x, x, attn_mask=causal, need_weights=need_weights, is_causal=True, **given)
        for mask in (causal, None):
            got = ours(x, x, x, attn_mask=mask, need_weights=need_weights, is_causal=True, **given)
            torch.testing.assert_close(got, expected)


def test_dropout_keeps_the_mean_and_eval_has_none():
    theirs, ours = twins(dropout=0.5)
    x = torch.randn(64, 8, 12, dtype=torch.float64)
    for need_weights in (True, False):
        mean = torch.stack([ours(x, x, x, need_weights=need_weights)[0] for _ in range(64)]).mean(0)
        expected = theirs.eval()(x, x, x)[0]
        assert (mean - expected).abs().mean() < 0.05 and not torch.equal(mean, expected)
    torch.testing.assert_close(ours.eval()(x, x, x, need_weights=False)[0], expected)


def test_a_query_without_keys_gets_the_output_bias():
    _, ours = twins()
    x = torch.randn(4, 2, 12, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[True] * 4, [False] * 4])
    for need_weights in (True, False):
        output, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        torch.testing.assert_close(output[:, 0], ours.out_proj.bias.expand(4, -1))
        assert weights is None or weights[0].eq(0).all()
        gradients = torch.autograd.grad(output.square().sum(), [x, *ours.parameters()])
        assert all(g.isfinite().all() for g in gradients)


def test_copies_functional_call_and_compile():
    _, ours = twins(torch.float32)
    x = torch.randn(4, 2, 12)
    expected = ours(x, x, x, need_weights=False)[0]
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert torch.equal(copy.deepcopy(ours)(x, x, x, need_weights=False)[0], expected)
    got = torch.func.functional_call(ours, {k: 0 * v for k, v in ours.named_parameters()}, (x, x, x))[0]
    assert got.eq(0).all()
    for need_weights in (True, False):
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, x, x, need_weights=need_weights), ours(x, x, x, need_weights=need_weights))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for need_weights in (True, False):
            torch.testing.assert_close(ours(x, x, x, need_weights=need_weights)[0].float(), expected, atol=0.03, rtol=0.03)
    assert torch.equal(ours(x, x, x[:], need_weights=False)[0], ours(x, x, x.clone(), need_weights=False)[0])


@pytest.mark.parametrize("training", [True, False])
def test_inside_torchs_transformer(training):
    theirs = torch.nn.TransformerEncoderLayer(12, 3, 16, dropout=0.0, batch_first=True).train(training)
    ours = copy.deepcopy(theirs)
    ours.self_attn = nn.MultiheadAttention(12, 3, batch_first=True)
    ours.load_state_dict(theirs.state_dict())
    ours.train(training)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(12, 5),
        lambda m: m(0, 5),
        lambda m: m(12, 3)(*[torch.randn(12)] * 3),
        lambda m: m(12, 3)(torch.randn(4, 12), torch.randn(4, 2, 12), torch.randn(4, 2, 12)),
        lambda m: m(12, 3)(torch.randn(4, 2, 12), torch.randn(4, 12), torch.randn(4, 12)),
        lambda m: m(12, 3)(*[torch.randn(4, 2, 12)] * 3, key_padding_mask=torch.zeros(4, dtype=torch.bool)),
        lambda m: m(12, 3)(*[torch.randn(4, 2, 12)] * 3, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool)),
        lambda m: m(12, 3)(*[torch.randn(4, 2, 12)] * 3, attn_mask=torch.zeros(4)),
        lambda m: m(12, 3)(*[torch.randn(4, 2, 12)] * 3, attn_mask=torch.zeros(4, 3)),
        lambda m: m(12, 3)(*[torch.randn(4, 2, 12)] * 3, attn_mask=torch.zeros(2, 4, 4)),
        lambda m: m(12, 3)(*[torch.randn(4, 12)] * 3, attn_mask=torch.zeros(2, 4, 4)),
        lambda m: m(12, 3)(*[torch.randn(4, 2, 12)] * 3, attn_mask=torch.zeros(4, 4, dtype=torch.int64)),
        lambda m: m(12, 3)(*[torch.randn(4, 2, 8)] * 3),
        lambda m: m(12, 3)(torch.randn(4, 2, 12), torch.randn(3, 2, 12), torch.randn(5, 2, 12)),
    ],
)
def test_errors_are_torchs(call):
    with pytest.raises((AssertionError, RuntimeError, ValueError)) as theirs:
        call(torch.nn.MultiheadAttention)
    with pytest.raises(type(theirs.value)):
        call(nn.MultiheadAttention)

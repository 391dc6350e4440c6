"""torch.nn's Transformer layers with nn.MultiheadAttention in place of their own: the same outputs and gradients."""

import copy
import io
import warnings

import pytest
import torch
from torch.nn import TransformerDecoder, TransformerDecoderLayer, TransformerEncoder, TransformerEncoderLayer

from memkernels import nn

HEADS = 2  # torch's fast path takes even numbers only
SIZES = dict(d_model=12, nhead=HEADS, dim_feedforward=16, dropout=0.0)
TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-11), torch.float32: dict(rtol=1e-4, atol=1e-5)}


def replaced(module):
    """A copy in which every torch.nn.MultiheadAttention is one of ours with the same parameters."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, theirs in list(parent.named_children()):
            if type(theirs) is torch.nn.MultiheadAttention:
                bias, weight = theirs.in_proj_bias is not None, theirs.in_proj_weight
                ours = nn.MultiheadAttention(
                    theirs.embed_dim, theirs.num_heads, theirs.dropout, bias, batch_first=theirs.batch_first, dtype=weight.dtype
                )
                ours.load_state_dict(theirs.state_dict())
                setattr(parent, name, ours.train(theirs.training))
    return module


def twins(make, training, dtype=torch.float64, **options):
    torch.manual_seed(0)
    theirs = make(dtype=dtype, **options)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.train(training)
    return theirs, replaced(theirs)


def encoder(layers=2, nested=False, **options):
    return TransformerEncoder(TransformerEncoderLayer(**{**SIZES, **options}), layers, enable_nested_tensor=nested)


def decoder(layers=2, **options):
    return TransformerDecoder(TransformerDecoderLayer(**{**SIZES, **options}), layers)


def layer(**options):
    return TransformerEncoderLayer(**{**SIZES, **options})


def decoder_layer(**options):
    return TransformerDecoderLayer(**{**SIZES, **options})


def assert_same(theirs, ours, inputs, visible=None, fast=True, **given):
    """Outputs (where `visible`), gradients to inputs and parameters; without grad mode, too, where eval takes torch's fast path."""
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        leaves = [t.clone().requires_grad_() for t in inputs]
        output = module(*leaves, **given)
        output = output if visible is None else output[visible]
        torch.manual_seed(1)
        (output * torch.randn_like(output)).sum().backward()
        with torch.no_grad():
            again = module(*inputs, **given) if fast else output.detach()
        again = again if visible is None or not fast else again[visible]
        results.append([output, again, *(t.grad for t in (*leaves, *module.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, **TOLERANCE[inputs[0].dtype])


def masks(steps, dtype):
    """Masks of an encoder: additive, boolean, of each head, the causal one with its flag, padding, both."""
    torch.manual_seed(2)
    causal = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    padding = torch.rand(2, steps) < 0.4
    random = torch.rand(2 * HEADS, steps, steps) < 0.4
    padding[:, 0] = random[..., 0] = False
    floats = torch.nn.Transformer.generate_square_subsequent_mask(steps, dtype=dtype)
    found = {
        "none": {},
        "causal": dict(src_mask=causal),
        "causal flag": dict(src_mask=floats, is_causal=True),
        "heads": dict(src_mask=random),
        "additive": dict(src_mask=torch.randn(steps, steps, dtype=dtype)),
        "padding": dict(src_key_padding_mask=padding),
        "additive padding": dict(src_key_padding_mask=torch.zeros(2, steps, dtype=dtype).masked_fill(padding, -torch.inf)),
        "causal and padding": dict(src_mask=causal, src_key_padding_mask=padding),
        "causal flag and padding": dict(src_mask=causal, src_key_padding_mask=padding, is_causal=True),
    }
    return found


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(nested|mismatched|enable_nested_tensor).*")
        yield


OPTIONS = [
    dict(batch_first=True),
    dict(batch_first=False, norm_first=True, activation="gelu"),
    dict(batch_first=True, norm_first=True, bias=False),
    dict(batch_first=True, activation=torch.nn.functional.silu),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}" for k in o))
def test_encoder_layer(options, training, dtype):
    theirs, ours = twins(layer, training, dtype, **options)
    assert type(ours.self_attn) is nn.MultiheadAttention
    x = torch.randn(2, 5, 12, dtype=dtype) if options["batch_first"] else torch.randn(5, 2, 12, dtype=dtype)
    for name, given in masks(5, dtype).items():
        assert_same(theirs, ours, [x], fast=training or name != "additive", **given)  # torch's fast path hides where a mask is not 0
    unbatched = torch.randn(5, 12, dtype=dtype)
    assert_same(theirs, ours, [unbatched])
    assert_same(theirs, ours, [unbatched], src_mask=masks(5, dtype)["causal"]["src_mask"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=["batch_first", "norm_first"])
def test_encoder(options, nested, training):
    theirs, ours = twins(encoder, training, nested=nested, **options)
    x = torch.randn(2, 5, 12, dtype=torch.float64) if options["batch_first"] else torch.randn(5, 2, 12, dtype=torch.float64)
    for name, given in masks(5, torch.float64).items():
        if name in ("none", "causal", "causal flag", "padding", "causal and padding"):
            given = {{"src_mask": "mask"}.get(k, k): v for k, v in given.items()}
            padding = given.get("src_key_padding_mask")
            visible = None if padding is None else ~(padding if options["batch_first"] else padding.T)
            assert_same(theirs, ours, [x], visible, **given)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [decoder_layer, decoder], ids=["layer", "stack"])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=["batch_first", "norm_first", "no_bias"])
def test_decoder(options, make, training):
    theirs, ours = twins(make, training, **options)
    shapes = ((2, 4, 12), (2, 7, 12))
    x, memory = (torch.randn(s, dtype=torch.float64) if options["batch_first"] else torch.randn(s[1], s[0], 12).double() for s in shapes)
    causal, padding = torch.ones(4, 4, dtype=torch.bool).triu(1), torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 3:] = True
    late = torch.zeros(2, 4, dtype=torch.bool)
    late[0, 3:] = True
    for given in (
        {},
        dict(tgt_mask=causal),
        dict(tgt_mask=causal, tgt_is_causal=True),
        dict(tgt_mask=causal, tgt_is_causal=True, tgt_key_padding_mask=late),
        dict(memory_key_padding_mask=padding),
        dict(memory_mask=torch.rand(4, 7) < 0.3, tgt_mask=causal, memory_key_padding_mask=padding & False),
    ):
        assert_same(theirs, ours, [x, memory], **given)


def test_transformer():
    theirs, ours = twins(
        lambda dtype: torch.nn.Transformer(12, HEADS, 1, 2, 16, dropout=0.0, batch_first=True, dtype=dtype), True, torch.float64
    )
    source, target = torch.randn(2, 6, 12, dtype=torch.float64), torch.randn(2, 4, 12, dtype=torch.float64)
    assert_same(theirs, ours, [source, target], tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64))


def test_the_fast_path_is_torchs():
    """Nested tensors, which only it takes; a hook on self_attn, which turns it off; and the switch."""
    theirs, ours = twins(layer, False, torch.float32, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, 12), torch.randn(5, 12)])
    x, calls = torch.randn(2, 5, 12), []
    with torch.no_grad():
        for a, b in zip(theirs(nested).unbind(), ours(nested).unbind(), strict=True):
            torch.testing.assert_close(b, a)
        expected = ours(x)
        handle = ours.self_attn.register_forward_hook(lambda *given: calls.append(given))
        torch.testing.assert_close(ours(x), expected, **TOLERANCE[torch.float32])
        assert len(calls) == 1
        handle.remove()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            torch.testing.assert_close(ours(x), expected, **TOLERANCE[torch.float32])
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours.train()(nested)


def test_gradients_of_each_sample_and_trace():
    _, ours = twins(layer, True, torch.float64, batch_first=True)
    x, parameters = torch.randn(3, 5, 12, dtype=torch.float64), dict(ours.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(ours, parameters, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        wanted = torch.autograd.grad(ours(sample[None]).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(found[name][i], gradient)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ours, (x,))
    torch.testing.assert_close(traced(x[:2]), ours(x[:2]))


def test_padded_sequences_stay_finite():
    """A sequence that is all padding: NaN in torch, outside of the fast path; here only its own outputs are without meaning, and finite."""
    _, ours = twins(encoder, True, torch.float32, batch_first=True)
    x = torch.randn(2, 5, 12, requires_grad=True)
    padding = torch.tensor([[True] * 5, [False] * 5])
    output = ours(x, src_key_padding_mask=padding)
    gradients = torch.autograd.grad(output.square().sum(), [x, *ours.parameters()])
    assert output.isfinite().all() and all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(output[1:], ours(x[1:]))


def test_dropout_trains_and_eval_has_none():
    theirs, ours = twins(encoder, True, torch.float32, batch_first=True, dropout=0.4)
    x = torch.randn(2, 5, 12)
    assert not torch.equal(ours(x), ours(x))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), **TOLERANCE[torch.float32])


def test_copies_states_and_half_precision():
    theirs, ours = twins(encoder, False, torch.float32, batch_first=True)
    x = torch.randn(2, 5, 12)
    expected = ours(x)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    stored = io.BytesIO()
    torch.save(ours, stored)
    stored.seek(0)
    for other in (copy.deepcopy(ours), torch.load(stored, weights_only=False)):
        assert type(other.layers[0].self_attn) is nn.MultiheadAttention
        assert torch.equal(other(x), expected)
    for training in (True, False):
        half = copy.deepcopy(ours).bfloat16().train(training)(x.bfloat16())
        torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(ours.train(training)(x).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_compile(training):
    _, ours = twins(layer, training, torch.float32, batch_first=True)
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 12)
    for name in ("causal flag", "padding"):
        given = masks(5, torch.float32)[name]
        with torch.set_grad_enabled(training):
            outputs = [module(x, **given) for module in (compiled, ours)]
        torch.testing.assert_close(*outputs)
        if training:
            for a, b in zip(*(torch.autograd.grad(output.square().sum(), list(ours.parameters())) for output in outputs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_export():
    _, ours = twins(layer, False, torch.float32, batch_first=True)
    x, causal = torch.randn(2, 5, 12), torch.ones(5, 5, dtype=torch.bool).triu(1)
    exported = torch.export.export(ours, (x,), dict(src_mask=causal, is_causal=True)).module()
    torch.testing.assert_close(exported(x, src_mask=causal, is_causal=True), ours(x, src_mask=causal, is_causal=True))
    exported = torch.export.export(ours.train(), (x,), dict(src_mask=causal)).module()
    gradients = [torch.autograd.grad(module(x, src_mask=causal).square().sum(), list(module.parameters())) for module in (exported, ours)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)

"""Softcap, sinks and lengths of attention beyond what the generated tests draw: large blocks, NaN past the end, threads, transforms."""

import pytest
import torch

import memkernels as mk
from memkernels.testing.compare import labels, using

BACKENDS = [name for name in labels() if name.startswith("cpp")]
NAMES = ("query", "key", "value", "sink", "attn_mask")


def drawn(batch=2, heads=4, shared=2, queries=150, keys=400, width=24, value_width=40, mask=None, lengths=(400, 170)):
    generator = torch.Generator().manual_seed(5)
    shapes = [(batch, heads, queries, width), (batch, shared, keys, width), (batch, shared, keys, value_width), (heads,)]
    tensors = [torch.randn(shape, generator=generator) for shape in (*shapes, *([mask] if mask else []))]
    return tensors, None if lengths is None else torch.tensor(lengths)


def gradients(backend, dtype, tensors, lengths, seed=0, **options):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    torch.manual_seed(seed)
    with using(backend):
        out, lse = mk.attention(**dict(zip(NAMES, leaves)), lengths_k=lengths, enable_gqa=True, return_lse=True, **options)
        dout, dlse = (torch.linspace(-1, 1, t.numel(), dtype=torch.float64).reshape(t.shape).to(t.dtype) for t in (out, lse))
        return out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))


ALL = (
    {"softcap": 3.0},
    {"softcap": 3.0, "is_causal": True, "causal": "bottom-right", "dropout_p": 0.2},
    {"window": (90, 30), "causal": "bottom-right", "scale": -0.3, "softcap": 2.0},
)


@pytest.mark.parametrize("options", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_options_together_are_those_of_the_reference(backend, dtype, options):
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 4e-2}[dtype]
    tensors, lengths = drawn()
    tensors = [t.to(dtype) for t in tensors]  # the same values for both
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = gradients("reference", wide, tensors, lengths, **options)
    for found, truth in zip(gradients(backend, dtype, tensors, lengths, **options), wanted):
        scale = float(truth.detach().nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(found.to(wide), truth, rtol=tolerance, atol=tolerance * max(scale, 0.1))


@pytest.mark.parametrize("shape", [(2, 4, 150, 400), (1, 4, 150, 400), (2, 1, 1, 400), (1, 1, 150, 1), (2, 4, 1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_mask_with_every_option(backend, shape):
    tensors, lengths = drawn(width=8, value_width=6, mask=shape)
    options = {"softcap": 2.0, "is_causal": True, "causal": "bottom-right"}
    found = gradients(backend, torch.float64, tensors, lengths, **options)
    for f, w in zip(found, gradients("reference", torch.float64, tensors, lengths, **options)):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [3, 20, 150])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_what_lies_past_the_end_changes_no_bit(backend, queries, dtype):
    tensors, lengths = drawn(queries=queries, lengths=(0, 170))
    for options in ({}, {"softcap": 3.0, "is_causal": True, "causal": "bottom-right"}):
        clean = gradients(backend, dtype, tensors, lengths, **options)
        for bad in (float("nan"), float("inf"), 1e30):
            poisoned = [t.clone() for t in tensors]
            for t in poisoned[1:3]:
                for b, length in enumerate(lengths):
                    t[b, :, length:] = bad
            found = gradients(backend, dtype, poisoned, lengths, **options)
            assert all(torch.equal(f, c) for f, c in zip(found, clean))
        assert not clean[3][1, :, 170:].any() and not clean[4][1, :, 170:].any()
        assert not clean[0][0].any() and torch.equal(clean[1][0, :, 0], tensors[3].to(dtype).to(clean[1].dtype))


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_lengths_are_shorter_keys(backend):
    tensors, lengths = drawn(lengths=(170, 170))
    for options in ({"is_causal": True, "causal": "bottom-right"}, {"window": (60, 3), "causal": "bottom-right"}, {"softcap": 2.0}):
        cut = [tensors[0], tensors[1][:, :, :170], tensors[2][:, :, :170], tensors[3]]
        found, wanted = (
            gradients(backend, torch.float64, tensors, lengths, **options),
            gradients(backend, torch.float64, cut, None, **options),
        )
        for f, w in zip(found, wanted):
            f = f[:, :, :170] if f.shape[2:3] == (400,) else f
            torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-11)


def test_a_sink_is_a_key_of_value_zero():
    """Written with a key more, whose score is the sink's by the mask."""
    (query, key, value, sink), _ = drawn(shared=4, queries=5, keys=7, lengths=None)
    mask = torch.zeros(2, 4, 5, 8)
    mask[..., 7] = sink[:, None]
    more = [torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *more, mask)
    torch.testing.assert_close(mk.attention(query, key, value, sink=sink), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_threads_or_other_entries(backend, dtype):
    before, runs = torch.get_num_threads(), []
    tensors, lengths = drawn(queries=300)
    options = {"softcap": 3.0, "is_causal": True, "causal": "bottom-right"}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            runs.append(gradients(backend, dtype, tensors, lengths, **options))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))
    with using(backend):
        alone = mk.attention(*(t[1:].to(dtype) for t in tensors[:3]), enable_gqa=True, sink=tensors[3], lengths_k=lengths[1:], **options)
    assert torch.equal(alone, runs[0][0][1:])


def test_transforms():
    (query, key, value, sink), lengths = drawn(shared=4, queries=6, keys=9, width=4, value_width=3, lengths=(9, 5))
    query, key, value, sink = (t.double() for t in (query, key, value, sink))

    def loss(query, key, value, sink, lengths):
        return mk.attention(query, key, value, sink=sink, lengths_k=lengths, softcap=2.0).square().sum()

    whole = torch.func.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, sink, lengths)
    rows = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2, 3)), in_dims=(0, 0, 0, None, 0))(
        *(t[:, None] for t in (query, key, value)), sink, lengths[:, None]
    )
    for w, r in zip(whole, rows):
        torch.testing.assert_close(r.sum(0) if w.dim() == 1 else r.squeeze(1), w)
    sinks = torch.stack([sink, sink + 1])
    each = torch.func.vmap(lambda s: mk.attention(query, key, value, sink=s))(sinks)
    torch.testing.assert_close(each[1], mk.attention(query, key, value, sink=sinks[1]))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value, sink, lengths), loss(query, key, value, sink, lengths))


def test_leading_dimensions():
    (query, key, value, sink), lengths = drawn(batch=6, shared=4, queries=5, keys=9, width=4, value_width=3, lengths=(9, 5, 0, 1, 2, 3))
    flat = mk.attention(query, key, value, lengths_k=lengths, sink=sink)
    folded = mk.attention(*(t.unflatten(0, (2, 3)) for t in (query, key, value)), lengths_k=lengths.view(2, 3), sink=sink)
    assert torch.equal(folded.flatten(0, 1), flat)
    assert torch.equal(mk.attention(query[1], key[1], value[1], lengths_k=lengths[1], sink=sink), flat[1])
    with pytest.raises(ValueError, match=r"attention: lengths_k: expected shape \(2, 3\).*got shape \(6,\)"):
        mk.attention(*(t.unflatten(0, (2, 3)) for t in (query, key, value)), lengths_k=lengths)


def test_a_length_out_of_range_is_refused():
    tensors, _ = drawn(keys=9)
    for bad in ((-1, 3), (3, 10)):
        with pytest.raises(ValueError, match=r"attention: lengths_k: expected values in 0..K=9"):
            mk.attention(*tensors[:3], enable_gqa=True, lengths_k=torch.tensor(bad))


@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"is_causal": True, "causal": "bottom-right"}, {"softcap": 2.0, "window": (1, 1)}])
@pytest.mark.parametrize("backend", ["cpp", "reference"] if BACKENDS else ["reference"])
def test_gradients_of_first_and_second_order(backend, options):
    sizes = dict(heads=2, shared=1, queries=3, keys=4, width=2, value_width=2, mask=(1, 2, 3, 4), lengths=(4, 2))
    tensors, lengths = drawn(**sizes)
    leaves = [t.double().requires_grad_() for t in tensors]

    def call(*leaves):
        return mk.attention(**dict(zip(NAMES, leaves)), lengths_k=lengths, enable_gqa=True, return_lse=True, **options)

    with using(backend):
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_of_one_number_gets_a_sum_without_rounding_errors_of_its_own(backend):
    generator = torch.Generator().manual_seed(0)
    query, (key, value) = torch.randn(1, 1, 50_000, 2, generator=generator), torch.randn(2, 1, 1, 3, 2, generator=generator)
    mask, dlse = torch.zeros(1, 1, requires_grad=True), torch.rand(1, 1, 50_000, generator=generator) + 1
    with using(backend):
        _, lse = mk.attention(query, key, value, mask, return_lse=True)
        (found,) = torch.autograd.grad(lse, mask, dlse)
    assert abs(found.item() - dlse.double().sum().item()) <= 2e-7 * dlse.sum().item()


def test_keys_and_values_of_different_heads_are_named():
    query, key, value = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 4, 9, 5)
    with pytest.raises(ValueError, match=r"attention: key: expected NHk=4 heads.*got shape \(2, 2, 9, 16\)"):
        mk.attention(query, key, value, enable_gqa=True)


def test_a_query_that_sees_nothing_has_a_log_sum_exp_without_tangent():
    query, (key, value) = torch.randn(1, 1, 2, 4), torch.randn(2, 1, 1, 3, 4)
    visible = torch.tensor([[False], [True]]).expand(2, 3)
    _, tangent = torch.func.jvp(lambda q: mk.attention(q, key, value, visible, return_lse=True)[1], (query,), (torch.ones_like(query),))
    assert tangent[0, 0, 0] == 0 and tangent.isfinite().all()

"""quantize_rows, and quantized_attention beyond what its spec generates: merging, agreement with attention, hostile inputs."""

import pytest
import torch

import memkernels as mk

F32 = torch.float32


def memory(*shape, dtype=F32, seed=0):
    """(key, value, key_scale, value_scale) and the floating rows that they stand for."""
    numbers = torch.Generator().manual_seed(seed)
    (key, key_scale), (value, value_scale) = (mk.quantize_rows(torch.randn(shape, generator=numbers, dtype=dtype)) for _ in range(2))
    return (key, value, key_scale, value_scale), (key * key_scale[..., None], value * value_scale[..., None])


@pytest.mark.parametrize("dtype", [torch.float64, F32, torch.bfloat16, torch.float16])
def test_rows_are_within_half_a_step(dtype):
    tensor = torch.randn(3, 5, 33).to(dtype)
    tensor[1, 2] = 0
    rows, scale = mk.quantize_rows(tensor)
    assert rows.dtype == torch.int8 and scale.dtype == (torch.float64 if dtype == torch.float64 else F32) and scale.shape == (3, 5)
    assert scale[1, 2] == 0 and rows.abs().amax() == 127 and not scale.requires_grad
    assert ((rows * scale[..., None] - tensor).abs() <= scale[..., None] * 0.5001).all()


def test_rows_at_the_ends_of_the_range():
    tensor = torch.tensor([[3.4e38, -3.4e38, 1.7e38], [1.4e-45, 0.0, -1.4e-45], [-5.0, 2.5, -0.0]])
    rows, scale = mk.quantize_rows(tensor)
    assert rows.tolist() == [[127, -127, 64], [127, 0, -127], [-127, 64, 0]]  # 63.5 goes to the even neighbour
    assert scale.isfinite().all()


def test_ties_go_to_even():
    assert mk.quantize_rows(torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5]))[0].tolist() == [127, 0, 2, 2, 0, -2]


@pytest.mark.parametrize("shape", [(0,), (4, 0), (0, 4), (2, 0, 3)])
def test_empty_rows(shape):
    rows, scale = mk.quantize_rows(torch.zeros(shape))
    assert rows.shape == shape and scale.shape == shape[:-1] and not scale.any()


def test_quantize_rows_refuses():
    with pytest.raises(TypeError, match=r"quantize_rows: tensor: expected .*float16, got int64"):
        mk.quantize_rows(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="quantize_rows: tensor: expected at least 1 dimension"):
        mk.quantize_rows(torch.tensor(1.0))
    with pytest.raises(TypeError, match="quantize_rows: tensor: expected a tensor, got list"):
        mk.quantize_rows([1.0])


def test_equals_attention_on_the_widened_rows():
    packed, (key, value) = memory(2, 2, 9000, 24)
    query = torch.randn(2, 6, 3, 24, requires_grad=True)
    out, lse = mk.quantized_attention(query, *packed, return_lse=True)
    wanted, wanted_lse = mk.attention(query, key, value, enable_gqa=True, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    torch.testing.assert_close((out, lse), (wanted, wanted_lse), rtol=1e-4, atol=1e-5)
    found, expected = (torch.autograd.grad(outputs, query, (dout, dlse)) for outputs in ((out, lse), (wanted, wanted_lse)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_merges_exactly_over_two_halves():
    packed, _ = memory(1, 2, 300, 16)
    query = torch.randn(1, 2, 4, 16)
    parts = [mk.quantized_attention(query, *(t[:, :, run] for t in packed), return_lse=True) for run in (slice(0, 130), slice(130, None))]
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), 0)[..., None]
    merged = (weights * torch.stack([out for out, _ in parts])).sum(0)
    torch.testing.assert_close(merged, mk.quantized_attention(query, *packed))


def test_only_the_query_has_a_gradient():
    packed, _ = memory(1, 1, 9, 4)
    query = torch.randn(1, 1, 2, 4, requires_grad=True)
    scales = [t.clone().requires_grad_() for t in packed[2:]]
    mk.quantized_attention(query, *packed[:2], *scales).sum().backward()
    assert query.grad is not None and all(t.grad is None for t in scales)


def test_no_key_gives_zeros_and_finite_gradients():
    packed, _ = memory(2, 1, 5, 4)
    query = torch.randn(2, 1, 2, 4, requires_grad=True)
    out, lse = mk.quantized_attention(query, *packed, lengths_k=torch.tensor([0, 5]), return_lse=True)
    (out.sum() + lse[1].sum()).backward()
    assert not out[0].any() and (lse[0] == -torch.inf).all() and not query.grad[0].any() and query.grad.isfinite().all()


def test_float16_scores_beyond_its_range():
    packed, _ = memory(1, 1, 70, 64)
    query = torch.full((1, 1, 2, 64), 6e4, dtype=torch.float16, requires_grad=True)
    out, lse = mk.quantized_attention(query, *packed, scale=1.0, return_lse=True)
    out.sum().backward()
    assert out.isfinite().all() and lse.max() > 65504 and query.grad.isfinite().all()


def test_groups_share_the_bits_of_single_heads():
    packed, _ = memory(1, 1, 4500, 20)
    query = torch.randn(1, 5, 3, 20)
    whole = mk.quantized_attention(query, *packed)
    for head in range(5):
        assert torch.equal(whole[:, head : head + 1], mk.quantized_attention(query[:, head : head + 1], *packed))


def test_scales_of_another_dtype_are_refused():
    packed, _ = memory(1, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"quantized_attention: key_scale: expected float32, got float64"):
        mk.quantized_attention(torch.randn(1, 1, 1, 4), *packed)
    with pytest.raises(TypeError, match=r"quantized_attention: key_scale: expected float64, got float32"):
        mk.quantized_attention(torch.randn(1, 1, 1, 4).double(), *packed[:2], *(t.float() for t in packed[2:]))
    with pytest.raises(ValueError, match="query: expected 4 dimensions"):
        mk.quantized_attention(torch.randn(1, 1, 4), *packed)


def test_compiles_and_maps():
    packed, _ = memory(3, 2, 40, 8)
    query = torch.randn(3, 2, 2, 8)

    def loss(query, *memory):
        return mk.quantized_attention(query, *memory, lengths_k=torch.full((query.shape[0],), 33)).square().sum()

    wanted = torch.func.grad(loss)(query, *packed)
    mapped = torch.vmap(torch.func.grad(lambda q, *m: loss(q[None], *(t[None] for t in m))))(query, *packed)
    compiled = torch.compile(lambda q: mk.quantized_attention(q, *packed, return_lse=True), fullgraph=True, backend="aot_eager")(query)
    torch.testing.assert_close(mapped, wanted)
    torch.testing.assert_close(compiled, mk.quantized_attention(query, *packed, return_lse=True))

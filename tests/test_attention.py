"""What the generated tests do not draw: dropout, poisoned keys and values, every mask shape, thread counts, few heads."""

import pytest
import torch

import memkernels as mk
from memkernels.testing.compare import labels, using

BACKENDS = [name for name in labels() if name.startswith("cpp")]


def gradients(backend, dtype, inputs, seed=0, **options):
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    torch.manual_seed(seed)
    with using(backend):
        out, lse = mk.attention(*leaves, return_lse=True, **options)
        dout, dlse = (torch.linspace(-1, 1, t.numel()).reshape(t.shape).to(t.dtype) for t in (out, lse))
        return out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))


def drawn(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_that_of_the_reference(backend, dropout, dtype):
    inputs = drawn((2, 3, 70, 9), (2, 3, 150, 9), (2, 3, 150, 5))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for found, wanted in zip(
        gradients(backend, dtype, inputs, dropout_p=dropout), gradients("reference", dtype, inputs, dropout_p=dropout)
    ):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_poisoned_key_reaches_only_who_sees_it(backend, bad, dtype):
    clean = drawn((1, 2, 300, 8), (1, 2, 300, 8), (1, 2, 300, 8))
    poisoned = [clean[0], clean[1].clone(), clean[2].clone()]
    poisoned[1][..., 200, :] = bad
    poisoned[2][..., 250, :] = bad
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(300, 300, dtype=torch.bool).tril()}):
        outs = []
        for inputs in (clean, poisoned):
            with using(backend):
                outs.append(mk.attention(*(t.to(dtype) for t in inputs), **options))
        torch.testing.assert_close(outs[1][..., :200, :], outs[0][..., :200, :], rtol=tolerance, atol=tolerance)
    for options in ({"is_causal": True}, {"attn_mask": torch.ones(200, 300, dtype=torch.bool).tril()}):
        good, found = ([*gradients(backend, dtype, [inputs[0][:, :, :200], *inputs[1:]], **options)] for inputs in (clean, poisoned))
        for f, g in zip(found, good):
            torch.testing.assert_close(f, g, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_poisoned_key_that_some_of_a_few_queries_see(backend, dtype):
    clean = drawn((1, 2, 40, 8), (1, 2, 300, 8), (1, 2, 300, 8))
    poisoned = [clean[0], clean[1].clone(), clean[2].clone()]
    poisoned[1][..., 281, :], poisoned[2][..., 280, :] = float("nan"), float("inf")
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    options = {"window": (None, 250)}  # query i sees the keys up to i + 250
    with using(backend):
        outs = [mk.attention(*(t.to(dtype) for t in inputs), **options) for inputs in (clean, poisoned)]
    torch.testing.assert_close(outs[1][..., :30, :], outs[0][..., :30, :], rtol=tolerance, atol=tolerance)
    assert outs[1][..., 31:, :].isnan().all()
    good, found = (gradients(backend, dtype, [inputs[0][:, :, :30], *inputs[1:]], **options) for inputs in (clean, poisoned))
    for f, g in zip(found, good):
        torch.testing.assert_close(f, g, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize(
    "shape", [(4, 2, 150, 170), (1, 2, 150, 170), (1, 1, 150, 170), (1, 2, 1, 170), (1, 2, 150, 1), (1, 1, 1, 1), (150, 170)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_a_mask_that_broadcasts(backend, shape):
    inputs = drawn((4, 2, 150, 6), (4, 2, 170, 6), (4, 2, 170, 6), shape)
    found = gradients(backend, torch.float64, inputs, is_causal=True)
    wanted = gradients("reference", torch.float64, inputs, is_causal=True)
    assert found[-1].shape == shape
    for f, w in zip(found, wanted):
        torch.testing.assert_close(f, w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_do_not_depend_on_threads(backend, dtype):
    before = torch.get_num_threads()
    for heads, queries, keys, options in ((1, 400, 500, {"is_causal": True}), (2, 3, 9000, {}), (3, 300, 300, {"window": (40, 7)})):
        inputs = drawn((2, heads, queries, 16), (2, heads, keys, 16), (2, heads, keys, 16), (1, heads, queries, keys))
        for given in (inputs[:3], inputs):
            runs = []
            try:
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    runs.append(gradients(backend, dtype, given, **options))
            finally:
                torch.set_num_threads(before)
            for run in runs[1:]:
                assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_a_mask_that_heads_share_has_one_gradient_on_any_threads(backend, groups, options):
    before, runs = torch.get_num_threads(), []
    inputs = drawn((2, 2, 90, 8), (2, 2 // groups, 1300, 8), (2, 2 // groups, 1300, 8), (1, 1, 90, 1300))  # three runs of keys
    try:
        for threads in (1, 2, 5):  # five threads: more than tasks
            torch.set_num_threads(threads)
            runs.append(gradients(backend, torch.float64, inputs, enable_gqa=groups > 1, **options))
    finally:
        torch.set_num_threads(before)
    wanted = gradients("reference", torch.float64, inputs, enable_gqa=groups > 1, **options)
    for first, second, third, w in zip(*runs, wanted):
        assert torch.equal(first, second) and torch.equal(first, third)
        torch.testing.assert_close(first, w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_mask_of_one_key_has_one_gradient_on_any_threads(backend):
    before, runs = torch.get_num_threads(), []
    inputs = drawn((1, 3, 70, 16), (1, 3, 1, 16), (1, 3, 1, 16), (1, 1, 70, 1))
    try:
        for threads in (1, 2):  # as many threads as tasks, and more
            torch.set_num_threads(threads)
            runs.append(gradients(backend, torch.float32, inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (1, 1, 5, 16), (1, 1, 1, 16), (5, 1)])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_shared_mask_of_no_rows_has_gradient_zero(backend, shape, dtype):
    for batch, heads in ((0, 1), (2, 0)):
        query, key, value = (torch.randn(batch, heads, rows, 8, dtype=dtype) for rows in (5, 16, 16))
        mask = torch.zeros(shape, dtype=dtype, requires_grad=True)
        with using(backend):
            mk.attention(query, key, value, mask).sum().backward()
        assert mask.grad.shape == shape and not mask.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_written_past_the_caches(backend, dtype):
    """8 MB and more of them."""
    inputs = drawn((1, 1, 3, 32), (1, 1, 66_001, 32), (1, 1, 66_001, 32))
    for found, wanted in zip(gradients(backend, dtype, inputs), gradients("reference", dtype, inputs)):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("queries, step", [(1, 1.9 / 128), (40, 1.9 / 256)])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_value_near_the_largest_number_where_scores_rise_slowly(backend, queries, step, dtype):
    """No weight is above 1 before it is divided by their sum: a finite result stays finite, whichever key has that value."""
    keys, large = 600, 0.9 * torch.finfo(dtype).max
    query, key = torch.zeros(1, 1, queries, 16, dtype=dtype), torch.zeros(1, 1, keys, 16, dtype=dtype)
    query[..., 0], key[..., 0] = 1, torch.arange(keys, dtype=dtype) * step
    weights = torch.softmax(key[0, 0, :, 0], 0)
    for place in range(0, keys, 29):
        value = torch.zeros(1, 1, keys, 16, dtype=dtype)
        value[:, :, place] = large
        index = torch.arange(300, keys).expand(1, 1, queries, 300)
        with using(backend):
            plain = mk.attention(query, key, value, scale=1.0)
            joined = mk.retrieval_attention(query, key[:, :, :300], value[:, :, :300], key, value, index, is_causal=False, scale=1.0)
        for found in (plain, joined):
            torch.testing.assert_close(found / large, weights[place].expand_as(found), rtol=1e-4, atol=0)

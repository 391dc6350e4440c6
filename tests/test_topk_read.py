"""topk_read beyond what the generated tests draw: shared memories, exact choices among many rows and ties, NaN, frozen memories."""

import pytest
import torch

import memkernels as mk
from memkernels.bench.memory import extra_bytes
from memkernels.testing.compare import labels, using

BACKENDS = [name for name in labels() if name.startswith("cpp")] or ["reference"]
SIMILARITIES = ("dot", "cosine", "l2")


def whole(*shape, seed=0, top=4):
    """Small whole numbers, of which every sum is exact."""
    return torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def ranked(score, k):
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :k]


@pytest.mark.parametrize("queries", [3, 12, 260])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_among_many_equal_scores(backend, queries):
    query, key = whole(1, queries, 6), whole(1, 2500, 6, seed=1)
    value, k = key[..., :3], 300
    best, nearest = ranked(query @ key.mT, k), ranked(-(query[:, :, None] - key[:, None]).square().sum(-1), k)
    with using(backend):
        assert torch.equal(mk.topk_read(query, key, value, k)[2], best)
        assert torch.equal(mk.topk_read(query, key, value, 40)[2], best[..., :40])
        assert torch.equal(mk.topk_read(query.bfloat16(), key.bfloat16(), value.bfloat16(), k)[2], best)
        assert torch.equal(mk.topk_read(query, key, value, k, similarity="l2")[2], nearest)


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_where_searches_of_other_rows_have_reached_the_same_score(backend, queries):
    query, key = whole(1, queries, 3, top=2), whole(1, 20000, 3, seed=1, top=2)
    query[:, 0] = 0  # all scores are 0
    query[:, 1] = torch.tensor([1e-20, 0.0, 0.0])  # below the normal range
    key[:, :, 0] = key[:, :, 0] * 1e-20
    with using(backend):
        for rows in (key, key.flip(1)):
            for k in (1, 7):
                assert torch.equal(mk.topk_read(query, rows, rows, k)[2], ranked(query @ rows.mT, k))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_exact_in_sorted_memories_of_most_slots(order):
    key = torch.arange(20000.0)[None, :, None]
    key = key if order == "rising" else key.flip(1)
    for queries in (1, 12):
        index = mk.topk_read(torch.ones(1, queries, 1), key, key, 4096)[2]
        best = torch.arange(4096)
        assert torch.equal(index, (19999 - best if order == "rising" else best).expand(1, queries, -1))


def both(shared_key, shared_value, similarity, dtype=torch.float64, masked=False):
    """Outputs and gradients of memories without a batch, and of the same ones expanded."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(shape, dtype=dtype) for shape in ((3, 4, 5), (3, 30, 5), (3, 30, 2)))
    key, value = (t[0] if shared else t for t, shared in ((key, shared_key), (value, shared_value)))
    mask = torch.rand(3, 30) < 0.6 if masked else None
    found = []
    for expanded in (False, True):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        given = [leaves[0], *(t.expand(3, -1, -1) if expanded else t for t in leaves[1:])]
        outputs = mk.topk_read(*given, 6, similarity=similarity, mask=mask)
        loss = outputs[0].sin().sum() + outputs[1].square().sum()
        found.append([*outputs, *torch.autograd.grad(loss, leaves)])
    return found


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True)])
def test_a_memory_without_a_batch_is_one_that_all_entries_read(shared, similarity):
    for a, b in zip(*both(*shared, similarity), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*both(*shared, similarity, masked=True), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [3, 12])
def test_a_shared_memory_gives_the_bits_of_one_entry(queries):
    torch.manual_seed(0)
    query, key, value = torch.randn(5, queries, 24), torch.randn(300, 24), torch.randn(300, 7)
    together = mk.topk_read(query, key, value, 9)
    for b in range(5):
        alone = mk.topk_read(query[b : b + 1], key, value, 9)
        assert all(torch.equal(x[b], y[0]) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("sizes", [(2, 3, 0), (0, 3, 4), (2, 0, 0)])
def test_a_shared_memory_may_be_empty_in_any_size(sizes):
    """Queries without elements too: all scores are 0, the first rows win."""
    query, value = torch.zeros(sizes, requires_grad=True), torch.randn(5, 2, requires_grad=True)
    read, weights, index = mk.topk_read(query, torch.zeros(5, sizes[2]), value, 2)
    assert read.shape == (*sizes[:2], 2) and (index == torch.arange(2)).all() and (weights == 0.5).all()
    assert torch.autograd.grad(read.sum(), query)[0].shape == sizes


@pytest.mark.parametrize("queries", [2, 20])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nan_comes_first_and_minus_infinity_never(backend, queries):
    query, key = torch.ones(1, queries, 2), torch.arange(12.0).view(1, 6, 2).clone()
    key[0, 2, 0], key[0, 5, 0] = torch.nan, -torch.inf
    with using(backend):
        _, weights, index = mk.topk_read(query, key, key, 6)
    assert index[0].tolist() == [[2, 4, 3, 1, 0, -1]] * queries and weights[0, :, :5].isnan().all() and (weights[0, :, 5] == 0).all()


@pytest.mark.skipif(mk.backends()["cpp"] is not None, reason="plain torch has the matrix of scores")
def test_no_matrix_of_scores_and_a_frozen_memory_costs_nothing():
    query, key, value = torch.randn(1, 64, 32).requires_grad_(), torch.randn(1, 1 << 16, 32), torch.randn(1, 1 << 16, 32)

    def run():
        outputs = mk.topk_read(query, key, value, 16)
        return [*outputs, *torch.autograd.grad(outputs[0].sum(), query)]

    run()
    found = [extra_bytes(run, [query, key, value]) for _ in range(3)]
    if None in found:
        pytest.skip("this system does not tell the peak of resident memory")
    assert min(found) < 2e6  # the scores alone would be 16 MB, a gradient of the memory 8

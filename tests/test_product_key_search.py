"""product_key_search beyond what the generated tests draw: against all S * S sums, ties, NaN, more pairs than a float counts."""

import pytest
import torch

import memkernels as mk
from memkernels.testing.compare import labels, using

BACKENDS = ["reference", *(name for name in labels() if name.startswith("cpp"))]


def by_all_sums(query, subkeys, k):
    halves = torch.einsum("bhpd,hpsd->bhps", query, subkeys)
    sums = (halves[:, :, 0, :, None] + halves[:, :, 1, None]).flatten(2)
    index = torch.sort(sums, dim=-1, descending=True, stable=True).indices[..., :k]
    return sums.gather(-1, index), index


@pytest.mark.parametrize("k", [1, 7, 33, 64, 65, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_best_of_all_sums(backend, k):
    generator = torch.Generator().manual_seed(k)
    for values in (1, 3, 1000):  # of which many sums, some, hardly any are equal; all are exact
        query = torch.randint(-2, 3, (30, 2, 2, 5), generator=generator).float()
        subkeys = torch.randint(-values, values + 1, (2, 2, 120, 5), generator=generator).float()
        with using(backend):
            scores, index = mk.product_key_search(query, subkeys, k)
        wanted = by_all_sums(query, subkeys, k)
        assert torch.equal(scores, wanted[0]) and torch.equal(index, wanted[1])


def rounding(dtype, generator):
    """A large score for some subkeys, and differences that the sum with it swallows."""
    size = 3 / torch.finfo(dtype).eps
    tiny = torch.randint(-3, 4, (2, 2, 70, 2), generator=generator).to(dtype)
    large = torch.randint(0, 2, (2, 2, 70), generator=generator).to(dtype) * size
    return torch.stack((large + 8 * (tiny[..., 0]), tiny[..., 1] / 4), -1)


@pytest.mark.parametrize("k", [1, 7, 32, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_lowest_of_unequal_sums_that_round_to_one_score(backend, dtype, k):
    generator = torch.Generator().manual_seed(k)
    subkeys = rounding(dtype, generator)
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype).expand(1, 2, 2, 2)  # the halves are exact
    query = torch.cat((query, query.flip(2), query[:, :, :1].expand_as(query)))
    with using(backend):
        scores, index = mk.product_key_search(query, subkeys, k)
    wanted = by_all_sums(query, subkeys, k)
    assert torch.equal(scores, wanted[0]) and torch.equal(index, wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_that_are_infinite(backend):
    subkeys = torch.tensor([[[1.0, 2.0, 1e38], [1.0, 3e38, 3.2e38]]])[..., None]
    with using(backend):
        scores, index = mk.product_key_search(torch.full((1, 1, 2, 1), 1.0), subkeys, 4)
    assert index[0, 0].tolist() == [7, 8, 2, 5] and scores[0, 0, :2].isposinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_comes_first_and_minus_infinity_never(backend):
    subkeys = torch.tensor([[[1.0, 2.0, torch.nan], [-torch.inf, 5.0, 3.0]]])[..., None]
    with using(backend):
        scores, index = mk.product_key_search(torch.ones(1, 1, 2, 1), subkeys, 9)
    assert index[0, 0].tolist() == [7, 8, 4, 1, 5, 2, -1, -1, -1]
    assert scores[0, 0, :2].isnan().all() and scores[0, 0, 2:].tolist() == [7, 6, 5, 4] + 3 * [-torch.inf]


def test_more_pairs_than_a_float_counts():
    torch.manual_seed(0)
    query, subkeys = torch.randn(3, 1, 2, 4), torch.randn(1, 2, 6000, 4)
    scores, index = mk.product_key_search(query, subkeys, 20)
    with using("reference"):
        wanted = mk.product_key_search(query, subkeys, 20)
    assert torch.equal(index, wanted[1])
    torch.testing.assert_close(scores, wanted[0])

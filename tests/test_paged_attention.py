"""paged_attention beyond its spec: several runs of keys, pages shared by many rows, what the kernel checks itself."""

import checks
import pytest
import torch

import memkernels as mk

pytestmark = pytest.mark.skipif(mk.backends()["cpp"] is not None, reason="checks C++ kernels")


def pool(rows=4, pages=200, slots=16, width=33, value_width=17, dtype=torch.float32):
    torch.manual_seed(0)
    query, key = torch.randn(rows, 4, 2, width), torch.randn(pages, slots, 2, width)
    value, table = torch.randn(pages, slots, 2, value_width), torch.randint(0, pages, (rows, 200))
    return [query.to(dtype), key.to(dtype), value.to(dtype)], table, torch.tensor([3200, 1025, 1024, 17])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_many_runs_has_the_bits_it_has_alone(dtype):
    tensors, table, lengths = pool(dtype=dtype)
    query, *pages = tensors
    together = mk.paged_attention(query, *pages, table, lengths, is_causal=True)
    with checks.threads(1):
        assert torch.equal(mk.paged_attention(query, *pages, table, lengths, is_causal=True), together)
    for b in range(len(lengths)):
        row = slice(b, b + 1)
        assert torch.equal(mk.paged_attention(query[row], *pages, table[row], lengths[row], is_causal=True), together[row])
    with mk.backend("reference"):
        wanted = mk.paged_attention(*(t.double() for t in tensors), table, lengths, is_causal=True)
    torch.testing.assert_close(together.double(), wanted, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-3)


def test_gradients_of_a_page_that_all_rows_share():
    """Summed in float32 and rounded once, however many rows there are."""
    tensors, _, _ = pool(rows=50, pages=3, slots=4, width=8, value_width=8, dtype=torch.bfloat16)
    table, lengths = torch.ones(50, 3, dtype=torch.int64), torch.full((50,), 12)
    found = []
    for backend, dtype in (("cpp", torch.bfloat16), ("reference", torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with mk.backend(backend):
            found.append(torch.autograd.grad(mk.paged_attention(*leaves, table, lengths).sum(), leaves[1:]))
    for a, b in zip(*found):
        scale = float(b.abs().max())
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=2**-9 * scale)
        assert (a[[0, 2]] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_poisoned_row_reaches_no_page_behind_its_end(backend):
    """Its table names the other row's page there."""
    query, pages = torch.randn(2, 1, 2, 4), [torch.randn(2, 3, 1, 4).requires_grad_() for _ in range(2)]
    query[0] = torch.nan
    with mk.backend(backend):
        out = mk.paged_attention(query, *pages, torch.tensor([[0, 1], [1, 1]]), torch.tensor([3, 2]))
        gradients = torch.autograd.grad(out.sum(), pages)
    assert out[1].isfinite().all() and all(g[1].isfinite().all() and g[0].isnan().any() for g in gradients)


@pytest.mark.parametrize(
    ("page", "length", "error"), [(6, 1, IndexError), (-1, 1, IndexError), (2**62, 1, IndexError), (0, 13, ValueError), (0, -1, ValueError)]
)
def test_the_kernel_checks_values_that_python_may_not_look_at(page, length, error):
    query, pages = torch.randn(2, 1, 1, 4), torch.randn(6, 4, 1, 4)
    table, lengths = torch.full((2, 3), page), torch.tensor([0, length])
    with pytest.raises(error, match=r"paged_attention: (page_table: expected pages in 0\.\.5|lengths: expected values in 0\.\.12)"):
        torch.ops.memkernels.paged_attention(query, pages, pages, table, lengths, 1.0, False)


def test_a_pool_beyond_two_to_the_31_elements():
    pages = torch.arange(64.0).expand(2**20, 64, 1, 64)
    table, lengths = torch.tensor([[2**20 - 1]], dtype=torch.int32), torch.tensor([64])
    out = mk.paged_attention(torch.ones(1, 1, 1, 64), pages, pages, table, lengths)
    torch.testing.assert_close(out.flatten(), torch.arange(64.0))

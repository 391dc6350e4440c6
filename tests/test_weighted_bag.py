"""weighted_bag beyond what the generated tests draw: rows that very many places name, long bags, large gradients, sparse gradients."""

import checks
import pytest
import torch
from cases import INTERPRETED, places

import memkernels as mk
from memkernels.testing import compare

pytestmark = pytest.mark.timeout(300)
BACKENDS = sorted({label for label, device in places("all") if device == "cpu"})


def drawn(k, b, j, d, hub=0.0):
    torch.manual_seed(0)
    index = torch.randint(-1, k, (b, j))
    index[torch.rand(b, j) < hub] = k // 2
    return torch.randn(k, d), index, torch.randn(b, j), torch.randn(b, d)


def gradients(backend, table, index, weight, upstream, **options):
    table, weight = table.detach().requires_grad_(), weight.detach().requires_grad_()
    with compare.using(backend):
        out = mk.weighted_bag(table, index, weight, **options)
        return dict(zip(("out", "table", "weight"), (out, *torch.autograd.grad(out, (table, weight), upstream))))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("sizes", [(7, 3, 40, 5), (3, 2, 30, 9)] if INTERPRETED else [(50, 2, 2500, 20), (5, 600, 9, 33)])
def test_hubs_and_long_bags(backend, sizes):
    """Bags longer than a chunk, a row with thousands of places: right, and the same with any number of threads."""
    given = drawn(*sizes, hub=0.5)
    exact = gradients("reference", *(t.double() if t.is_floating_point() else t for t in given))
    found = gradients(backend, *given)
    for name, want in exact.items():
        torch.testing.assert_close(found[name].double(), want, rtol=1e-4, atol=1e-4)
    for n in (1, 3):
        with checks.threads(n):
            checks.assert_same(gradients(backend, *given), found, f"{n} threads")


@pytest.mark.skipif("cpp" not in BACKENDS, reason="about pages that C++ leaves unwritten")
def test_large_dense_gradient():
    """34 MB: rows that nobody names are pages that nobody wrote, and read as 0, whatever was there before."""
    given = drawn(66_000, 3, 50, 128)
    sparse = gradients("cpp", *given, sparse=True)["table"]
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        dense = gradients("cpp", *given)["table"]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(dense[sparse.indices()[0]], sparse.values())
    named = torch.zeros(66_000, dtype=torch.bool)
    named[sparse.indices()[0]] = True
    assert int(dense.count_nonzero(1).count_nonzero()) == int(named.sum()) and (dense[~named] == 0).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if ":" not in b])
def test_sparse_gradient(backend):
    given = drawn(30, 4, 6, 5)
    dense, found = gradients(backend, *given), gradients(backend, *given, sparse=True)
    sparse = found["table"]
    assert sparse.is_sparse and sparse.is_coalesced()
    named = given[1].unique()
    assert torch.equal(sparse.indices()[0], named[named >= 0])
    checks.assert_same({**found, "table": sparse.to_dense()}, dense, "sparse")
    table, index, weight, _ = given
    only = mk.weighted_bag(table.requires_grad_(), index, weight, sparse=True)
    only.sum().backward()
    assert table.grad.is_sparse
    torch.optim.SparseAdam([table], lr=0.1).step()
    nothing = gradients(backend, table[:0], index.fill_(-1), weight, given[3], sparse=True)
    assert nothing["table"].shape == (0, 5) and nothing["table"].values().shape == (0, 5)


def test_sparse_second_order():
    """What the sparse gradient gives on to dout, table and weight is what the dense one gives."""
    table, index, weight, upstream = (t.double() if t.is_floating_point() else t for t in drawn(9, 3, 4, 5))
    found = []
    for sparse in (False, True):
        leaves = [t.detach().requires_grad_() for t in (table, weight, upstream)]
        out = mk.weighted_bag(leaves[0], index, leaves[1], sparse=sparse)
        dtable, dweight = torch.autograd.grad(out, leaves[:2], leaves[2], create_graph=True)
        loss = (dtable.to_dense() ** 3).sum() + (dweight**3).sum()
        found.append(torch.autograd.grad(loss, leaves[1:] + leaves[:1], materialize_grads=True))
    for dense, sparse in zip(*found):
        torch.testing.assert_close(sparse.to_dense(), dense)

"""retrieval_attention beyond what the generated tests draw: a memory row that very many queries retrieve, and many rows."""

import pytest
import torch

import memkernels as mk
from memkernels.testing.compare import labels, using

BACKENDS = [name for name in labels() if name.startswith("cpp")]


def gradients(backend, dtype, queries, rows, slots):
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 8, queries, 16), (1, 2, queries, 16), (1, 2, queries, 16), (1, 2, rows, 16), (1, 2, rows, 16)]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    index = torch.randint(-1, rows, (1, 8, queries, slots), generator=generator)
    with using(backend):
        out = mk.retrieval_attention(*leaves, index, scale=0.7)
        upstream = torch.randn(out.shape, generator=generator).to(dtype)
        return torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize(("queries", "rows", "slots"), [(256, 1, 32), (130, 3, 32), (70, 5000, 9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_many_retrieve_are_summed_well(backend, queries, rows, slots):
    wanted = gradients("reference", torch.float64, queries, rows, slots)
    found = gradients(backend, torch.float32, queries, rows, slots)
    for name, a, right in zip(("memory_key", "memory_value"), found[3:], wanted[3:], strict=True):
        error = (a - right).abs().max().item() / right.abs().max().item()
        assert error <= 3e-6, (name, error)

"""Bits on 1, 2, 3 and 7 threads, at sizes that the C++ kernels split: the suite has one thread, and samples of specs are one task."""

from __future__ import annotations

import checks
import pytest
import torch

import memkernels as mk
from memkernels.testing.compare import using

pytest.importorskip("memkernels._C")
INDEX = torch.Generator().manual_seed(5)


def named(high, *shape):
    """Rows of a table, -1 among them."""
    return torch.randint(-1, high, shape, generator=INDEX)


def ragged(steps, batch):
    return torch.randint(0, steps + 1, (batch,), generator=INDEX)


def recurrent(op, gates, **options):
    """Layers of 130 units over 24 steps of 33 ragged rows."""

    def call(x, *weights):
        return op(x, None, *weights, **options)

    return call, [(24, 33, 40), (gates * 130, 40), (gates * 130, 130)]


def edges(nodes=600, count=70_000):
    """Node 0 has half of all edges."""
    rest = torch.randint(0, nodes, (count // 2,), generator=INDEX).sort().values
    owner = torch.cat([torch.zeros(count - len(rest), dtype=torch.int64), rest])
    return torch.searchsorted(owner, torch.arange(nodes + 1)), torch.randint(0, nodes, (count,), generator=INDEX)


PTR, SOURCES = edges()
PAGES, RETRIEVED, BAG = torch.randint(0, 90, (3, 45), generator=INDEX), named(9000, 2, 2, 130, 33), named(5000, 600, 65)
LENGTHS, STARTS = torch.tensor([4321, 0, 700]), torch.tensor([0, 7, 7, 200])
NORM = dict(layer_norm=(torch.ones(9 * 130), torch.zeros(9 * 130)), lengths=ragged(24, 33))

CALLS = {
    "lstm": recurrent(mk.lstm, 4, lengths=ragged(24, 33), return_cells=True),
    "lstm recompute": recurrent(mk.lstm, 4, recompute=True, reverse=True),
    "lstm layer norm": recurrent(lambda x, h, *w, **o: mk.lstm(x, h, *w, **{k: _like(x, v) for k, v in o.items()}), 4, **NORM),
    "gru": recurrent(mk.gru, 3, lengths=ragged(24, 33), reverse=True),
    "rnn": recurrent(mk.rnn, 1, lengths=ragged(24, 33)),
    "attention few": (lambda *a: mk.attention(*a, enable_gqa=True), [(1, 4, 5, 33), (1, 2, 12_300, 33), (1, 2, 12_300, 20)]),
    "attention causal": (lambda *a: mk.attention(*a, is_causal=True, return_lse=True), [(1, 3, 530, 33)] * 3),
    "attention mask": (mk.attention, [(2, 4, 90, 16), (2, 4, 1300, 16), (2, 4, 1300, 16), (1, 1, 90, 1300)]),
    "varlen": (lambda *a: mk.attention_varlen(*a, STARTS, STARTS * 9, is_causal=True), [(200, 2, 24), (1800, 2, 24), (1800, 2, 24)]),
    "paged": (lambda *a: mk.paged_attention(*a, PAGES, LENGTHS), [(3, 4, 3, 24), (90, 100, 2, 24), (90, 100, 2, 24)]),
    "retrieval": (
        lambda *a: mk.retrieval_attention(*a, RETRIEVED),
        [(2, 2, 130, 24), (2, 2, 130, 24), (2, 2, 130, 24), (2, 2, 9000, 24), (2, 2, 9000, 24)],
    ),
    "segment": (lambda *a: mk.segment_attention(*a[:3], PTR, SOURCES, edge_bias=a[3]), [(600, 2, 16)] * 3 + [(70_000, 2)]),
    "hopfield": (lambda *a: mk.hopfield_retrieve(*a, beta=0.2, steps=2), [(1, 33, 24), (1, 9000, 24)]),
    "content": (mk.content_read, [(2, 9000, 33), (2, 5, 33), (2, 5)]),
    "read": (lambda m, w: mk.memory_read(m, w), [(2, 20_000, 33), (2, 4, 20_000)]),
    "write": (mk.memory_write, [(2, 20_000, 33), (2, 2, 20_000), (2, 2, 33), (2, 2, 33)]),
    "link": (mk.link_step, [(2, 1, 300, 300), (2, 1, 300), (2, 1, 300), (2, 4, 300)]),
    "topk": (lambda *a: mk.topk_read(*a, 33)[:2], [(1, 40, 24), (1, 20_000, 24), (1, 20_000, 24)]),
    "product": (lambda *a: mk.product_key_search(*a, 40)[0], [(300, 2, 2, 24), (2, 2, 100, 24)]),
    "bag": (lambda *a: mk.weighted_bag(a[0], BAG, a[1]), [(5000, 100), (600, 65)]),
    "allocation": (mk.allocation, [(7, 4100)]),
}


def _like(x, option):
    return tuple(t.to(x.dtype) for t in option) if isinstance(option, tuple) else option


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in tensors(part)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_bits_are_those_of_one_thread(name, dtype):
    call, shapes = CALLS[name]
    generator = torch.Generator().manual_seed(3)
    leaves = [(0.2 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]
    wanted = None
    for threads in (1, 2, 3, 7):
        with checks.threads(threads), using("cpp"):
            given = [t.clone().requires_grad_() for t in leaves]
            outputs = tensors(call(*given))
            upstream = [torch.linspace(-1, 1, t.numel()).reshape(t.shape).to(t.dtype) for t in outputs]
            found = [*outputs, *torch.autograd.grad(outputs, given, upstream)]
        wanted = found if wanted is None else wanted
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert checks.same_bits(a.detach(), b.detach()), f"{threads} threads: tensor {i} differs"

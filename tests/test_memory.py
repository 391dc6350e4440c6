"""Peak memory: content_read never holds a second copy of the memory, attention needs O(Q), lstm saves no more than torch.nn.LSTM,
sequences over a memory keep about sqrt(T) copies of it, a retrieval from a frozen memory has no gradient of its size."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from child import run_python

import memkernels as mk
from memkernels.bench.memory import extra_bytes, saved_bytes
from memkernels.bench.peers import invoke
from memkernels.bench.runner import Call, once
from memkernels.testing.inputs import draw
from memkernels.testing.spec import Sample, specs

MB = 1e6
MEASURE = """
import json
import torch
from memkernels.bench.memory import extra_bytes

given = torch.ones(4 << 20)

def run(size):
    wide = torch.ones(size << 18)
    return [given[1:], wide.add_(1).sum(), torch.ones(1 << 20)]

run(8)  # its code is in memory now
print(json.dumps([[extra_bytes(lambda: run(size), [given]) for _ in range(7)] for size in (8, 16, 24)]))
"""
MODES = ("forward", "training forward", "fwd+bwd")
needs_extension = pytest.mark.skipif(mk.backends()["cpp"] is not None, reason="plain torch holds what it holds: no C++ extension")


def extra(op: str, dtype: torch.dtype, mode: str, dims: dict[str, int], present: tuple[str, ...] = (), **options) -> float:
    spec, sample = specs()[op], Sample("memory", dims, options, present)
    call = Call(spec, invoke(spec), sample, draw(spec, sample, dtype))
    once(call, mode, "cpu", 1)
    found = [call.extra_mb(mode, "cpu") for _ in range(3)]
    if None in found:
        pytest.skip("this system does not tell the peak of resident memory")
    return min(found) * MB  # whatever else the process does in the meantime only adds


def test_the_measure_sees_what_a_call_needs():
    """Temporaries count, in a call of any size and also after the first time; what was given and what is returned do not.

    In a process of its own: threads of other tests, libraries they loaded and their garbage go and come during a measurement.
    """
    found = json.loads(run_python(MEASURE))
    if None in found[0]:
        pytest.skip("this system does not tell the peak of resident memory")
    for size, measured in zip((8, 16, 24), found, strict=True):
        assert abs(statistics.median(measured) - (size << 20)) < 1.5 * MB, found


@needs_extension
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_content_read_holds_no_second_memory(similarity, dtype, mode):
    dims = dict(B=4, N=16384, W=64, R=4, V=64)
    memory = dims["B"] * dims["N"] * dims["W"] * dtype.itemsize
    assert extra("content_read", dtype, mode, dims, similarity=similarity) < memory / 4


@needs_extension
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_queries", "n_keys", "causal"), [(4096, 4096, False), (4096, 4096, True), (4, 32768, False)])
def test_attention_needs_memory_for_its_queries_only(n_queries, n_keys, causal, dtype, mode):
    """A few tiles, and a few times the queries in float32; a score matrix would be 67 and 134 MB here, a copy of the long keys 17 MB."""
    dims = dict(B=1, NH=2, NHk=2, Q=n_queries, K=n_keys, D=64, V=64)
    queries = dims["NH"] * n_queries * dims["D"] * 4
    assert extra("attention", dtype, mode, dims, is_causal=causal) < 2 * MB + 5 * queries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_lstm_saves_no_more_than_torch(bidirectional, layers, dtype):
    torch.manual_seed(0)
    options = dict(num_layers=layers, bidirectional=bidirectional, dtype=dtype)
    theirs, ours = torch.nn.LSTM(48, 64, **options), mk.nn.LSTM(48, 64, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(32, 8, 48, dtype=dtype, requires_grad=True)
    mine, needed = (saved_bytes(lambda m=m: m(x), [x, *m.parameters()]) for m in (ours, theirs))
    assert 0 < mine <= needed


@needs_extension
def test_lstm_peak_is_at_most_torchs():
    """The whole of forward and backward, where hooks see nothing: oneDNN's workspace, our packed weights."""
    dims = dict(T=128, B=16, I=256, H=256)
    mine = extra("lstm", torch.float32, "fwd+bwd", dims, ("bias_ih", "bias_hh"))
    spec, sample = specs()["lstm"], Sample("memory", dims, {}, ("bias_ih", "bias_hh"))
    call = Call(spec, lambda inputs, options: spec.call(spec.peers["torch"], inputs, options), sample, draw(spec, sample, torch.float32))
    once(call, "fwd+bwd", "cpu", 1)
    assert mine <= call.extra_mb("fwd+bwd", "cpu") * MB


@needs_extension
@pytest.mark.parametrize("op", ["ntm_sequence", "dnc_sequence"])
def test_sequences_keep_few_copies_of_the_memory(op):
    """Forward and backward over 256 steps: far less than the 256 memories that each step leaves, about 2 sqrt(256) of them."""
    dims = dict(T=256, B=1, I=4, H=4, N=512, W=128, R=1, U=1, S=1)
    one = 4 * dims["N"] * dims["W"]
    if op == "dnc_sequence":  # its links are N x N
        dims |= dict(N=160, W=48, P=200, I=200)
        one = 4 * dims["N"] * (dims["W"] + dims["N"])
    assert extra(op, torch.float32, "fwd+bwd", dims) < 80 * one


@needs_extension
def test_a_frozen_memory_of_retrieval_costs_nothing():
    """Without a gradient of the memory nothing of its size is made, backward included; with one, both are."""
    sizes = dict(B=1, NH=2, NHk=2, Q=8, K=8, D=32, V=32, N=1 << 16)
    given = [torch.randn(1, 2, n, 32) for n in (8, 8, 8, sizes["N"], sizes["N"])]
    index = torch.randint(sizes["N"], (1, 2, 8, 4))

    def peak(number):
        leaves = [t.detach().requires_grad_(i < number) for i, t in enumerate(given)]

        def run():
            out = mk.retrieval_attention(*leaves, index)
            gradients = torch.autograd.grad(out.sum(), leaves[:number])
            return [out, *gradients[:3]]  # what a memory's gradients need counts

        run()
        return [extra_bytes(run, [*leaves, index]) for _ in range(3)]

    frozen, trained = peak(3), peak(5)
    if None in frozen:
        pytest.skip("this system does not tell the peak of resident memory")
    both = 2 * given[3].numel() * 4
    assert min(frozen) < both / 16 and max(trained) > both / 2

"""On a GPU: every op and backend against float64, determinism, streams, graphs, memory that no kernel may touch."""

from __future__ import annotations

import pytest
import torch

import memkernels
from memkernels.testing import compare
from memkernels.testing import inputs as make
from memkernels.testing.spec import specs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cuda", "triton")


def case(name, dtype, backend):
    """The op's first sample on the device; skips with the backend's own reason."""
    spec = specs()[name]
    sample = spec.samples[0]
    inputs = make.draw(spec, sample, dtype, device="cuda")
    reason = compare.why_not(spec, inputs, dict(sample.options), backend)
    if reason is not None:
        pytest.skip(reason)
    return spec, sample, inputs


def evaluate(spec, sample, inputs, backend):
    with compare.using(backend):
        upstream = lambda outputs: make.upstream(outputs, torch.float32)  # noqa: E731
        return compare.evaluate(spec, inputs, dict(sample.options), upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(specs()))
def test_against_float64(name, dtype, backend):
    case(name, dtype, backend)
    rows = list(compare.verify([name], [backend], [dtype], device="cuda"))
    assert any(row.status == "ok" for row in rows)
    assert not [row for row in rows if row.status in ("fail", "error")], compare.report(rows)


@pytest.mark.parametrize("layout", sorted(make.LAYOUTS))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(specs()))
def test_layouts(name, backend, layout):
    spec, sample, _ = case(name, torch.float32, backend)
    for gradient in make.GRADIENT_LAYOUTS:
        rows = compare.measure(spec, sample, torch.float32, backend, layout=layout, gradient=gradient, device="cuda")
        assert all(row.status == "ok" for row in rows), compare.report(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(specs()))
def test_deterministic(name, backend):
    spec, sample, inputs = case(name, torch.float32, backend)
    first = evaluate(spec, sample, inputs, backend)
    for _ in range(200):
        again = evaluate(spec, sample, inputs, backend)
        assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(specs()))
def test_side_stream(name, backend):
    """On another stream, with the default stream busy: the same bits."""
    spec, sample, inputs = case(name, torch.float32, backend)
    first = evaluate(spec, sample, inputs, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda._sleep(20_000_000)
    with torch.cuda.stream(side):
        again = evaluate(spec, sample, inputs, backend)
    side.synchronize()
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(specs()))
def test_cuda_graph(name, backend):
    """Forward is captured and replayed on changed inputs."""
    spec, sample, inputs = case(name, torch.float32, backend)
    run = lambda: spec.call(spec.function, dict(inputs), dict(sample.options))  # noqa: E731
    with compare.using(backend), torch.inference_mode():
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = make.tensors_of(run())
        fresh = make.draw(spec, sample, torch.float32, seed=1, device="cuda")
        for key, value in inputs.items():
            if value is not None:
                value.copy_(fresh[key])
        graph.replay()
        got = [t.clone() for t in captured]
        wanted = make.tensors_of(run())
    assert all(torch.equal(g, w) for g, w in zip(got, wanted))


def recurrent(name, hidden):
    """(a call of forward and backward, the tensors it reads) of a recurrent op with lengths and resets."""
    gates = {"lstm": 4, "gru": 3, "rnn": 1}[name]
    shapes = ((9, 5, 24), (5, hidden), (gates * hidden, 24), (gates * hidden, hidden), (gates * hidden,), (gates * hidden,))
    leaves = [(0.2 * torch.randn(shape, device="cuda")).requires_grad_() for shape in shapes]
    reset, lengths = torch.rand(9, 5, device="cuda") < 0.2, torch.tensor([9, 1, 0, 7, 4], device="cuda")

    def call():
        x, h0, *weights = leaves
        state = (h0, h0) if name == "lstm" else h0
        output = getattr(memkernels, name)(x, state, *weights, reset=reset, lengths=lengths)[0]
        return [output, *torch.autograd.grad(output.square().sum(), leaves)]

    return call, [*leaves, reset, lengths]


def replay_equals_call(call, change=lambda: None):
    """All launches of a call captured once; after `change` a replay gives what the call itself gives then."""
    with memkernels.backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        change()
        graph.replay()
        got = [t.clone() for t in captured]
        expected = call()
    assert all(torch.equal(g, w) for g, w in zip(got, expected, strict=True))


@pytest.mark.parametrize("hidden", (32, 256))
@pytest.mark.parametrize("name", ("lstm", "gru", "rnn"))
def test_recurrent_training_in_a_cuda_graph(name, hidden):
    """All launches of forward and backward captured once; a replay sees new values, lengths and resets."""
    call, tensors = recurrent(name, hidden)

    def change():
        with torch.no_grad():
            for t in tensors:
                t.copy_(t.flip(0))

    replay_equals_call(call, change)


@pytest.mark.parametrize("name", ("attention", "attention_varlen", "paged_attention", "retrieval_attention", "hopfield_retrieve"))
def test_attention_training_in_a_cuda_graph(name):
    """Forward and backward hold no copy from the host, which a capture refuses and every other call would wait for."""
    spec, _, inputs = case(name, torch.float32, "triton")
    leaves = {key: t.requires_grad_() if key in make.differentiable(spec, inputs) else t for key, t in inputs.items()}
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]

    def call():
        outputs = make.tensors_of(spec.call(spec.function, dict(leaves), dict(spec.samples[0].options)))
        return [*outputs, *torch.autograd.grad(sum(t.float().sum() for t in outputs if t.requires_grad), wanted)]

    replay_equals_call(call)


def test_large_offsets():
    """Rows beyond 2^31 elements are read and written: the last rows of a large write equal the same rows written alone."""
    rows, width = (1 << 31) // 64 + 1024, 64
    if torch.cuda.mem_get_info()[0] < 6 * 2 * rows * width:
        pytest.skip("not enough device memory")
    for backend in BACKENDS:
        memory = torch.zeros(1, rows, width, device="cuda", dtype=torch.bfloat16)
        tail = torch.randn(1, 512, width, device="cuda", dtype=torch.bfloat16)
        memory[:, -512:] = tail
        weights = torch.rand(1, 1, rows, device="cuda", dtype=torch.bfloat16)
        erase, add = (torch.rand(1, 1, width, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        with memkernels.backend(backend), torch.inference_mode():
            full = memkernels.memory_write(memory, weights, erase, add)
            alone = memkernels.memory_write(tail, weights[..., -512:].contiguous(), erase, add)
        assert torch.equal(full[:, -512:], alone)
        del memory, full

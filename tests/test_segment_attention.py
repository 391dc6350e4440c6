"""segment_attention on graphs larger than the generated samples: power-law degrees, threads, memory, bad graphs, what no edge names."""

import checks
import pytest
import torch
from cases import INTERPRETED, places
from child import run_python

import memkernels as mk
from memkernels import _backends
from memkernels.bench.memory import saved_bytes
from memkernels.testing import compare, specs
from memkernels.testing.inputs import draw
from memkernels.testing.spec import Sample
from memkernels.testing.specs.segment_attention import POWER_LAW, graph

pytestmark = pytest.mark.timeout(300)
SPEC = specs()["segment_attention"]
BACKENDS = sorted({label for label, device in places("all") if device == "cpu"})
KERNELS = [b for b in BACKENDS if b.startswith("cpp")]
SIZES = dict(Nd=20, Ns=18, E=330, NH=2, D=4, V=4) if INTERPRETED else dict(Nd=700, Ns=500, E=9000, NH=4, D=16, V=16)
FORKED = 100_000
LARGE = Sample("large", SIZES, dict(return_lse=True), ("edge_bias",), POWER_LAW)


def measured(backend, given=None, dtype=torch.float32):
    given = draw(SPEC, LARGE, dtype) if given is None else given
    with compare.using(backend):
        return compare.evaluate(SPEC, given, dict(LARGE.options), lambda outputs: compare.make.upstream(outputs, dtype))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("backend", BACKENDS)
def test_power_law(backend, dtype):
    """A node with thousands of edges, most with none or one; sources likewise."""
    for row in compare.measure(SPEC, LARGE, dtype, backend, draws=1):
        assert row.status == "ok", row.reason


@pytest.mark.parametrize("backend", KERNELS)
def test_threads_change_nothing(backend):
    found = []
    for n in (1, 2, 3, 8):
        with checks.threads(n):
            found.append(measured(backend))
    for other in found[1:]:
        checks.assert_same(other, found[0], "threads")


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_of_the_graph(backend):
    """ptr and index with strides, as columns of a larger table."""
    given = draw(SPEC, LARGE, torch.float32)
    wanted = measured(backend, given)
    for name in ("ptr", "index"):
        wide = torch.full((given[name].shape[0], 3), torch.iinfo(torch.int64).max)
        wide[:, 1] = given[name]
        checks.assert_same(measured(backend, {**given, name: wide[:, 1]}), wanted, f"{name} with a stride")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nodes_and_sources_without_edges(backend):
    """Exactly 0, lse -inf; NaN in a source that no edge names reaches nothing, and a node's neighbours do not matter to others."""
    given = draw(SPEC, LARGE, torch.float32)
    alone, named = torch.diff(given["ptr"]) == 0, torch.zeros(SIZES["Ns"], dtype=torch.bool)
    named[given["index"]] = True
    assert alone.any() and not named.all()
    wanted = measured(backend, given)
    assert (wanted["output 0"][alone] == 0).all() and (wanted["output 1"][alone] == -torch.inf).all()
    assert (wanted["d query"][alone] == 0).all() and (wanted["d key"][~named] == 0).all() and (wanted["d value"][~named] == 0).all()
    assert all(t.isfinite().all() for name, t in wanted.items() if name != "output 1")
    poisoned = {**given, "key": given["key"].clone(), "value": given["value"].clone(), "query": given["query"].clone()}
    poisoned["key"][~named], poisoned["value"][~named], poisoned["query"][alone] = torch.nan, torch.inf, torch.nan
    checks.assert_same(measured(backend, poisoned), wanted, "NaN where no edge leads")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_edge_has_no_gradient_of_its_score(backend):
    """Its weight is 1 whatever the score: gradients of query, key and bias are exactly 0, in half precision too (Triton: a rounding)."""
    rounding = 1e-5 if INTERPRETED else 0.0
    nodes = torch.randperm(30)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (torch.randn(30, 2, 17, dtype=dtype, requires_grad=True) for _ in range(3))
        bias = torch.randn(30, 2, dtype=dtype, requires_grad=True)
        with compare.using(backend):
            out = mk.segment_attention(q, k, v, torch.arange(31), nodes, edge_bias=bias)
            out.backward(torch.randn_like(out))
        assert torch.equal(out, v[nodes])
        for t in (q, k, bias):
            assert (t.grad.abs() <= rounding).all()


@pytest.mark.parametrize("backend", [b for b in KERNELS if ":" not in b])
def test_kernels_look_at_the_graph_themselves(backend):
    """Where the public function cannot read the values (a transform, a compiled graph), the kernel refuses before it writes."""
    sample = Sample("small", dict(Nd=3, Ns=4, E=6, NH=1, D=2, V=2), {}, (), graph())
    given = draw(SPEC, sample, torch.float32)
    module = _backends.kernel("cpp", "segment_attention")
    wrong = ("index", 2, 4, IndexError), ("index", 0, -1, IndexError), ("ptr", 1, 9, ValueError), ("ptr", 3, 5, ValueError)
    for name, place, value, error in wrong:
        bad = {**given, name: given[name].clone()}
        bad[name][place] = value
        flat = (*bad.values(), 1.0, False)  # inputs in the order of the op, scale, saving
        outputs = [torch.full(s, 7.0) for s in ((3, 1, 2), (3, 1), (3, 1, 2))]
        with pytest.raises(error, match=f"segment_attention: {name}"):
            module.forward(*outputs, None, *flat)
        gradients = [torch.full_like(bad[n], 7.0) for n in ("query", "key", "value")]
        with pytest.raises(error, match=f"segment_attention: {name}"):
            module.backward(*gradients, None, torch.ones(3, 1, 2), None, *flat[:6], outputs[0], outputs[2], None, 1.0, False)
        assert all((t == 7).all() for t in (*outputs, *gradients))


@pytest.mark.skipif(INTERPRETED or not KERNELS, reason="about the C++ kernels")
def test_nothing_of_the_size_of_the_edges_is_saved():
    given = {n: t.requires_grad_() if t is not None and t.is_floating_point() else t for n, t in draw(SPEC, LARGE, torch.float32).items()}
    leaves = [t for t in given.values() if t is not None]
    nodes = (SIZES["Nd"] + SIZES["Ns"]) * SIZES["NH"] * SIZES["D"] * 4
    assert saved_bytes(lambda: [mk.segment_attention(**given)], leaves) <= 2 * nodes


@pytest.mark.skipif(INTERPRETED or not KERNELS, reason="about the C++ kernels")
def test_forked_child_of_a_threaded_parent():
    """A graph so large that torch's own reductions use threads, for which a child would wait for ever."""
    run_python(f"""
import os, signal, torch, memkernels as mk
torch.set_num_threads(2)
rows = torch.randn(3, {FORKED}, 1, 2)
ptr, index = torch.arange({FORKED} + 1), torch.randperm({FORKED})
out = mk.segment_attention(*rows, ptr, index)
child = os.fork()
if not child:
    signal.alarm(60)
    same = mk.segment_attention(*rows, ptr, index).numpy().tobytes() == out.numpy().tobytes()
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
""")

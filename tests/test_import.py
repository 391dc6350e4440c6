"""`import memkernels` with nothing but torch: no GPU, no Triton, no compiler, no extension, no network, no subprocess."""

import pytest
from child import run_python

# Blocks modules by name: what `pip uninstall`, or a machine without a compiler, looks like from inside.
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {blocked!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""
RUN_ALL = """
import torch, memkernels
from memkernels.testing import compare, specs
from memkernels.testing import inputs
assert specs()
for spec in specs().values():
    for sample in spec.samples[:3]:
        given = inputs.draw(spec, sample, torch.float32)
        with compare.using({backend!r}):
            found = compare.evaluate(spec, given, dict(sample.options), lambda o: inputs.upstream(o, torch.float32))
        assert any(n.startswith("d ") for n in found)
print(memkernels.backends())
"""
OPTIONAL = ("triton", "typer", "rich", "safetensors", "matplotlib", "hypothesis", "pytest", "numpy.testing")
CASES = {
    "no GPU": ((), {"CUDA_VISIBLE_DEVICES": ""}, "reference"),
    "no Triton": (("triton",), {}, "reference"),
    "no extension": (("memkernels._C", "memkernels._C_cuda"), {}, "reference"),
    "no compiler": ((), {"PATH": "", "CXX": "", "CC": ""}, "reference"),
    "torch alone": ((*OPTIONAL, "memkernels._C", "memkernels._C_cuda"), {"PATH": ""}, "reference"),
}


@pytest.mark.parametrize("missing", CASES)
def test_runs_without(missing):
    blocked, environment, backend = CASES[missing]
    out = run_python(BLOCK.format(blocked=blocked) + RUN_ALL.format(backend=backend), environment=environment)
    for name in ("triton",) * ("triton" in blocked) + ("cpp", "cuda") * ("memkernels._C" in blocked):
        assert f"'{name}': None" not in out, f"backends() does not say that {name} is missing: {out}"


def test_without_the_extension_the_default_is_the_reference():
    out = run_python(
        BLOCK.format(blocked=("memkernels._C", "memkernels._C_cuda"))
        + "import torch, memkernels as mk\n"
        + "from memkernels.testing import specs, inputs\n"
        + "for spec in specs().values():\n"
        + "    given = inputs.draw(spec, spec.samples[0], torch.float32)\n"
        + "    reasons = spec.call(lambda *a, **k: mk.explain(spec.name, *a, **k), given, dict(spec.samples[0].options))\n"
        + "    assert reasons['reference'] is None and all(r for n, r in reasons.items() if n != 'reference'), reasons\n"
        + "    spec.call(spec.function, given, dict(spec.samples[0].options))\n"
        + "try:\n"
        + "    mk.cpu_level('avx2')\n"
        + "except mk.BackendError as error:\n"
        + "    print(error)\n"
    )
    assert "cpp" in out


def test_import_opens_no_socket_and_starts_no_process():
    run_python(
        """
        import sys, torch
        seen = []
        sys.addaudithook(lambda event, args: seen.append((event, args)) if event in WATCHED else None)
        WATCHED = {"socket.connect", "socket.getaddrinfo", "socket.bind"}
        WATCHED |= {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
        import memkernels
        memkernels.backends()
        import memkernels.nn, memkernels.testing
        assert not seen, seen
        """
    )


def test_import_of_the_package_is_light():
    """No optional dependency is imported, and the package adds little to the time of torch."""
    out = run_python(
        """
        import sys, time, torch
        before, start = set(sys.modules), time.process_time()  # of this process alone: a busy machine, or a slow disk, counts not
        import memkernels
        print(time.process_time() - start)
        heavy = {"triton", "typer", "rich", "safetensors", "matplotlib", "torch._dynamo", "torch._inductor"} - before
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        from torch.utils.flop_counter import flop_registry  # imports Triton; our formulas come with it
        assert torch.ops.memkernels.lstm_backward in flop_registry
        """
    )
    assert float(out) < 3.0

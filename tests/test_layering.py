"""The layer rules and size budgets of docs/design.md, sections 1 and 7, read off the source."""

import ast
import re
import warnings
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "memkernels"
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
HELPERS = ("memkernels._checks", "memkernels._compat", "memkernels._config")
# What a layer may import of memkernels: names of modules, each with everything below it.
ALLOWED = {
    "nn": ("memkernels.nn", "memkernels.ops", *HELPERS),
    "distributed": ("memkernels.distributed", "memkernels.ops", "memkernels.store", *HELPERS),
    "integrations": ("memkernels.ops", *HELPERS),
    "models": ("memkernels.models", "memkernels.nn", "memkernels.ops", "memkernels.store", *HELPERS),
    "store": ("memkernels.store", "memkernels.ops", "memkernels._backends", "memkernels._freed", *HELPERS),
    "ops": ("memkernels.ops", "memkernels._registry", *HELPERS),
    "backends/reference": ("memkernels.backends.reference",),
    "backends/triton": ("memkernels.backends.triton", "memkernels.backends._hopfield", "memkernels.backends._layout", *HELPERS),
    "backends/cpp": ("memkernels.backends.cpp", "memkernels.backends._hopfield", "memkernels.backends._layout", "memkernels._C", *HELPERS),
    "backends/cuda": ("memkernels.backends.cuda", "memkernels.backends._layout", "memkernels._C_cuda", *HELPERS),
}
# (files below, soft limit, hard limit) in lines.
LINES = (
    ("memkernels/ops/*.py", 200, 300),
    ("memkernels/backends/reference/*.py", 100, 150),
    ("memkernels/backends/triton/*.py", 350, 500),
    ("memkernels/**/*.py", 350, 500),
    ("tests/**/*.py", 300, 450),
    ("csrc/**/*.*", 350, 500),
)
FUNCTION, ARGUMENTS = (60, 100), (10, 14)


@cache
def tree(path):
    return ast.parse(path.read_text())


def imports(path):
    """Absolute names of everything a file imports, at its top or inside a function; type-checking imports are no imports."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def below(name, allowed):
    return any(name == a or name.startswith(a + ".") for a in allowed)


def relative(path):
    return path.relative_to(ROOT).as_posix()


def chains(path):
    """Every dotted name such as torch.nn.functional, as a list of its parts."""
    for node in ast.walk(tree(path)):
        parts, at = [], node
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value
        if isinstance(at, ast.Name) and parts:
            yield [at.id, *reversed(parts)], node.lineno


@pytest.mark.parametrize("layer", ALLOWED)
def test_layer_imports(layer):
    for path in FILES:
        if relative(path).startswith((f"memkernels/{layer}/", f"memkernels/{layer}.py")):
            own = {name for name in imports(path) if below(name, ("memkernels",))}
            bad = sorted(name for name in own if not below(name, ALLOWED[layer]))
            assert not bad, f"{relative(path)} imports {', '.join(bad)}; {layer} may import {', '.join(ALLOWED[layer])}"


def test_reference_imports_torch_only():
    for path in FILES:
        if relative(path).startswith("memkernels/backends/reference/"):
            bad = sorted(
                n
                for n in imports(path)
                if not below(n, ("torch", "math", "typing", "functools", "__future__", "memkernels.backends.reference"))
            )
            assert not bad, f"{relative(path)} imports {', '.join(bad)}"


def test_only_the_triton_backend_imports_triton():
    for path in FILES:
        if not relative(path).startswith("memkernels/backends/triton/"):
            top = {n for n in imports(path) if below(n, ("triton",))}
            reads_version = relative(path) == "memkernels/bench/environment.py"  # inside a function
            assert not top or reads_version, f"{relative(path)} imports {', '.join(top)}"


def test_only_the_compiled_backends_import_the_extensions():
    for path in FILES:
        if not relative(path).startswith(("memkernels/backends/cpp/", "memkernels/backends/cuda/")):
            bad = sorted(n for n in imports(path) if below(n, ("memkernels._C", "memkernels._C_cuda")))
            assert not bad, f"{relative(path)} imports {', '.join(bad)}"


def test_nothing_imports_tests_or_benchmarks():
    for path in FILES:
        bad = sorted(n for n in imports(path) if below(n, ("tests", "benchmarks", "pytest", "hypothesis")))
        assert not bad, f"{relative(path)} imports {', '.join(bad)}"


def test_only_config_reads_the_environment():
    for path in FILES:
        if path.name != "_config.py":
            bad = [f"{'.'.join(c)} in line {line}" for c, line in chains(path) if c[:2] in (["os", "environ"], ["os", "getenv"])]
            assert not bad, f"{relative(path)}: {', '.join(bad)}"


def is_private(part):
    return part.startswith("_") and not part.startswith("__")


def test_only_compat_touches_private_names_of_torch():
    for path in FILES:
        if path.name != "_compat.py":
            bad = [f"{'.'.join(c)} in line {line}" for c, line in chains(path) if c[0] == "torch" and any(map(is_private, c[1:]))]
            bad += [n for n in imports(path) if below(n, ("torch",)) and any(map(is_private, n.split(".")[1:]))]
            assert not bad, f"{relative(path)}: {', '.join(bad)}"


def test_package_imports_nothing_heavy():
    heavy = ("triton", "numpy", "typer", "rich", "safetensors", "matplotlib", "memkernels.nn", "memkernels.models", "memkernels.testing")
    at_top = {n.name for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.Import) for n in node.names}
    at_top |= {node.module for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.ImportFrom)}
    assert not [n for n in at_top if below(n, heavy)]


def test_every_op_is_spelled_the_same_in_every_layer():
    from memkernels import _registry
    from memkernels.testing import specs

    for name in _registry.OPS:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        for layer in ("ops", "backends/reference", "testing/specs"):
            assert (PACKAGE / layer / f"{name}.py").exists(), f"memkernels/{layer}/{name}.py is missing"
        assert specs()[name].name == name


def test_generated_tests_hold_no_op_name():
    from memkernels import _registry

    words = re.compile(r"\b(" + "|".join(sorted(_registry.OPS, key=len, reverse=True)) + r")\b")
    for path in sorted((ROOT / "tests").glob("test_ops*.py")):
        assert not words.search(path.read_text()), f"{path.name} names an op: {words.search(path.read_text())[0]}"


def test_lines_of_files():
    seen = set()
    for pattern, soft, hard in LINES:
        for path in sorted(ROOT.glob(pattern)):
            if path in seen or not path.is_file():
                continue
            seen.add(path)
            n = len(path.read_text(errors="replace").splitlines())
            assert n <= hard, f"{relative(path)} has {n} lines, at most {hard} are allowed"
            if n > soft:
                warnings.warn(f"{relative(path)} has {n} lines, more than {soft}", stacklevel=1)


def test_sizes_of_functions():
    for path in [*FILES, *sorted((ROOT / "tests").glob("*.py"))]:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
                n, where = node.end_lineno - start + 1, f"{relative(path)}: {node.name}"
                free = any(word in ast.unparse(d) for d in node.decorator_list for word in ("jit", "command"))
                arguments = [] if free or _is_flat(path) else [*node.args.posonlyargs, *node.args.args]
                assert n <= FUNCTION[1], f"{where} has {n} lines, at most {FUNCTION[1]} are allowed"
                assert len(arguments) <= ARGUMENTS[1], f"{where} takes {len(arguments)} arguments, at most {ARGUMENTS[1]} are allowed"
                if n > FUNCTION[0]:
                    warnings.warn(f"{where} has {n} lines, more than {FUNCTION[0]}", stacklevel=1)


def _is_flat(path):
    """Backends, specs and ops take an op's flat arguments, however many it has (as Triton kernels and commands do theirs)."""
    return relative(path).startswith(("memkernels/backends/", "memkernels/testing/specs/", "memkernels/ops/"))

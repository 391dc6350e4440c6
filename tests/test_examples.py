"""Each program under examples/ runs, in its shortest form; what it says about its own results is asserted by the program itself."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = {p.stem: p for p in (Path(__file__).parents[1] / "examples").glob("*.py")}
# The arguments of a short run, and what it prints; of knn_lm tests/test_knn_lm.py has the parts, and transformers is not installed here.
SHORT = {
    "graph_attention": (None, "graph attention  accuracy"),
    "language_model": (["--steps", "10"], "step 10: "),
    "reset_policy": (None, "equal at every step"),
    "tasks": (["copy", "repeat-copy", "mqar", "--seconds", "0"], "not solved: accuracy 0."),
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_known():
    assert set(EXAMPLES) == {*SHORT, "knn_lm", "huggingface_attention"}


@pytest.mark.parametrize("name", SHORT)
def test_runs(name, capsys):
    arguments, says = SHORT[name]
    main = load(name).main
    main() if arguments is None else main(arguments)
    assert says in capsys.readouterr().out

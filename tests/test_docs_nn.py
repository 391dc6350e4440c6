"""The Python in docs/nn.md, docs/models.md and docs/store.md runs, and the docstrings' examples hold."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "nn.graph_attention", "nn.gru", "nn.gru_cell", "nn.lstm", "nn.lstm_cell", "nn.rnn", "nn.rnn_cell", "nn.multihead_attention",
    "nn.external_memory", "nn.ntm", "nn.dnc", "nn.sam", "nn.hopfield_retrieval", "nn.product_key_memory", "models.vocabulary",
    "models.memory_lm", "models.knn_lm", "ops.store_find", "ops.store_upsert_", "ops.store_erase_", "ops.store_items", "ops.store_move_",
    "ops.store_gather", "ops.store_scatter_", "store.store", "store.index", "store.text",
)  # fmt: skip


@pytest.mark.parametrize("name", ["nn", "models", "store"])
def test_documentation_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"), re.S)
    assert blocks
    exec(compile("\n".join(blocks), f"docs/{name}.md", "exec"), {})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"memkernels.{name}")
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted and not found.failed

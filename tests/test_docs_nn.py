"""The Python in docs/nn.md, docs/models.md, docs/store.md and docs/distributed.md runs, and the docstrings' examples hold."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from child import run_python

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


DISTRIBUTED = """
import torch

query, key, value = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
{ring}
assert key.grad.shape == key.shape
rows, values, key, strength, query = torch.randn(5, 8), torch.randn(5, 3), torch.randn(2, 8), torch.ones(2), torch.randn(3, 8)
places, new_rows, new_values = torch.tensor([4, 0]), torch.randn(2, 8), torch.randn(2, 3)
{memory}
assert memory.topk_read(new_rows, k=1)[0].shape == (2, 3)
keys, values = ["a", "b"], torch.randn(2, 64)
{store}
assert len(store) == 2 and found.all()
store.close()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_documentation_of_several_processes_runs(tmp_path):
    """As a group of one process."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 3
    own = f"'gloo', init_method='file://{tmp_path}/group', rank=0, world_size=1"
    code = (
        DISTRIBUTED.format(**dict(zip(("ring", "memory", "store"), blocks))).replace('"nccl"', own).replace('"shards"', f"'{tmp_path}/s'")
    )
    run_python(code)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(f"memkernels.{name}")
    found = doctest.testmod(module, extraglobs={"torch": torch})
    assert found.attempted and not found.failed

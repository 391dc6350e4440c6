"""The data of the algorithmic tasks, and the command that trains on them."""

import json

import pytest
import torch
from typer.testing import CliRunner

from memkernels.cli import mqar
from memkernels.cli.app import app
from memkernels.cli.tasks import TASKS


def drawn(name, hardest, seed=0):
    return TASKS[name].draw(5, hardest, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TASKS)
def test_sizes_fit_the_machine(name):
    for hardest in (False, True):
        x, target = drawn(name, hardest)
        assert x.shape[1:] == (5, TASKS[name].inputs) and target.shape[1:] == (5, TASKS[name].outputs) and len(x) > len(target)
        assert not x[-len(target) :].any(), "the answer is not shown"
        for model in ("ntm", "dnc"):
            assert TASKS[name].model(model)(x)[0].shape[2] == TASKS[name].outputs


def test_copy():
    x, target = drawn("copy", True)
    assert len(target) == 20 and torch.equal(x[:20, :, :8], target) and (x[20, :, 8] == 1).all()


def test_repeat_copy():
    x, target = drawn("repeat-copy", True)
    assert (x[3, :, 5] == 2).all() and torch.equal(target[:4, :, :4], x[1:3, :, :4].repeat(2, 1, 1))
    assert (target[4, :, 4] == 1).all() and not target[:4, :, 4].any()


def test_associative_recall():
    x, target = drawn("associative-recall", True)
    for b in range(5):
        items = [x[4 * i + 1 : 4 * i + 4, b, :6] for i in range(6)]
        asked = x[25:28, b, :6]
        assert any(torch.equal(items[i], asked) and torch.equal(items[i + 1], target[:, b]) for i in range(5))


def test_command(tmp_path):
    path = tmp_path / "found.json"
    command = ["train-task", "repeat-copy", "--seconds", "0.5", "--seed", "3", "--json", str(path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and "not solved" in result.output and "seed 3" in result.output
    found = json.loads(path.read_text())
    assert found["steps"] > 0 and found["seed"] == 3 and not found["solved"]
    assert CliRunner().invoke(app, ["train-task", "sorting"]).exit_code == 2


@pytest.mark.parametrize("memory", mqar.MODELS)
def test_mqar(memory):
    tokens, places, values = mqar.draw(6, torch.Generator().manual_seed(0))
    for row, at, wanted in zip(tokens, places, values):
        pairs = dict(row[: 2 * mqar.PAIRS].view(-1, 2).tolist())
        assert [pairs[int(row[p])] for p in at] == wanted.tolist() and (at >= 2 * mqar.PAIRS).all()
    model = mqar.Recall(memory)
    logits = model(tokens, places)
    assert logits.shape == (6, mqar.PAIRS, mqar.WORDS)
    # What comes after a query does not change its answer.
    later = tokens.clone()
    later[:, int(places.max()) + 1 :] = 1
    torch.testing.assert_close(model(later, places), logits)


def test_mqar_command():
    found = CliRunner().invoke(app, ["train-task", "mqar", "--seconds", "0.1", "--batch", "4"])
    assert found.exit_code == 1 and "not solved" in found.output

"""Absurd constructor and call arguments of nn and models: one clear error that names class, argument, what was expected and what came."""

import contextlib

import pytest
import torch

from memkernels.models import MemoryLM, Vocabulary
from memkernels.nn import LSTM, ExternalMemory, LSTMCell, MultiheadAttention

NOT_SIZES = (-1, 0, "3", True, None, 2.5, [3])
GOOD = {
    ExternalMemory: dict(input_size=8, slots=4, width=4, read_heads=2),
    MemoryLM: dict(vocabulary=Vocabulary.of("abc"), hidden=16),
    LSTM: dict(input_size=8, hidden_size=8),
    LSTMCell: dict(input_size=8, hidden_size=8),
    MultiheadAttention: dict(embed_dim=8, num_heads=2),
}
BAD = [
    *((ExternalMemory, n, v) for n in ("input_size", "slots", "width", "read_heads", "write_heads") for v in NOT_SIZES),
    *((ExternalMemory, "output_size", v) for v in NOT_SIZES if v is not None),
    *((ExternalMemory, "shift", v) for v in NOT_SIZES if v != 0),
    *((ExternalMemory, n, v) for n in ("mode", "similarity", "batch_first") for v in ("x", None, 3, ["content"])),
    *((MemoryLM, n, v) for n in ("embedding", "hidden", "heads", "context", "slots", "width", "read_heads") for v in NOT_SIZES),
    *((MemoryLM, n, v) for n in ("model", "mode") for v in ("x", None, 3)),
    *((MemoryLM, "dropout", v) for v in (-1, 2, "0.1", None, True, float("nan"))),
    *((MemoryLM, "vocabulary", v) for v in ("abc", None, 3)),
    *((LSTM, n, v) for n in ("num_layers", "proj_size") for v in ("3", None, 2.5)),
    *((LSTM, "dropout", v) for v in ("3", None)),
    *((LSTMCell, n, v) for n in ("input_size", "hidden_size") for v in (-1, "3", None, 2.5)),
    *((MultiheadAttention, n, v) for n in ("embed_dim", "num_heads") for v in ("3", None, 2.5)),
    *((MultiheadAttention, n, v) for n in ("kdim", "vdim") for v in (-1, "3", 2.5)),
    *((MultiheadAttention, "dropout", v) for v in (-1, 2, "3", None)),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD, ids=lambda x: getattr(x, "__name__", repr(x)))
def test_constructors(kind, name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{kind.__name__}: {name}: expected .+, got "):
        kind(**{**GOOD[kind], name: value})


@pytest.mark.parametrize("kind", GOOD, ids=lambda x: x.__name__)
def test_what_they_build_on_is_good(kind):
    kind(**GOOD[kind])


def test_an_unknown_size_is_named():
    with pytest.raises(TypeError, match=r"^MemoryLM: sizes: expected names among model, embedding, .*, got 'hiden'"):
        MemoryLM(Vocabulary.of("abc"), hiden=16)


@pytest.mark.parametrize("input", [None, "x", [1], torch.ones(2, 3), torch.ones(2, 3, 8).long(), torch.ones(2, 3, 8).double()], ids=str)
def test_external_memory_input(input):
    with pytest.raises((TypeError, ValueError), match=r"^ExternalMemory: input: expected .+, got "):
        ExternalMemory(**GOOD[ExternalMemory])(input)


M, W = torch.ones(2, 4, 4), torch.ones(2, 3, 4)
STATES = ["x", 3, (), (M, W, W), (None, None), (M.long(), W), (M[:1], W), (M, None), (M, "w"), (M, W[:, :2])]


@pytest.mark.parametrize("state", STATES, ids=lambda s: f"{type(s).__name__}{STATES.index(s) if isinstance(s, (str, int)) else ''}")
def test_external_memory_state(state):
    with pytest.raises((TypeError, ValueError), match=r"^ExternalMemory: state(\.\w+)?: expected .+, got "):
        ExternalMemory(**GOOD[ExternalMemory], mode="ntm")(torch.ones(2, 3, 8), state)


CALLS = [
    *(("MemoryLM: tokens", "forward", dict(tokens=v)) for v in (None, "abc", torch.ones(2, 3), torch.tensor([1, 2]))),
    *(("MemoryLM: state", "forward", dict(tokens=torch.tensor([[1, 2]]), state=v)) for v in (3, "x", (1, 2), (None,) * 4)),
    *(("MemoryLM.evaluate: tokens", "evaluate", dict(tokens=v)) for v in ("abc", torch.ones(9), torch.tensor([[1, 2]]), torch.tensor([1]))),
    *(
        ("MemoryLM.evaluate: " + n, "evaluate", {"tokens": torch.tensor([1, 2, 1]), n: v})
        for n in ("window", "batch")
        for v in (0, -1, "x")
    ),
    *(("MemoryLM.generate", "generate", {n: v}) for n in ("temperature", "top_p") for v in ("x", None, float("nan"), -1)),
    *(("MemoryLM.generate", "generate", {"length": v}) for v in ("x", None, 2.5, -1)),
    ("MemoryLM.generate: seed", "generate", {"seed": "x"}),
    ("Vocabulary.encode: text", "generate", {"prompt": 3}),
]


@pytest.mark.parametrize(("start", "method", "arguments"), CALLS, ids=lambda x: str(x).replace("\n", ""))
def test_calls_of_memory_lm(start, method, arguments):
    with pytest.raises((TypeError, ValueError), match=rf"^{start}.*: expected .+, got "):
        getattr(MemoryLM(**GOOD[MemoryLM]), method)(**arguments)


def state_of(model, batch, **sizes):
    other = MemoryLM(Vocabulary.of("abc"), **{**dict(model=model, hidden=16, slots=4, width=4, heads=2), **sizes})
    return other(torch.ones(batch, 2, dtype=torch.int64))[1]


OTHERS = [
    ("memory", dict(batch=3)),
    ("memory", dict(batch=2, hidden=8)),
    ("memory", dict(batch=2, slots=5)),
    ("memory", dict(batch=2, width=5)),
    ("attention", dict(batch=1)),
    ("attention", dict(batch=2, hidden=8)),
    ("attention", dict(batch=2, heads=4)),
]


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize(("kind", "other"), OTHERS, ids=str)
def test_a_state_of_another_model_or_batch(kind, other, part):
    model = MemoryLM(Vocabulary.of("abc"), model=kind, hidden=16, slots=4, width=4, heads=2)
    tokens = torch.tensor([[1, 2], [2, 1]])
    state = list(model(tokens)[1])
    wrong = state_of(kind, **other)[part]
    shapes, fitting = ([None if t is None else t.shape for t in part_ or ()] for part_ in (wrong, state[part]))
    state[part] = wrong
    refused = pytest.raises(ValueError, match=r"^MemoryLM: state: expected \w+ of shape \(.+\), got ")
    with contextlib.nullcontext() if shapes == fitting else refused:
        model(tokens, tuple(state))


@pytest.mark.parametrize("part", [3, (), (None, None), torch.ones(2)], ids=repr)
def test_a_state_of_something_else(part):
    with pytest.raises(TypeError, match=r"^MemoryLM: state.*: expected .+, got "):
        MemoryLM(**GOOD[MemoryLM])(torch.tensor([[1, 2]]), (part, None, None))


@pytest.mark.parametrize("token", [4, -1, -100, 2**40])
@pytest.mark.parametrize("method", ["forward", "loss"])
def test_a_token_outside_the_vocabulary(method, token):
    for tokens in ([[1, token, 2]], [[1, 2, token]]):
        with pytest.raises(ValueError, match=f"^MemoryLM: tokens: expected 0 to 3, got {token}$"):
            getattr(MemoryLM(**GOOD[MemoryLM]), method)(torch.tensor(tokens))


@pytest.mark.parametrize("tokens", [torch.ones(3, 1), torch.ones(0, 3), torch.ones(3)], ids=lambda t: str(tuple(t.shape)))
def test_a_batch_without_a_token_to_predict(tokens):
    model = MemoryLM(**GOOD[MemoryLM])
    before = [p.clone() for p in model.parameters()]
    for call in (model.loss, lambda t: model.train_step(t, torch.optim.SGD(model.parameters(), lr=1.0))):
        with pytest.raises(ValueError, match=r"^MemoryLM: tokens: expected .+, got shape"):
            call(tokens.long())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_vocabulary():
    for made in (Vocabulary, Vocabulary.of):
        with pytest.raises(TypeError, match=r"^Vocabulary.*: expected .+, got int"):
            made(3)
    for token in (-1, 4):
        with pytest.raises(IndexError, match=f"^Vocabulary.decode: tokens: expected 0 to 3, got {token}"):
            Vocabulary.of("abc").decode([1, token])

"""models.MemoryLM: causality, state, training, sampling, files."""

import math

import pytest
import safetensors.torch
import torch

from memkernels.models import MemoryLM, Vocabulary, checkpoint

SIZES = dict(embedding=8, hidden=12, heads=3, slots=5, width=4, read_heads=2)
VARIANTS = [dict(model="attention"), dict(model="attention", context=4), dict(model="memory"), dict(model="memory", mode="ntm")]


def make(**kwargs):
    torch.manual_seed(0)
    return MemoryLM(Vocabulary.of("abcdefgh\n"), **{**SIZES, **kwargs})


def test_vocabulary_of_any_script():
    vocabulary = Vocabulary.of("记忆 memory 😀")
    assert len(vocabulary) == len(set("记忆 memory 😀")) + 1
    assert vocabulary.decode(vocabulary.encode("memory 记忆😀")) == "memory 记忆😀"
    assert vocabulary.encode("x忆").tolist()[0] == 0 and vocabulary.decode([0]) == "\ufffd"
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary == Vocabulary(vocabulary.characters) and vocabulary != Vocabulary("ab")
    with pytest.raises(ValueError, match="distinct single characters"):
        Vocabulary("aa")


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_the_future_does_not_leak(kwargs):
    model = make(**kwargs).double()
    tokens = torch.randint(1, 10, (3, 9))
    logits, _ = model(tokens)
    for t in range(1, 9):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 1) % 10
        other, _ = model(changed)
        torch.testing.assert_close(other[:, :t], logits[:, :t], rtol=0, atol=1e-14)
        assert (other[:, t] - logits[:, t]).abs().max() > 1e-6


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_state_gives_what_the_whole_gives(kwargs):
    model = make(**kwargs).double()
    tokens = torch.randint(1, 10, (3, 9))
    whole, _ = model(tokens)
    state, pieces = None, []
    for piece in tokens.split([1, 1, 4, 2, 1], 1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_training_learns_a_repeated_text(kwargs):
    model = make(**kwargs)
    tokens = model.vocabulary.encode("abcdefgh\n" * 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = model.evaluate(tokens, window=16)
    losses = [model.train_step(tokens.unfold(0, 17, 5)[step % 8 :: 8], optimizer) for step in range(60)]
    after = model.evaluate(tokens, window=16)
    assert abs(before - math.log2(10)) < 0.5 and after < 0.5 and losses[-1] < losses[0] / 4
    assert model.training and model.generate("abc", 12, temperature=0) == "defgh\nabcdef"
    with pytest.raises(ValueError, match="tokens"):
        model.evaluate(torch.tensor([1, 99]))
    assert model.training  # drops again, whatever happened


def test_evaluate_counts_every_token_once():
    model = make().double()
    tokens = torch.randint(1, 10, (50,))
    by_hand = []
    for start in range(0, 49, 7):
        piece = tokens[start : start + 8]
        log = torch.log_softmax(model(piece[None, :-1])[0][0], -1)
        by_hand += (-log[torch.arange(len(piece) - 1), piece[1:]] / math.log(2)).tolist()
    assert len(by_hand) == 49
    assert model.evaluate(tokens, window=7, batch=3) == pytest.approx(sum(by_hand) / 49)
    assert model.evaluate(tokens[:2]) > 0
    with pytest.raises(ValueError, match="at least 2 tokens"):
        model.evaluate(tokens[:1])


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_generate(kwargs):
    model = make(**kwargs)
    text = model.generate("abc", 30, seed=1)
    assert text == model.generate("abc", 30, seed=1) and len(text) == 30
    assert text != model.generate("abc", 30, seed=2)
    assert "\ufffd" not in model.generate("字 unseen", 50, temperature=5.0, seed=0)
    assert model.generate("abc", 5, temperature=0) == model.generate("abc", 5, top_p=1e-9)
    assert model.generate("abc", 5, temperature=0) == model.generate("abc", 5, temperature=5e-324)
    assert model.generate("", 3, seed=0) and model.generate("a", 0) == ""
    for bad in (dict(temperature=-1), dict(top_p=0), dict(top_p=1.5), dict(length=-1)):
        with pytest.raises(ValueError, match="generate: expected temperature"):
            model.generate("a", **bad)


def test_top_p_keeps_the_likeliest():
    model = make()
    with torch.no_grad():
        model.dense.weight.zero_()
        model.dense.bias.copy_(torch.tensor([99.0, 3, 2, 1, 0, 0, 0, 0, 0, 0]))
    assert set(model.generate("a", 300, top_p=0.7, seed=0)) == set(model.vocabulary.characters[:2])
    assert len(set(model.generate("a", 600, seed=0))) > 5


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_save_and_load(tmp_path, kwargs):
    model, path = make(**kwargs), tmp_path / "模型.safetensors"
    model.save(path, extra={"rng": torch.arange(3)}, training={"step": 7})
    other, extra, training = MemoryLM.load_with_extra(path)
    assert other.config == model.config and other.vocabulary == model.vocabulary and training == {"step": 7}
    assert extra["rng"].tolist() == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert MemoryLM.load(path).generate("a", 5, seed=0) == model.generate("a", 5, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
def test_a_model_comes_back_in_its_dtype(tmp_path, kwargs, dtype):
    model, path = make(**kwargs).to(dtype), tmp_path / "model"
    model.save(path)
    other = MemoryLM.load(path)
    assert all(torch.equal(a, b) and a.dtype == b.dtype == dtype for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(p.requires_grad for p in other.parameters())
    tokens = torch.randint(1, 10, (2, 5))
    torch.testing.assert_close(other(tokens)[0], model(tokens)[0], rtol=1e-12, atol=1e-12)  # MKL's products see where parameters lie
    assert other.train_step(tokens, torch.optim.SGD(other.parameters())) > 0


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    model, path = make(), tmp_path / "model"
    model.save(path)
    before = path.read_bytes()
    with torch.no_grad():
        model.dense.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"model: model.dense.bias holds values that are not finite"):
        model.save(path)
    assert path.read_bytes() == before


def test_an_exported_model_is_saved(tmp_path):
    model, tokens = make(), torch.randint(1, 10, (2, 5))
    torch.export.save(torch.export.export(model, (tokens,)), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(tokens)
    torch.testing.assert_close(found, model(tokens))


def test_bad_files_give_one_clear_line(tmp_path):
    model, path = make(), tmp_path / "model"
    model.save(path)
    whole = path.read_bytes()
    foreign = safetensors.torch.save({"x": torch.zeros(2)})
    contents = {
        "truncated": whole[:-7],
        "half": whole[: len(whole) // 2],
        "header": whole[:20],
        "empty": b"",
        "text": b"not a checkpoint at all, only text",
        "foreign": foreign,
        "version": whole.replace(b'"version":"1"', b'"version":"9"'),
        "shape": whole.replace(b'\\"hidden\\": 12', b'\\"hidden\\": 15'),
        "config": whole.replace(b'\\"hidden\\": 12', b'\\"hudden\\": 12'),
        "vocabulary": whole.replace(b"abcd", b"aacd"),
    }
    for name, data in contents.items():
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(ValueError, match=str(path)) as caught:
            MemoryLM.load(path)
        assert "\n" not in str(caught.value), name
    with pytest.raises(ValueError, match="got a folder"):
        MemoryLM.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        MemoryLM.load(tmp_path / "missing")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    model, path = make(), tmp_path / "model"
    model.save(path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        make(model="attention").save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="model: expected one of 'attention', 'memory', got 'dream'"):
        make(model="dream")
    with pytest.raises(ValueError, match="heads: expected a divisor of hidden=12, got 5"):
        make(model="attention", heads=5)

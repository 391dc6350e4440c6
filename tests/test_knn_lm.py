"""models.KnnLM: its formula, the datastore and how it is built, the choice of its numbers, errors."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from memkernels.models import KnnLM, MemoryLM, Vocabulary
from memkernels.store import KeyValueStore

TEXT = "the cat sat on the mat. the dog sat on the cat.\n" * 3


def make(dtype=None, **kwargs):
    torch.manual_seed(0)
    model = MemoryLM(Vocabulary.of(TEXT), hidden=8, embedding=6, slots=4, width=4, read_heads=1)
    return KnnLM(model, KnnLM.datastore(model, dtype=dtype), **{"k": 5, "temperature": 0.1, **kwargs})


@pytest.fixture(scope="module")
def tokens():
    return Vocabulary.of(TEXT).encode(TEXT)


def plain(lm, seen, tokens):
    """The probabilities after each of `tokens`, from all distances."""
    with torch.no_grad():
        rows = torch.cat([lm.model.hidden(piece[None])[0][0] for piece in seen[:-1].split(16)]).double()
        hidden, logits = lm.model.hidden(tokens[None])[0][0].double(), lm.model(tokens[None])[0][0].double()
    scores = {"l2": -torch.cdist(hidden, rows).square(), "dot": hidden @ rows.mT}[lm.similarity]
    best, index = scores.topk(min(lm.k, len(rows)))
    shares = torch.softmax(best / lm.temperature, 1)
    p = torch.zeros_like(logits).scatter_add(1, seen[1:][index], shares)
    return lm.weight * p + (1 - lm.weight) * logits.softmax(-1)


@pytest.mark.parametrize(("similarity", "k"), [("l2", 5), ("dot", 300)])
def test_is_its_formula(tokens, similarity, k):
    lm = make(similarity=similarity, k=k)
    assert lm.build(tokens, window=16, batch=3) == len(tokens) - 1 == len(lm.store)
    log_p, state = lm(tokens[None, :20])
    torch.testing.assert_close(log_p[0].exp().double(), plain(lm, tokens, tokens[:20]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 20))
    torch.testing.assert_close(lm(tokens[None, 20:25], state)[0], lm(tokens[None, :25])[0][:, 20:], rtol=1e-4, atol=1e-4)
    log_p[0, :, 1].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.model.parameters())
    assert lm.state_dict().keys() == {f"model.{name}" for name in lm.model.state_dict()}


def test_evaluates_tunes_and_without_weight_is_the_model(tokens):
    lm = make()
    lm.build(tokens, window=16)
    score = lm.evaluate(tokens[:50], window=16)
    windows = [*tokens[:48].split(16), tokens[48:50]]
    by_hand = [plain(lm, tokens, tokens[16 * i : 16 * i + len(w)][: 49 - 16 * i]).log2() for i, w in enumerate(windows)]
    by_hand = torch.cat(by_hand).gather(1, tokens[1:50, None])
    assert score == pytest.approx(-by_hand.mean().item(), rel=1e-4)
    best = lm.tune(tokens[:50], k=(1, 4, 16), temperature=(0.01, 0.1, 1.0), weight=(0.0, 0.3, 0.9), window=16)
    assert best == pytest.approx(lm.evaluate(tokens[:50], window=16), rel=1e-3) and best < score and lm.weight == 0.9
    lm.weight = 0.0
    assert lm.evaluate(tokens[:50], window=16) == pytest.approx(lm.model.evaluate(tokens[:50], window=16))
    torch.testing.assert_close(lm(tokens[None, :9])[0], lm.model(tokens[None, :9])[0].log_softmax(-1))
    assert lm.evaluate(tokens[:1].expand(3), window=1) > 0 and lm.model.training


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("sure", [0, 500])
def test_a_token_of_no_row_or_of_hardly_any_probability(tokens, weight, sure):
    """Its gradient is 0, not NaN; that of the model alone does not underflow."""
    lm = make(weight=weight, k=2)
    lm.build(tokens, window=16)
    with torch.no_grad():
        lm.model.dense.bias[3] += sure
    log_p, _ = lm(tokens[None, :20])
    exact = plain(lm, tokens, tokens[:20]).log().float()
    torch.testing.assert_close(log_p[0], exact, rtol=1e-4, atol=1e-3)
    seen = log_p[0].detach().isfinite()
    assert seen.all() == (weight < 1)
    log_p[0][seen].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in lm.model.parameters())
    assert (lm.evaluate(tokens[:50], window=16) < math.inf) or weight == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("similarity", ["l2", "dot", "cosine"])
def test_numbers_are_chosen_by_the_score_that_evaluate_gives(tokens, dtype, similarity):
    """Also where the datastore has 16 bits and a temperature far above the best one is among those to choose from."""
    lm = make(dtype, similarity=similarity)
    lm.build(tokens, window=16)
    alone = lm.tune(tokens[:50], k=(4,), temperature=(0.001,), weight=(0.5,), window=16)
    best = lm.tune(tokens[:50], k=(4, 64), temperature=(0.001, 10.0), weight=(0.5,), window=16)
    assert best <= alone * (1 + 1e-4) and best == pytest.approx(lm.evaluate(tokens[:50], window=16), rel=1e-4)
    lm.k, lm.temperature = 8, 0.1
    log_p, _ = lm(tokens[None, :16])
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(1, 16), rtol=1e-5, atol=1e-5)
    by_call = -log_p[0].gather(1, tokens[1:17, None]).mean().item() / math.log(2)
    assert lm.evaluate(tokens[:17], window=16) == pytest.approx(by_call, rel=1e-2 if dtype == torch.bfloat16 else 2e-3)


class Stopped(Exception):
    pass


def test_a_build_that_was_stopped_goes_on(tokens):
    def stop(done, total):
        seen.append((done, total))
        if done >= 64:
            raise Stopped

    whole, lm, seen = make(torch.bfloat16), make(torch.bfloat16), []
    whole.build(tokens, window=16, batch=2)
    with pytest.raises(Stopped):
        lm.build(tokens, window=16, batch=2, progress=stop)
    assert seen == [(0, 143), (32, 143), (64, 143)] and len(lm.store) == 64
    later = []
    assert lm.build(tokens, window=16, batch=4, progress=lambda *at: later.append(at)) == 143
    assert later[0] == (64, 143) and later[-1] == (143, 143)
    assert lm.build(tokens, window=16, progress=lambda *at: later.append(at)) == 143 and later[-1] == (143, 143)
    a, b = (model.store.retrieve(torch.arange(143))[0] for model in (lm, whole))
    assert torch.equal(a["token"], b["token"]) and torch.equal(a["token"], tokens[1:])
    torch.testing.assert_close(a["hidden"], b["hidden"], rtol=0.02, atol=0.01)
    assert lm.evaluate(tokens[:50]) == pytest.approx(whole.evaluate(tokens[:50]), rel=0.02)


def test_a_datastore_on_disk_goes_on_in_another_process(tokens, tmp_path):
    model = make().model

    def stop(done, total):
        if done >= 96:
            raise Stopped

    lm = KnnLM(model, KnnLM.datastore(model, tmp_path / "rows"))
    with pytest.raises(Stopped):
        lm.build(tokens, window=16, batch=2, progress=stop)
    lm.store.store([10**6], {"hidden": torch.zeros(1, 8), "token": torch.zeros(1, dtype=torch.int64)})  # not committed
    lm.store.close()
    lm = KnnLM(model, KnnLM.datastore(model, tmp_path / "rows"), k=5, temperature=0.1)
    assert len(lm.store) == 96
    lm.build(tokens, window=16, batch=2)
    whole = make()
    whole.build(tokens, window=16, batch=2)
    assert lm.evaluate(tokens[:50]) == pytest.approx(whole.evaluate(tokens[:50]))
    lm.store.close()


def test_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["knn_lm", "--steps", "3", "--rows", "2000", "--characters", "300"])
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "examples" / "knn_lm.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "datastore of 2,000 rows" in out and "perplexity of 300 held-out characters" in out and "gain: " in out


def test_rows_of_another_text_or_model_are_refused(tokens):
    lm = make()
    lm.build(tokens, window=16)
    with pytest.raises(ValueError, match="store: expected rows of this model, text and window, got others in rows 0 to 15"):
        lm.build(tokens.flip(0), window=16)
    with pytest.raises(ValueError, match=r"KnnLM.build: store: expected whole windows of 16 of the 49 rows of this text, got 143 rows"):
        lm.build(tokens[:50], window=16)
    torch.manual_seed(1)
    other = KnnLM(MemoryLM(lm.model.vocabulary, hidden=8, embedding=6, slots=4, width=4, read_heads=1), lm.store)
    with pytest.raises(ValueError, match="store: expected rows of this model"):
        other.build(tokens, window=16)
    lm.store.erase([40])
    with pytest.raises(ValueError, match="KnnLM: store: expected rows 0 to 141, got none of number 40"):
        lm.evaluate(tokens)


MODEL = make().model


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KnnLM(torch.nn.Linear(2, 2), None), TypeError, r"KnnLM: model: expected a model with hidden\(\), got Linear"),
        (lambda: KnnLM(MODEL, {}), TypeError, "KnnLM: store: expected a KeyValueStore, got dict"),
        (lambda: KnnLM(MODEL, KeyValueStore(3)), ValueError, "columns 'hidden', 'token', got int64 keys and columns 'value'"),
        (lambda: KnnLM(MODEL, KnnLM.datastore(MODEL, dtype=torch.int8)), ValueError, "store: expected columns 'hidden' .H. of a floating"),
        (lambda: make().neighbours(torch.zeros(1, 8), 2, 1.0), ValueError, "KnnLM: store: expected rows .build fills it., got none"),
        (lambda: make().tune(torch.zeros(4, dtype=torch.int64), k=(-3, 4)), ValueError, "KnnLM.tune: k: expected 1 to 4096, got -3"),
        (lambda: make().tune(torch.zeros(4, dtype=torch.int64), k=(2.5, 4)), TypeError, "KnnLM.tune: k: expected an integer, got float"),
        (lambda: make(k=0), ValueError, "KnnLM: k: expected 1 to 4096, got 0"),
        (lambda: make(weight=1.5), ValueError, r"KnnLM: weight: expected a number in \[0, 1\], got 1.5"),
        (lambda: make(temperature=0), ValueError, "KnnLM: temperature: expected a number above 0, got 0"),
        (lambda: make(similarity="l1"), ValueError, "similarity: expected one of 'l2', 'dot', 'cosine', got 'l1'"),
        (lambda: make().evaluate(torch.zeros(4, dtype=torch.int64)), ValueError, "store: expected rows .build fills it., got none"),
        (lambda: make().evaluate(torch.zeros(1, dtype=torch.int64)), ValueError, "tokens: expected at least 2 tokens, got 1"),
        (lambda: make().build(torch.zeros(2, 2)), ValueError, r"KnnLM.build: tokens: expected 1 dimensions \[L\]"),
        (lambda: make().tune(torch.zeros(4, dtype=torch.int64), k=()), ValueError, "KnnLM.tune: k: expected at least one value, got none"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_an_empty_text_builds_nothing(tokens):
    lm = make()
    assert lm.build(tokens[:1]) == 0 and len(lm.store) == 0 and lm(tokens[None, :3])[0].isfinite().all()

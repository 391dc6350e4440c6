"""`KnnLM`: a language model that also looks up what followed the most similar contexts of a text, kept in a key-value store."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memkernels._checks import check_choice, check_number, fail
from memkernels.models.memory_lm import check_tokens, evaluated, windows
from memkernels.nn._arguments import check_probability, check_sizes
from memkernels.ops.topk_read import check_slots, topk_read
from memkernels.store import KeyValueStore
from memkernels.store.interrupts import uninterrupted
from memkernels.store.log import Log

NAME = "KnnLM"
SIMILARITIES = ("l2", "dot", "cosine")
COLUMNS = ("hidden", "token")
ROWS_AT_ONCE = 1 << 16  # of the store, where it is read
COSINE_EPS = 1e-6  # as topk_read has it


class KnnLM(nn.Module):
    """A language model with a datastore: ``p = weight p_kNN + (1 - weight) p_LM``.

    The datastore holds one row a position of a text: the hidden state of the model there, and the token that came next. At each step the
    ``k`` rows most similar to the own hidden state are found (exactly, by `topk_read`), and
    ``p_kNN(v) = sum over those rows with token v of softmax(similarity / temperature)``. The model itself is not changed, and a datastore
    of another text needs no training.

    Args:
        model: a `MemoryLM` or any module with ``hidden(tokens "B T", state) -> ("B T H", state)`` and ``dense``, "B T H" to logits.
        store: the datastore, int64 keys 0, 1, ... and columns "hidden" "H" and "token" (see `datastore`); filled by `build`. What it holds
            is copied once, when it is first searched.
        k: rows of a search, 1 to 4096.
        weight: of p_kNN, the paper's lambda, 0 to 1.
        temperature: the similarities are divided by it.
        similarity: "l2" (minus the squared distance), "dot" or "cosine".

    Gradients: of the logarithms of p to the model's parameters, through the queries too; the datastore is constant.
    Raises: ValueError, TypeError for arguments that do not fit, and for a store of other columns or rows.
    Source: Khandelwal et al., Generalization through Memorization: Nearest Neighbor Language Models (2020), equations 2 and 3.

    Example:
        >>> from memkernels.models import KnnLM, MemoryLM, Vocabulary
        >>> model = MemoryLM(Vocabulary.of("hello world"), hidden=16)
        >>> lm = KnnLM(model, KnnLM.datastore(model), k=4)
        >>> lm.build(model.vocabulary.encode("hello world, hello world"))
        23
        >>> log_p, state = lm(model.vocabulary.encode("hello")[None])
        >>> log_p.shape
        torch.Size([1, 5, 9])
    """

    def __init__(
        self, model: nn.Module, store: KeyValueStore, *, k: int = 64, weight: float = 0.25, temperature: float = 1.0, similarity: str = "l2"
    ) -> None:
        super().__init__()
        for part in ("hidden", "dense"):
            if not callable(getattr(model, part, None)):
                fail(NAME, "model", f"a model with {part}()", type(model).__name__, TypeError)
        _check_store(store)
        check_slots(NAME, k)
        check_choice(NAME, "similarity", similarity, SIMILARITIES)
        check_probability(NAME, "weight", weight)
        self.model: Any = model
        self.store, self.k, self.weight = store, k, float(weight)
        self.temperature, self.similarity = _temperature(temperature), similarity
        self._rows: tuple[Tensor, Tensor] | None = None  # the datastore, once it was read

    @staticmethod
    def datastore(model: Any, path: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None) -> KeyValueStore:
        """A store for the rows of `model`: in memory, or at `path`, opened if it is there.

        Args:
            dtype: of the hidden states in it, those of the model if None; bfloat16 is half the bytes and the faster search.
        """
        if path is not None and Log.exists(path):
            return KeyValueStore.open(path, mode="w")
        weight = model.dense.weight
        assert isinstance(weight, Tensor)
        columns = {"hidden": ((weight.shape[1],), dtype or weight.dtype), "token": ((), torch.int64)}
        return KeyValueStore(columns=columns, path=path)

    @torch.no_grad()
    def build(self, tokens: Tensor, *, window: int = 128, batch: int = 32, progress: bool | Callable[[int, int], None] = False) -> int:
        """Adds the positions of `tokens` "L" to the store; one that was interrupted goes on where it stopped.

        Hidden states are those of windows of `window` steps, each from an empty state, `batch` of them at a time; the rows of a batch are
        committed together. Rows that are there already are kept, after the first and the last of their windows were computed again.

        Args:
            progress: True shows a progress bar on stderr; or a function that is called with (rows that are there, all rows).

        Returns: the number of rows, L - 1.
        Raises: ValueError if the rows in the store are not those of this model and text.
        """
        check_tokens(f"{NAME}.build", tokens, 1, "[L]")
        check_sizes(f"{NAME}.build", window=window, batch=batch)
        total, done = max(0, len(tokens) - 1), len(self.store)
        if done > total or (done % window and done != total):
            fail(f"{NAME}.build", "store", f"whole windows of {window} of the {total} rows of this text", f"{done} rows")
        with evaluated(self.model), _reporter(progress) as report:
            self._check_rows(tokens, done, window)
            report(done, total)
            for piece in windows(tokens[done:], window, batch) if done < total else []:
                hidden, _ = self.model.hidden(self._placed(piece[:, :-1]))
                rows = torch.arange(done, done + hidden.shape[0] * hidden.shape[1])
                columns = {"hidden": hidden.flatten(0, 1).to(self._dtype()).cpu(), "token": piece[:, 1:].flatten().long().cpu()}
                with uninterrupted():  # rows that are there and not committed would be taken for committed ones by the next build
                    self.store.store(rows, columns)
                    self.store.commit()
                done += len(rows)
                report(done, total)
        self._rows = None
        return total

    def _check_rows(self, tokens: Tensor, done: int, window: int) -> None:
        """The first and the last window in the store are what this model makes of this text."""
        first_of_last = max(0, (done - 1) // window * window)
        for first in sorted({0, first_of_last} if done else ()):
            last = min(first + window, done)
            hidden, token = self._read(first, last)
            found, _ = self.model.hidden(self._placed(tokens[None, first:last]))
            near = torch.allclose(found[0].cpu().float(), hidden.float(), rtol=0.02, atol=0.02 * float(hidden.float().abs().max()))
            if not near or not torch.equal(token, tokens[first + 1 : last + 1].long().cpu()):
                fail(f"{NAME}.build", "store", "rows of this model, text and window", f"others in rows {first} to {last - 1}")

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logarithms of the probabilities "B T V" of the next token after each of `tokens` "B T", and the model's state after them."""
        hidden, state = self.model.hidden(tokens, state)
        log_lm = torch.log_softmax(self.model.dense(hidden).float(), -1)
        if not self.weight or not len(self.store):
            return log_lm, state
        weights, found = self.neighbours(hidden.flatten(0, 1), self.k, self.temperature)
        p = torch.zeros_like(log_lm).flatten(0, 1).scatter_add(1, found, weights).view_as(log_lm)
        return _mixed(log_lm, p, self.weight), state

    def neighbours(self, hidden: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Of the k rows nearest to each of "Q H", nearest first: shares "Q k" of p_kNN, float32, and tokens "Q k".

        Where the store has fewer rows, the last shares are 0.
        """
        shares, index = self._search(hidden, k, temperature)
        shares = shares.float()  # of 16 bits they add up to 1 only nearly
        return shares / shares.sum(1, keepdim=True), self._loaded(hidden.device)[1][index.clamp(min=0)]

    def _search(self, hidden: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Shares "Q k" in the dtype of the datastore, and numbers "Q k" of the rows, nearest first; -1 where the store has fewer."""
        if not len(self.store):
            fail(NAME, "store", "rows (build fills it)", "none")
        keys, _ = self._loaded(hidden.device)
        _, shares, index = topk_read(
            hidden.to(keys.dtype)[None], keys, keys[:, :1], k, similarity=self.similarity, scale=1 / _temperature(temperature)
        )
        return shares[0], index[0]

    def _similarities(self, hidden: Tensor, index: Tensor) -> Tensor:
        """ "Q k" of "Q H" and the rows "Q k": in float32 at least, so that any temperature may follow; -inf where there is no row."""
        keys, _ = self._loaded(hidden.device)
        exact = torch.promote_types(keys.dtype, torch.float32)
        queries, found = hidden.to(keys.dtype).to(exact), []
        at_once = max(1, ROWS_AT_ONCE * 128 // (index.shape[1] * keys.shape[1]))
        for query, rows in zip(queries.split(at_once), index.split(at_once)):
            near = keys[rows.clamp(min=0)].to(exact)
            if self.similarity == "l2":
                found.append((near - query[:, None]).square_().sum(-1).neg_())
            else:
                found.append((near @ query[:, :, None])[..., 0])
                if self.similarity == "cosine":
                    found[-1] /= (near.square().sum(-1) + COSINE_EPS).sqrt() * (query.square().sum(-1, keepdim=True) + COSINE_EPS).sqrt()
        return torch.cat(found).masked_fill(index < 0, -math.inf)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, window: int = 128, batch: int = 32) -> float:
        """Bits per token over `tokens` "L", of which every one but the first is predicted once, from within its window of steps."""
        log_lm, near, hit = self._scored(tokens, window, batch, self.k)
        return _bits(log_lm, (torch.softmax(near / self.temperature, 1) * hit).sum(1), self.weight)

    @torch.no_grad()
    def tune(
        self,
        tokens: Tensor,
        *,
        k: Iterable[int] = (16, 64, 256),
        temperature: Iterable[float] = (0.1, 0.3, 1.0, 3.0, 10.0),
        weight: Iterable[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        window: int = 128,
        batch: int = 32,
    ) -> float:
        """Sets `k`, `temperature` and `weight` to those, of all combinations, that score best on `tokens` "L"; returns that score.

        The rows are searched once, for the largest k. Take text that neither the model nor the datastore has seen.
        """
        ks, temperatures, weights = list(k), list(temperature), list(weight)
        for name, given in (("k", ks), ("temperature", temperatures), ("weight", weights)):
            if not given:
                fail(f"{NAME}.tune", name, "at least one value", "none")
            for value in given:
                CHECKS[name](f"{NAME}.tune", value)
        log_lm, near, hit = self._scored(tokens, window, batch, max(ks))
        best = (math.inf, self.k, self.temperature, self.weight)
        for rows, warmth in itertools.product(ks, temperatures):
            p = (torch.softmax(near[:, :rows] / warmth, 1) * hit[:, :rows]).sum(1)
            for part in weights:
                best = min(best, (_bits(log_lm, p, part), rows, warmth, part))
        score, self.k, self.temperature, self.weight = best[0], best[1], float(best[2]), float(best[3])
        return score

    def _scored(self, tokens: Tensor, window: int, batch: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of every token that is predicted: log p_LM "Q", the similarities of its neighbours "Q k", and which of them have that token."""
        check_tokens(f"{NAME}.evaluate", tokens, 1, "[L]")
        check_sizes(f"{NAME}.evaluate", window=window, batch=batch)
        if len(tokens) < 2:
            fail(f"{NAME}.evaluate", "tokens", "at least 2 tokens", len(tokens))
        found = []
        with evaluated(self.model):
            for piece in windows(tokens, window, batch):
                hidden, _ = self.model.hidden(self._placed(piece[:, :-1]))
                hidden, target = hidden.flatten(0, 1), self._placed(piece[:, 1:]).flatten().long()[:, None]
                log_lm = torch.log_softmax(self.model.dense(hidden).float(), -1).gather(1, target)[:, 0]
                _, index = self._search(hidden, k, 1.0)
                token = self._loaded(hidden.device)[1][index.clamp(min=0)]
                found.append((log_lm, self._similarities(hidden, index), token == target))
        log_lm, near, hit = (torch.cat(parts) for parts in zip(*found))
        return log_lm, near, hit

    def _loaded(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """All hidden states "N H" and tokens "N" of the store, on a device; read once."""
        rows = len(self.store)
        if self._rows is None or len(self._rows[1]) != rows or self._rows[1].device != device:
            self._rows = None
            hidden = torch.empty(rows, *self.store.columns["hidden"][0], dtype=self._dtype(), device=device)
            token = torch.empty(rows, dtype=torch.int64, device=device)
            for first in range(0, rows, ROWS_AT_ONCE):
                last = min(rows, first + ROWS_AT_ONCE)
                hidden[first:last], token[first:last] = self._read(first, last)
            self._rows = hidden, token
        return self._rows

    def _read(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Rows first to last - 1 of the store."""
        values, found = self.store.retrieve(torch.arange(first, last))
        if not found.all():
            fail(NAME, "store", f"rows 0 to {len(self.store) - 1}", f"none of number {first + int(found.long().argmin())}")
        return values["hidden"], values["token"]

    def _dtype(self) -> torch.dtype:
        return self.store.columns["hidden"][1]

    def _placed(self, tokens: Tensor) -> Tensor:
        return tokens.to(next(self.model.parameters()).device)

    def extra_repr(self) -> str:
        return f"k={self.k}, weight={self.weight}, temperature={self.temperature}, similarity={self.similarity!r}"


def _check_store(store: Any) -> None:
    if not isinstance(store, KeyValueStore):
        fail(NAME, "store", "a KeyValueStore", type(store).__name__, TypeError)
    if store.key_type != "int64" or set(store.columns) != set(COLUMNS):
        fail(
            NAME,
            "store",
            "int64 keys and columns 'hidden', 'token'",
            f"{store.key_type} keys and columns {', '.join(map(repr, store.columns))}",
        )

    (shape, dtype), token = (store.columns[name] for name in COLUMNS)
    if len(shape) != 1 or not dtype.is_floating_point or token != ((), torch.int64):
        fail(NAME, "store", "columns 'hidden' \"H\" of a floating dtype and 'token' of single int64", f"{store.columns}")


def _temperature(got: Any, op: str = NAME) -> float:
    value = float(check_number(op, "temperature", got))
    if not 0 < value < math.inf:
        fail(op, "temperature", "a number above 0", got)
    return value


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "k": check_slots,
    "temperature": lambda op, got: _temperature(got, op),
    "weight": lambda op, got: check_probability(op, "weight", got),
}


def _mixed(log_lm: Tensor, p: Tensor, weight: float) -> Tensor:
    """log(weight p + (1 - weight) exp(log_lm)): neither part underflows, and a token that no row has takes no gradient, not NaN."""
    if not weight:
        return log_lm
    there = p > 0
    log_p = (torch.where(there, p, 1.0).log() + math.log(weight)).masked_fill(~there, -math.inf)
    return log_p if weight == 1 else torch.logaddexp(log_p, log_lm + math.log1p(-weight))


def _bits(log_lm: Tensor, p: Tensor, weight: float) -> float:
    return -_mixed(log_lm.double(), p.double(), weight).mean().item() / math.log(2)


@contextmanager
def _reporter(progress: bool | Callable[[int, int], None]) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total): what was asked for."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("rows of the datastore", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

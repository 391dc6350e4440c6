"""`MemoryLM`: character language models with attention over their past or with an external memory."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels._checks import check_choice, check_number, check_tensor, fail
from memkernels.models import checkpoint
from memkernels.models.vocabulary import UNKNOWN, Vocabulary
from memkernels.nn._arguments import check_integers, check_probability, check_sizes
from memkernels.nn.external_memory import MODES, ExternalMemory
from memkernels.nn.lstm import LSTM
from memkernels.ops.attention import attention

MODELS = ("attention", "memory")
NO_TOKEN = -(2**30)  # what the loss leaves out; torch's own -100 would hide a wrong token


@dataclasses.dataclass(frozen=True)
class MemoryLMConfig:
    """Sizes of a `MemoryLM`: embedding E, hidden H, attention heads and how far they look back, memory slots N, width W, read heads R."""

    model: str = "memory"
    embedding: int = 64
    hidden: int = 256
    heads: int = 4
    context: int = 1024
    slots: int = 64
    width: int = 32
    read_heads: int = 4
    mode: str = "content"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_choice("MemoryLM", "model", self.model, MODELS)
        check_choice("MemoryLM", "mode", self.mode, MODES)
        sizes = dict(embedding=self.embedding, hidden=self.hidden, heads=self.heads, context=self.context)
        check_sizes("MemoryLM", **sizes, slots=self.slots, width=self.width, read_heads=self.read_heads)
        check_probability("MemoryLM", "dropout", self.dropout)


class CausalAttention(nn.Module):
    """``x + W_o attention(W_q x, W_k x, W_v x)`` over the last `context` steps up to and including the own one."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"MemoryLM: heads: expected a divisor of hidden={width}, got {heads}")
        self.heads, self.context = heads, context
        self.project, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attends "B T H"; `state` holds keys and values "B NH K D" of the steps before."""
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if state is not None:
            key, value = torch.cat([state[0], key], 2), torch.cat([state[1], value], 2)
        window = None if key.shape[2] <= self.context else (self.context - 1, -1)
        heads: Any = attention(query, key, value, is_causal=True, causal="bottom-right", window=window)
        kept = (key[:, :, -self.context :], value[:, :, -self.context :])
        return x + self.output(heads.transpose(1, 2).flatten(2)), kept


class MemoryLM(nn.Module):
    """A character language model: Embedding - LSTM - attention - LSTM - Dense, or Embedding - LSTM - ExternalMemory - Dense.

    In the first, attention and the second LSTM are each added to their input. Logits at step t depend on tokens up to t only. A state
    carries the past from call to call, so text is generated one step at a time.

    Args:
        vocabulary: the characters it knows; see `Vocabulary.of`.
        model: "attention" or "memory".
        sizes: the fields of `MemoryLMConfig`.

    Raises: ValueError for an unknown model or sizes that do not fit; TypeError for an argument of another type.

    Example:
        >>> model = MemoryLM(Vocabulary.of("hello world"), model="memory", hidden=16)
        >>> logits, state = model(model.vocabulary.encode("hello")[None])
        >>> logits.shape
        torch.Size([1, 5, 9])
        >>> len(model.generate("hell", length=3, seed=0))
        3
    """

    def __init__(self, vocabulary: Vocabulary, model: str = "memory", **sizes: Any) -> None:
        super().__init__()
        if not isinstance(vocabulary, Vocabulary):
            fail("MemoryLM", "vocabulary", "a Vocabulary", type(vocabulary).__name__, TypeError)
        known = [f.name for f in dataclasses.fields(MemoryLMConfig)]
        if strange := [name for name in sizes if name not in known]:
            fail("MemoryLM", "sizes", f"names among {', '.join(known)}", repr(strange[0]), TypeError)
        self.vocabulary, self.config = vocabulary, MemoryLMConfig(model, **sizes)
        c = self.config
        self.embedding = nn.Embedding(len(vocabulary), c.embedding)
        self.lstm = LSTM(c.embedding, c.hidden, batch_first=True)
        if model == "attention":
            self.attention, self.second = CausalAttention(c.hidden, c.heads, c.context), LSTM(c.hidden, c.hidden, batch_first=True)
        else:
            self.memory = ExternalMemory(c.hidden, c.slots, c.width, c.read_heads, c.mode)
        self.dense = nn.Linear(c.hidden, len(vocabulary))

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits "B T V" of the next token after each of `tokens` "B T" int64, and the state after them."""
        x, state = self.hidden(tokens, state)
        return self.dense(x), state

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """What `dense` makes logits of, "B T H", and the state after the last token."""
        check_tokens("MemoryLM", tokens, 2, "[B T]")
        if state is not None and not (isinstance(state, tuple) and len(state) == 3):
            fail("MemoryLM", "state", "what the last call returned, or None", type(state).__name__, TypeError)
        if state is not None:
            self._check_state(state, tokens.shape[0])
        first, middle, last = (None, None, None) if state is None else state
        try:
            x = self.embedding(tokens)
        except IndexError:
            self._refuse_unknown(tokens)
            raise
        x, first = self.lstm(x, first)
        x = F.dropout(x, self.config.dropout, self.training)
        if self.config.model == "attention":
            x, middle = self.attention(x, middle)
            # Without this sum the stack stays at the entropy of single characters for its first hundreds of steps.
            y, last = self.second(x, last)
            x = x + y
        else:
            x, middle = self.memory(x, middle)
        return F.dropout(x, self.config.dropout, self.training), (first, middle, last)

    def _check_state(self, state: tuple[Any, Any, Any], batch: int) -> None:
        """Its parts have the sizes of this model and of this batch."""
        c = self.config
        cells: dict[str, tuple[Any, ...]] = dict(h=(1, batch, c.hidden), c=(1, batch, c.hidden))
        if c.model == "attention":
            past = (batch, c.heads, None, c.hidden // c.heads)
            middle: dict[str, tuple[Any, ...]] = dict(key=past, value=past)
        else:
            middle = dict(memory=(batch, c.slots, c.width))
            middle |= dict(weights=(batch, c.read_heads + 1, c.slots)) if c.mode == "ntm" else {}
        for part, sizes in zip(state, (cells, middle, cells if c.model == "attention" else {}), strict=True):
            if part is None:
                continue
            if not isinstance(part, (tuple, list)) or len(part) < len(sizes):
                fail("MemoryLM", "state", f"tensors {', '.join(sizes)}", type(part).__name__, TypeError)
            for tensor, (name, shape) in zip(part, sizes.items()):
                check_tensor("MemoryLM", f"state: {name}", tensor)
                if len(shape) != tensor.dim() or any(size not in (None, got) for size, got in zip(shape, tensor.shape)):
                    text = ", ".join("K" if size is None else str(size) for size in shape)
                    fail("MemoryLM", "state", f"{name} of shape ({text})", tuple(tensor.shape))

    def _refuse_unknown(self, tokens: Tensor) -> None:
        known = len(self.vocabulary)
        for token in tokens.flatten().tolist():
            if not 0 <= token < known:
                fail("MemoryLM", "tokens", f"0 to {known - 1}", token)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of tokens[:, 1:] given what precedes them in `tokens` "B T+1"."""
        check_tokens("MemoryLM", tokens, 2, "[B T+1]")
        if tokens.shape[0] < 1 or tokens.shape[1] < 2:
            fail("MemoryLM", "tokens", "[B T+1] with B and T of at least 1", f"shape {tuple(tokens.shape)}")
        logits, _ = self(tokens[:, :-1])
        try:
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long(), ignore_index=NO_TOKEN)
        except IndexError:
            self._refuse_unknown(tokens)
            raise

    def train_step(self, tokens: Tensor, optimizer: torch.optim.Optimizer, clip: float = 1.0) -> float:
        """One optimizer step on `tokens` "B T+1", with the norm of the gradient clipped; returns the loss in bits per character."""
        self.train()
        loss = self.loss(tokens)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), clip)
        optimizer.step()
        return loss.item() / math.log(2)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, window: int = 128, batch: int = 32) -> float:
        """Bits per character over `tokens` "L" (L >= 2): every token but the first is predicted once, from within its window of steps."""
        check_tokens("MemoryLM.evaluate", tokens, 1, "[L]")
        check_sizes("MemoryLM.evaluate", window=window, batch=batch)
        if len(tokens) < 2:
            raise ValueError(f"MemoryLM.evaluate: tokens: expected at least 2 tokens, got {len(tokens)}")
        with evaluated(self):
            total = sum(self.loss(piece).item() * (piece.shape[1] - 1) * piece.shape[0] for piece in windows(tokens, window, batch))
        return total / (len(tokens) - 1) / math.log(2)

    @torch.no_grad()
    def generate(self, prompt: str = "", length: int = 200, temperature: float = 1.0, top_p: float = 1.0, seed: int | None = None) -> str:
        """Continues a prompt by `length` characters, drawn one at a time.

        Args:
            prompt: any text; characters the model does not know count as the unknown token. Empty: starts as after a line end.
            temperature: logits are divided by it; 0 takes the most probable character.
            top_p: draws only from the smallest set of characters whose probability reaches it; 0 < top_p <= 1.
            seed: of the draws; the global generator is used without it.

        Returns: the continuation, without the prompt; never contains the unknown token.
        """
        check_integers("MemoryLM.generate", length=length, **({} if seed is None else {"seed": seed}))
        check_number("MemoryLM.generate", "temperature", temperature)
        check_number("MemoryLM.generate", "top_p", top_p)
        if not (0 <= temperature < math.inf and 0 < top_p <= 1 and length >= 0):
            got = f"temperature={temperature}, top_p={top_p}, length={length}"
            raise ValueError(f"MemoryLM.generate: expected temperature >= 0, 0 < top_p <= 1 and length >= 0, got {got}")
        if len(self.vocabulary) < 2:
            raise ValueError("MemoryLM.generate: the vocabulary has no characters")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        device = self.dense.weight.device
        tokens, state, drawn = self.vocabulary.encode(prompt or "\n")[None].to(device), None, []
        with evaluated(self):
            for _ in range(length):
                logits, state = self(tokens, state)
                token = _draw(logits[0, -1].double().cpu(), temperature, top_p, generator)
                drawn.append(token)
                tokens = torch.tensor([[token]], device=device)
        return self.vocabulary.decode(drawn)

    def save(self, path: str | os.PathLike[str], extra: dict[str, Tensor] | None = None, training: Any = None) -> None:
        """Writes weights, configuration and vocabulary to one safetensors file, in one step.

        Args:
            path: file name. extra: more tensors, e.g. an optimizer's. training: more JSON-serialisable values.
        """
        tensors = {f"model.{name}": t for name, t in self.state_dict().items()} | (extra or {})
        header = {"config": dataclasses.asdict(self.config), "vocabulary": "".join(self.vocabulary.characters), "training": training}
        checkpoint.write(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: Any = None) -> MemoryLM:
        """The model that `save` wrote, in its dtype. Raises ValueError, one line, for a file that is not one; FileNotFoundError."""
        return cls.load_with_extra(path, device)[0]

    @classmethod
    def load_with_extra(cls, path: str | os.PathLike[str], device: Any = None) -> tuple[MemoryLM, dict[str, Tensor], Any]:
        """The model, the extra tensors and the extra values that `save` wrote."""
        tensors, header = checkpoint.read(path)
        try:
            model = cls(Vocabulary(header["vocabulary"]), **header["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: the header does not describe a MemoryLM ({error})") from None
        weights = {name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
        expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        got = {name: tuple(t.shape) for name, t in weights.items()}
        if expected != got:
            name = next(n for n in [*expected, *got] if expected.get(n) != got.get(n))
            raise ValueError(f"{path}: {name}: expected shape {expected.get(name)}, got {got.get(name)}")
        if strange := [name for name, t in weights.items() if not t.is_floating_point()]:
            raise ValueError(f"{path}: {strange[0]}: expected a floating dtype, got {weights[strange[0]].dtype}")
        model.load_state_dict(weights, assign=True)  # as they are: copied into the new model's they would become float32
        return model.to(device), tensors, header.get("training")


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Inside, the model drops nothing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def windows(tokens: Tensor, window: int, batch: int) -> list[Tensor]:
    """Up to `batch` windows "B T+1" at a time, so that every token of "L" but the first is the next one of some step once."""
    whole = (len(tokens) - 1) // window
    pieces = list(tokens[: whole * window + 1].unfold(0, window + 1, window).split(batch)) if whole else []
    rest = tokens[whole * window :]
    return pieces + ([rest[None]] if len(rest) > 1 else [])


def check_tokens(owner: str, tokens: Any, rank: int, dims: str) -> None:
    check_tensor(owner, "tokens", tokens)
    if tokens.dim() != rank:
        fail(owner, "tokens", f"{rank} dimensions {dims}", f"shape {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        fail(owner, "tokens", "int64", tokens.dtype, TypeError)


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    logits[UNKNOWN] = -math.inf
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax((logits - logits.max()) / temperature, -1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])

"""Multi-query associative recall (Arora et al., Zoology, 2023): 4 key-value pairs, then 4 queries among noise; which value had each key?

The published setting of 64 tokens and 4 pairs: 8192 words, half of them keys, half values. Attention is published to recall about 100%.
The model: embedding, a causal convolution over 3 tokens (so that a place knows the key before its value), one memory, logits by the
embedding. "attention" is causal attention over all 64 tokens; "topk" reads the 8 best of the places so far with `topk_read`, for the 4
queries alone: with one layer no other place's read is asked for.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels.cli.errors import diverged
from memkernels.ops.attention import attention
from memkernels.ops.topk_read import topk_read

WORDS, LENGTH, PAIRS = 8192, 64, 4
MODELS = ("attention", "topk")
PUBLISHED = "zoology: attention recalls about 100%"
TARGET = 0.99


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens "B 64", places of the queries "B 4" and the value that each asks for "B 4"."""
    half = WORDS // 2
    keys = torch.rand(batch, half - 1, generator=generator).topk(PAIRS).indices + 1
    values = torch.rand(batch, half, generator=generator).topk(PAIRS).indices + half
    tokens = torch.randint(1, WORDS, (batch, LENGTH), generator=generator)
    tokens[:, : 2 * PAIRS] = torch.stack((keys, values), -1).flatten(1)
    # Gaps between pairs and queries by a power law, as published: most queries come early.
    rest = LENGTH // 2 - PAIRS
    odds = 0.01 * torch.arange(1, rest + 1, dtype=torch.float64) ** (0.01 - 1)
    places = 2 * PAIRS + 2 * torch.multinomial(odds.expand(batch, -1), PAIRS, generator=generator)
    return tokens.scatter(1, places, keys), places, values


class Recall(nn.Module):
    """Logits "B 4 8192" at the places of the queries."""

    def __init__(self, memory: str, width: int = 64) -> None:
        super().__init__()
        self.memory = memory
        self.embedding = nn.Embedding(WORDS, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.mix = nn.Conv1d(width, width, 3, groups=width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.mix(F.pad(x.mT, (2, 0))).mT
        normed = self.norm(x)
        key, value = self.key(normed), self.value(normed)
        if self.memory == "attention":
            heads: Any = attention(self.query(normed)[:, None], key[:, None], value[:, None], is_causal=True)
            read = _rows(heads[:, 0], places)
        else:
            read = _topk(self.query(_rows(normed, places)), key, value, places)
        return (_rows(x, places) + read) @ self.embedding.weight.T


def _rows(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _topk(query: Tensor, key: Tensor, value: Tensor, places: Tensor) -> Tensor:
    """Every query is a batch entry of its own, whose mask ends at its place: causal."""
    batch, asked, width = query.shape
    length = key.shape[1]
    before = (torch.arange(length, device=places.device) <= places[..., None]).flatten(0, 1)

    def rows(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, asked, -1, -1).flatten(0, 1)

    read = topk_read(query.flatten(0, 1)[:, None], rows(key), rows(value), 2 * PAIRS, scale=width**-0.5, mask=before)[0]
    return read.view(batch, asked, width)


@torch.no_grad()
def accuracy(model: nn.Module, generator: torch.Generator, size: int) -> float:
    tokens, places, values = draw(size, generator)
    return float((model(tokens, places).argmax(-1) == values).float().mean())


def run(console: Console, memory: str, seconds: float, seed: int, batch: int, rate: float) -> dict[str, Any]:
    """Trains until 2,000 unseen sequences reach the target or the time is over; prints the accuracy as it goes."""
    torch.manual_seed(seed)
    generator, unseen = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1_000_003)
    model = Recall(memory)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    console.print(f"mqar {LENGTH}/{PAIRS}, memory {memory}, seed {seed}, batches of {batch}; {PUBLISHED}", highlight=False)
    begin, step, right, history = time.monotonic(), 0, 0.0, []
    while time.monotonic() - begin < seconds and right < TARGET:
        tokens, places, values = draw(batch, generator)
        loss = F.cross_entropy(model(tokens, places).flatten(0, 1), values.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if not math.isfinite(loss.item()):
            raise diverged(step, f"a loss of {loss.item()}")
        if step % 100 == 0:
            right = accuracy(model, unseen, 500)
            history.append((step, round(time.monotonic() - begin, 1), right))
            console.print(f"step {step:6d} {history[-1][1]:7.1f} s  loss {loss.item():.4f}  accuracy {right:.4f}", highlight=False)
            if right >= TARGET:
                right = accuracy(model, unseen, 2000)
    if right < TARGET:
        right = accuracy(model, unseen, 2000)
    elapsed, solved = round(time.monotonic() - begin, 1), right >= TARGET
    console.print(
        f"{'solved' if solved else 'not solved'}: accuracy {right:.4f} (target {TARGET}) of 2,000 unseen sequences, "
        f"after {step} steps and {elapsed} s, seed {seed}",
        highlight=False,
    )
    return dict(task="mqar", model=memory, seed=seed, steps=step, seconds=elapsed, accuracy=right, solved=solved, history=history)

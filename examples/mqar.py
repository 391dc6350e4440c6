"""Multi-query associative recall (Arora et al., Zoology, 2023): 4 key-value pairs, then 4 queries among noise; which value had each key?

    python examples/mqar.py [--memory attention|topk] [--steps 1000] [--seed 0]

The published setting of 64 tokens and 4 pairs: 8192 words, half of them keys, half values. Attention is published to recall about 100%.
The model: embedding, a causal convolution over 3 tokens (so that a place knows the key before its value), one memory, logits by the
embedding. "attention" is causal attention over all 64 tokens; "topk" reads the 4 best of all places with `topk_read`: a key is queried
once and labels stand at the pairs alone, so that no place tells the answer of another query.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

import memkernels as mk

WORDS, LENGTH, PAIRS = 8192, 64, 4


def draw(batch, generator):
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
    def __init__(self, memory, width=64):
        super().__init__()
        self.memory = memory
        self.embedding = nn.Embedding(WORDS, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.mix = nn.Conv1d(width, width, 3, groups=width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens, places):
        x = self.embedding(tokens)
        x = x + self.mix(F.pad(x.mT, (2, 0))).mT
        normed = self.norm(x)
        query, key, value = self.query(normed), self.key(normed), self.value(normed)
        if self.memory == "attention":
            read = mk.attention(query[:, None], key[:, None], value[:, None], is_causal=True)[:, 0]
        else:
            read, _weights, _index = mk.topk_read(query, key, value, PAIRS)
        asked = (x + read).gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        return asked @ self.embedding.weight.T


def accuracy(model, generator, batches=8):
    model.eval()
    with torch.no_grad():
        right = [(model(t, p).argmax(-1) == v).float().mean() for t, p, v in (draw(256, generator) for _ in range(batches))]
    model.train()
    return torch.stack(right).mean().item()


def main(memory="attention", steps=1000, batch=128, seed=0, rate=3e-3):
    torch.manual_seed(seed)
    generator, held_out = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 10_000)
    model, begin = Recall(memory), time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for step in range(steps):
        tokens, places, values = draw(batch, generator)
        loss = F.cross_entropy(model(tokens, places).flatten(0, 1), values.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    found = accuracy(model, held_out)
    print(f"MQAR 64/4, memory {memory}, seed {seed}: accuracy {found:.4f} (published for attention: about 1.00)")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", choices=("attention", "topk"), default="attention")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.memory, arguments.steps, seed=arguments.seed)

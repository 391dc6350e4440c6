"""Embedding - LSTM - external memory - Dense on text of your own, in plain PyTorch around `memkernels.nn`.

python examples/language_model.py [FILE] [--steps 40]
"""

import argparse
from pathlib import Path

import torch

import memkernels as mk


class Model(torch.nn.Module):
    def __init__(self, symbols: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(symbols, 32)
        self.lstm = mk.nn.LSTM(32, width, batch_first=True)
        self.memory = mk.nn.ExternalMemory(width, slots=32, width=16, read_heads=2, mode="content")
        self.dense = torch.nn.Linear(width, symbols)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.embedding(tokens))
        x, _ = self.memory(x)
        return self.dense(x)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path(__file__), help="UTF-8 text; default: this program")
    parser.add_argument("--steps", type=int, default=40, help="of training")
    args = parser.parse_args(argv)
    text = args.file.read_text(encoding="utf-8")
    symbols = sorted(set(text))
    tokens = torch.tensor([symbols.index(c) for c in text])
    window = min(64, len(tokens) - 1)
    torch.manual_seed(0)
    model = Model(len(symbols))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(args.steps + 1):
        starts = torch.randint(len(tokens) - window, (8, 1))
        batch = tokens[starts + torch.arange(window + 1)]
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: {loss.item() / torch.tensor(2.0).log().item():.2f} bits per character")


if __name__ == "__main__":
    main()

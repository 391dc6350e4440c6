"""A language model with a datastore (kNN-LM) on Python's own documentation: the perplexity of held-out text without and with it.

python examples/knn_lm.py [--steps 500] [--folder FOLDER] [--text FILE ...]

Of every ten blocks of 8,192 characters, eight train a small character model for a short time, and its hidden states there become the rows
of a `memkernels.KeyValueStore`; the ninth helps to choose k, temperature and weight, the tenth is scored. With --folder, model and
datastore are kept there: a run that was stopped goes on where it stood.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.progress import track

from memkernels.cli.texts import python_documentation, read_texts
from memkernels.models import KnnLM, MemoryLM, Vocabulary


def trained(text: str, steps: int) -> MemoryLM:
    """Embedding - LSTM - external memory - Dense; the learning rate rises over 20 steps and falls to nothing."""
    torch.manual_seed(0)
    model = MemoryLM(Vocabulary.of(text), mode="store", hidden=128, slots=32, width=16, read_heads=2)
    tokens = model.vocabulary.encode(text)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    begin = time.monotonic()
    for step in track(range(steps), "training"):
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(len(tokens) - 64, (32, 1))
        model.train_step(tokens[starts + torch.arange(65)], optimizer)
    print(f"trained for {steps} steps, {time.monotonic() - begin:.0f} s")
    return model


def parts(text: str) -> tuple[str, str, str]:
    """Blocks to train on, to choose with, and to score."""
    blocks = [text[i : i + 8192] for i in range(0, len(text), 8192)]
    chosen = [i for i in range(len(blocks)) if i % 10 == 8], [i for i in range(len(blocks)) if i % 10 == 9]
    train = [i for i in range(len(blocks)) if i % 10 < 8]
    return tuple("".join(blocks[i] for i in part) for part in (train, *chosen))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="*", help="UTF-8 files instead of Python's documentation")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--characters", type=int, default=10_000, help="of held-out text that are scored")
    parser.add_argument("--rows", type=int, help="at most so many rows of the datastore")
    parser.add_argument("--folder", type=Path, help="where model and datastore are kept")
    args = parser.parse_args()
    text = read_texts(args.text) if args.text else python_documentation()
    seen_text, choosing_text, held_out_text = parts(text)
    saved = args.folder / "model.safetensors" if args.folder else None
    if saved is not None and saved.exists():
        model = MemoryLM.load(saved)
    else:
        model = trained(seen_text, args.steps)
        if saved is not None:
            args.folder.mkdir(parents=True, exist_ok=True)
            model.save(saved)
    seen = model.vocabulary.encode(seen_text)
    choosing, held_out = (model.vocabulary.encode(part)[: args.characters] for part in (choosing_text, held_out_text))

    store = KnnLM.datastore(model, args.folder and args.folder / "datastore", dtype=torch.bfloat16)
    lm, begin = KnnLM(model, store), time.monotonic()
    rows = lm.build(seen if args.rows is None else seen[: args.rows + 1], progress=True)
    print(f"datastore of {rows:,} rows, built in {time.monotonic() - begin:.1f} s")
    begin = time.monotonic()
    lm.tune(choosing, temperature=(0.03, 0.1, 0.3, 1, 3, 10), weight=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    print(f"k {lm.k}, temperature {lm.temperature:g}, weight {lm.weight:g}, chosen on {len(choosing):,} characters")
    without, with_it = model.evaluate(held_out), lm.evaluate(held_out)
    print(f"searched in {time.monotonic() - begin:.1f} s")
    print(f"perplexity of {len(held_out):,} held-out characters: {2**without:.3f} without, {2**with_it:.3f} with the datastore")
    print(f"gain: {100 * (1 - 2 ** (with_it - without)):.1f}% ({without:.3f} and {with_it:.3f} bits per character)")


if __name__ == "__main__":
    main()

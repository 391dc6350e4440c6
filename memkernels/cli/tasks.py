"""The algorithmic tasks of the papers: a memory machine learns to copy, repeat or recall, and is measured against the published target."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels import nn as memories
from memkernels.cli.errors import diverged

# (input "T B I", target "L B O"): the answer is due in the last L steps.
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """One task: its data, the sizes of the machine, and what was published.

    `draw(size, hardest, generator)` gives a batch of `size` sequences, of a drawn difficulty or of the hardest one trained on.
    """

    draw: Callable[[int, bool, torch.Generator], Batch]
    inputs: int
    outputs: int
    machine: dict[str, int]
    published: str
    rate: float = 3e-3  # of learning, unless asked for another
    target: float = 0.01  # wrong bits a sequence

    def model(self, name: str) -> nn.Module:
        sizes: dict[str, Any] = dict(self.machine)
        machine = memories.NTM if name == "ntm" else memories.DNC
        return machine(self.inputs, sizes.pop("hidden"), self.outputs, batch_first=False, **sizes)


def _between(low: int, high: int, hardest: bool, generator: torch.Generator) -> int:
    return high if hardest else int(torch.randint(low, high + 1, (), generator=generator))


def _bits(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float()


def copy(size: int, hardest: bool, generator: torch.Generator) -> Batch:
    """1 to 20 vectors of 8 bits, a mark, then silence for as long as the answer takes."""
    length = _between(1, 20, hardest, generator)
    target = _bits(length, size, 8, generator=generator)
    x = torch.zeros(2 * length + 1, size, 9)
    x[:length, :, :8], x[length, :, 8] = target, 1
    return x, target


def repeat_copy(size: int, hardest: bool, generator: torch.Generator) -> Batch:
    """1 or 2 vectors of 4 bits between a mark and the number of repeats, 1 or 2; the answer ends with a mark of its own."""
    length, repeats = _between(1, 2, hardest, generator), _between(1, 2, hardest, generator)
    bits = _bits(length, size, 4, generator=generator)
    answer = torch.cat([F.pad(bits.repeat(repeats, 1, 1), (0, 1)), F.pad(torch.zeros(1, size, 4), (0, 1), value=1.0)])
    x = torch.zeros(length + 2 + len(answer), size, 6)
    x[0, :, 4], x[1 : length + 1, :, :4], x[length + 1, :, 5] = 1, bits, repeats
    return x, answer


def associative_recall(size: int, hardest: bool, generator: torch.Generator) -> Batch:
    """2 to 6 items of three vectors of 6 bits, each after a mark; then one of them again, and the answer is the item after it."""
    count = _between(2, 6, hardest, generator)
    items = _bits(count, 3, size, 6, generator=generator)
    asked = torch.randint(0, count - 1, (size,), generator=generator)
    every = torch.arange(size)
    x = torch.zeros(4 * count + 4 + 1 + 3, size, 8)
    for i in range(count):
        x[4 * i, :, 6], x[4 * i + 1 : 4 * i + 4, :, :6] = 1, items[i]
    x[4 * count, :, 7], x[4 * count + 1 : 4 * count + 4, :, :6] = 1, items[asked, :, every].transpose(0, 1)
    x[4 * count + 4, :, 7] = 1
    return x, items[asked + 1, :, every].transpose(0, 1)


TASKS = {
    "copy": Task(
        copy,
        9,
        8,
        dict(hidden=100, slots=128, width=20, read_heads=1),
        "pytorch-ntm: perfect at length 20 after fewer than 30,000 iterations",
    ),
    "repeat-copy": Task(
        repeat_copy, 6, 5, dict(hidden=64, slots=16, width=16, read_heads=4), "deepmind/dnc: its defaults, 100,000 iterations"
    ),
    "associative-recall": Task(
        associative_recall,
        8,
        6,
        dict(hidden=100, slots=128, width=20, read_heads=1),
        "Collier and Beel 2018: perfect at 2 to 6 items",
        rate=1e-3,
    ),
}
MODELS = ("ntm", "dnc")


@torch.no_grad()
def wrong_bits(task: Task, model: nn.Module, generator: torch.Generator, size: int) -> float:
    """Wrong bits a sequence, on `size` of the hardest sequences of the task."""
    x, target = task.draw(size, True, generator)
    output, _ = model(x)
    return float(((output[-len(target) :] > 0) != (target > 0.5)).float().sum((0, 2)).mean())


def run(console: Console, name: str, model_name: str, seconds: float, seed: int, batch: int, rate: float | None) -> dict[str, Any]:
    """Trains until 1,000 unseen sequences reach the target or the time is over; prints the error as it goes."""
    task = TASKS[name]
    torch.manual_seed(seed)
    generator, unseen = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1_000_003)
    model = task.model(model_name)
    optimizer = torch.optim.Adam(model.parameters(), task.rate if rate is None else rate)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{name}, {model_name} of {parameters:,} parameters, seed {seed}, batches of {batch}; {task.published}", highlight=False)
    begin, step, history = time.monotonic(), 0, []
    # 200 sequences say when it is worth asking 1,000, whose answer counts.
    wrong = float("inf")
    while time.monotonic() - begin < seconds and not wrong < task.target:
        loss = _step(task, model, optimizer, task.draw(batch, False, generator))
        step += 1
        if not math.isfinite(loss):
            raise diverged(step, f"a loss of {loss}")
        if step % 200 == 0:
            few = wrong_bits(task, model, unseen, 200)
            history.append((step, round(time.monotonic() - begin, 1), few))
            console.print(f"step {step:6d} {history[-1][1]:7.1f} s  loss {loss:.4f}  wrong bits a sequence {few:.3f}", highlight=False)
            if few < task.target:
                wrong = wrong_bits(task, model, unseen, 1000)
    if not wrong < task.target:
        wrong = wrong_bits(task, model, unseen, 1000)
    elapsed = round(time.monotonic() - begin, 1)
    solved = wrong < task.target
    console.print(
        f"{'solved' if solved else 'not solved'}: {wrong:.4f} wrong bits a sequence (target below {task.target}) of 1,000 unseen sequences "
        f"of the hardest kind, after {step} steps and {elapsed} s, seed {seed}",
        highlight=False,
    )
    return dict(task=name, model=model_name, seed=seed, steps=step, seconds=elapsed, wrong_bits=wrong, solved=solved, history=history)


def _step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    x, target = batch
    output, _ = model(x)
    loss = F.binary_cross_entropy_with_logits(output[-len(target) :], target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    optimizer.step()
    return loss.item()

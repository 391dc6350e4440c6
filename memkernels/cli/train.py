"""`memkernels train`: progress, checkpoints, stopping."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from memkernels.cli.errors import UserError
from memkernels.cli.files import writable_folder
from memkernels.cli.trainer import Limit, Settings, Trainer

QUICK_EVALUATION = 16384  # characters of the held-out tail that are scored while training


@dataclass(frozen=True)
class Point:
    """Where training stood: bits per character of the last batches, and of held-out text."""

    step: int
    seconds: float
    train: float
    held_out: float


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only makes the returned function true; the second Ctrl-C interrupts as usual."""
    asked = False
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return

    def handle(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            signal.default_int_handler(signum, frame)
        asked = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_run(out: Path, text: str, config: dict[str, Any], settings: dict[str, Any]) -> Trainer:
    """Resumes the checkpoint `out` if it is there, else starts a run; either way the file is written, so a bad path shows at once."""
    writable_folder(out.parent)
    fresh = not out.exists()
    if fresh:
        trainer = Trainer.start(text, config, Settings(**settings))
    else:
        trainer = Trainer.resume(out, text, config, settings)
    try:
        trainer.save(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    return trainer


def train(console: Console, trainer: Trainer, limit: Limit, out: Path | None, save_every: float, evaluate_every: float) -> list[Point]:
    """Trains with a progress bar; saves every `save_every` seconds, at the end and when stopped.

    Returns: where training stood every `evaluate_every` seconds, at its start and at its end.

    Raises: KeyboardInterrupt, after saving, if it was stopped.
    """
    first = trainer.evaluate(QUICK_EVALUATION)
    points = [Point(trainer.step, trainer.seconds, first, first)]
    recent: list[float] = []
    saved = evaluated = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress, interruptible() as stopped:
        task = progress.add_task(_describe(points[-1]), total=1.0)
        for loss in trainer.run(limit):
            recent = [*recent[-49:], loss]
            now = time.monotonic()
            if now - evaluated >= evaluate_every:
                points.append(Point(trainer.step, trainer.seconds, sum(recent) / len(recent), trainer.evaluate(QUICK_EVALUATION)))
                evaluated = time.monotonic()
                if not console.is_terminal:  # there a progress bar shows it
                    console.print(_describe(points[-1]), highlight=False)
            if out is not None and now - saved >= save_every:
                trainer.save(out)
                saved = time.monotonic()
            done = limit.progress(trainer.step, trainer.seconds)
            progress.update(task, completed=done, description=_describe(points[-1], trainer.step, recent))
            if stopped():
                break
        if out is not None:
            trainer.save(out)
        if stopped():
            raise KeyboardInterrupt
    last = sum(recent) / len(recent) if recent else first
    return [*(p for p in points if p.step < trainer.step or p is points[0]), Point(trainer.step, trainer.seconds, last, trainer.evaluate())]


def _describe(point: Point, step: int | None = None, recent: list[float] | None = None) -> str:
    train = sum(recent) / len(recent) if recent else point.train
    number = point.step if step is None else step
    if train == point.held_out:  # no step was taken: there is only the held-out score
        return f"step {number}: held out {point.held_out:.3f} bits per character"
    return f"step {number}: {train:.3f} bits per character, held out {point.held_out:.3f}"

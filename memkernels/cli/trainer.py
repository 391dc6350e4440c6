"""`Trainer`: trains a `MemoryLM` on a text and can be stopped and resumed at any step; nothing is printed here."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from memkernels.cli.errors import UserError, diverged
from memkernels.models.memory_lm import MemoryLM
from memkernels.models.vocabulary import Vocabulary

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Settings:
    """How to train; stored in the checkpoint and used again when it is resumed.

    The learning rate rises to `rate` over `warmup` steps. Then it falls with the step as 1 / sqrt(1 + step / 500); or, with
    `decay_seconds`, along half a cosine to a twentieth over so many seconds of training.
    """

    window: int = 128
    batch: int = 32
    rate: float = 3e-3
    warmup: int = 30
    held_out: float = 0.1
    seed: int = 0
    decay_seconds: float = 0.0


@dataclass(frozen=True)
class Limit:
    """When to stop: after a number of steps, of seconds spent training (resumed ones included), or whichever comes first."""

    steps: int | None = None
    seconds: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """The part that is done, 0 to 1; a limit of 0 is reached at once."""
        parts = [done / limit if limit else 1.0 for done, limit in ((step, self.steps), (seconds, self.seconds)) if limit is not None]
        return min(1.0, max(parts, default=0.0))


class Trainer:
    """A model, its optimizer, the text, and where training stands.

    The batch and the learning rate of a step follow from the settings and the step alone (without `decay_seconds`), so a resumed run
    (optimizer, step and random state come from the checkpoint) goes on exactly as if it had never stopped.
    """

    def __init__(self, model: MemoryLM, text: str, settings: Settings) -> None:
        self.model, self.settings, self.step, self.seconds = model, settings, 0, 0.0
        self.fresh = True  # no file holds more than the start
        self.digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        tokens = model.vocabulary.encode(text)
        held = max(2, round(len(tokens) * settings.held_out))
        self.train_tokens, self.held_out = tokens[:-held], tokens[-held:]
        if len(self.train_tokens) < settings.window + 1:
            raise UserError(
                f"the text is too short: {len(self.train_tokens)} characters are left to train on ({held} are held out), "
                f"one window needs {settings.window + 1}; give more text or a smaller --window"
            )
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.rate, betas=(0.9, 0.99))

    @classmethod
    def start(cls, text: str, config: dict[str, Any], settings: Settings) -> Trainer:
        """A new model whose vocabulary is that of the text before its held-out tail."""
        torch.manual_seed(settings.seed)
        held = max(2, round(len(text) * settings.held_out))
        try:
            model = MemoryLM(Vocabulary.of(text[:-held]), **config)
        except ValueError as error:
            raise UserError(str(error)) from None
        return cls(model, text, settings)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], text: str, config: dict[str, Any], settings: dict[str, Any]) -> Trainer:
        """The run that `save` wrote.

        Args:
            config, settings: what the user asked for explicitly; must agree with the checkpoint.

        Raises: UserError if they do not, if the text is another one, or if the file has no training state.
        """
        model, extra, state = MemoryLM.load_with_extra(path)
        if not isinstance(state, dict) or "settings" not in state:
            raise UserError(f"{path}: has a model but no training state to resume; choose another --out")
        stored = asdict(model.config) | state["settings"]
        for name, value in (config | settings).items():
            if stored.get(name) != value:
                raise UserError(f"{path}: was trained with {name}={stored.get(name)}, not {value}; choose another --out")
        trainer = cls(model, text, Settings(**state["settings"]))
        if trainer.digest != state["text"]:
            raise UserError(f"{path}: was trained on another text; choose another --out")
        trainer.step, trainer.seconds, trainer.fresh = state["step"], state["seconds"], False
        trainer._load_optimizer(path, extra)
        return trainer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes model, optimizer, position and random state in one step; kill -9 leaves the old or the new file.

        Raises: UserError if training has diverged; the old file is kept.
        """
        score = self.model.evaluate(self.held_out[: self.settings.window + 1], self.settings.window)
        if not math.isfinite(score):
            raise self._diverged(score)
        extra = {"random": torch.get_rng_state()}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            extra |= {f"optimizer.{name}.{moment}": state[moment] for moment in MOMENTS if moment in state}
        position = {"settings": asdict(self.settings), "text": self.digest, "step": self.step, "seconds": self.seconds}
        self.model.save(path, extra, position)
        self.fresh = self.fresh and self.step == 0

    def _diverged(self, loss: float) -> UserError:
        return diverged(self.step, f"{loss} bits per character", kept=not self.fresh)

    def _load_optimizer(self, path: str | os.PathLike[str], extra: dict[str, Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            state = {moment: extra[f"optimizer.{name}.{moment}"] for moment in MOMENTS if f"optimizer.{name}.{moment}" in extra}
            shapes = {tuple(t.shape) for moment, t in state.items() if moment != "step"}
            if len(state) != (len(MOMENTS) if self.step else 0) or shapes - {tuple(parameter.shape)}:
                raise UserError(f"{path}: the optimizer state of {name} does not fit; choose another --out")
            if state:
                self.optimizer.state[parameter] = state
        if "random" in extra:
            torch.set_rng_state(extra["random"])

    def batch(self) -> Tensor:
        """The windows "B T+1" of the current step, drawn anywhere in the training part."""
        s = self.settings
        generator = torch.Generator().manual_seed((s.seed * 1_000_003 + self.step) % 2**63)
        starts = torch.randint(len(self.train_tokens) - s.window, (s.batch, 1), generator=generator)
        return self.train_tokens[starts + torch.arange(s.window + 1)]

    def rate(self) -> float:
        """The learning rate of the current step; where a call of `run` stops has no part in it."""
        s = self.settings
        if s.decay_seconds:
            falling = 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, self.seconds / s.decay_seconds))) / 2
        else:
            falling = (1 + self.step / 500) ** -0.5
        return s.rate * min(1.0, (self.step + 1) / s.warmup) * falling

    def run(self, limit: Limit) -> Iterator[float]:
        """Trains until the limit; yields the bits per character of every step's batch. Stop by not asking for the next one.

        Raises: UserError if training diverges.
        """
        while limit.progress(self.step, self.seconds) < 1:
            begin = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            loss = self.model.train_step(self.batch(), self.optimizer)
            self.step += 1
            if not math.isfinite(loss):
                raise self._diverged(loss)
            self.seconds += time.perf_counter() - begin
            yield loss

    def evaluate(self, most: int | None = None) -> float:
        """Bits per character of the held-out tail, or of about `most` characters in eight pieces spread evenly over it."""
        if most is None or len(self.held_out) <= most:
            return self.model.evaluate(self.held_out, self.settings.window)
        length = max(2, most // 8)
        starts = [i * (len(self.held_out) - length) // 7 for i in range(8)]
        return sum(self.model.evaluate(self.held_out[s : s + length], self.settings.window) for s in starts) / 8

"""What a user did wrong, as one line."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Its message is all that the command line prints; exit code 1."""

    code = 1


class OptionError(UserError):
    """An option has a value that it cannot have; exit code 2."""

    code = 2


def diverged(step: int, loss: str, kept: bool = False) -> UserError:
    kept_text = "the last good checkpoint is kept, " if kept else ""
    return UserError(f"training has diverged: {loss} at step {step}; {kept_text}try a smaller --rate")


def check_device(device: str) -> None:
    """cpu or cuda, and there."""
    import torch

    check_option("--device", [device], ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: cuda: torch finds no CUDA device on this machine")


def check_option(option: str, got: Iterable[str | None], choices: Iterable[str]) -> None:
    """Every value that was given is one of the choices. Raises OptionError, one line, if not."""
    known = tuple(choices)
    for value in got:
        if value is not None and value not in known:
            raise OptionError(f"{option}: expected one of {', '.join(known)}, got {value!r}")

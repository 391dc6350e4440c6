"""What a user did wrong, as one line."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Its message is all that the command line prints; exit code 1."""

    code = 1


class OptionError(UserError):
    """An option has a value that it cannot have; exit code 2."""

    code = 2


def check_option(option: str, got: Iterable[str | None], choices: Iterable[str]) -> None:
    """Every value that was given is one of the choices. Raises OptionError, one line, if not."""
    known = tuple(choices)
    for value in got:
        if value is not None and value not in known:
            raise OptionError(f"{option}: expected one of {', '.join(known)}, got {value!r}")

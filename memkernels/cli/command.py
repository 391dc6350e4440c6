"""What the commands share: where they print, and how errors end them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

console = Console(width=None if sys.stdout.isatty() else 120)


def one_line_errors(command: Callable[..., int | None]) -> Callable[..., None]:
    """What a user did wrong becomes one line on stderr and exit code 1, 2 for an option; Ctrl-C exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from memkernels._checks import BackendError
        from memkernels.cli.errors import UserError
        from memkernels.store.errors import StoreError

        try:
            code = command(*args, **kwargs)
        except BrokenPipeError:  # whoever reads has enough
            code = 1
        except (UserError, ValueError, OSError, ImportError, BackendError, StoreError) as error:
            print(f"memkernels: {' '.join(_message(error).split())}", file=sys.stderr)
            code = error.code if isinstance(error, UserError) else 1
        except (MemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
            print(f"memkernels: not enough memory: {' '.join(str(error).split()) or 'MemoryError'}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:
            print("memkernels: stopped", file=sys.stderr)
            code = 130
        raise typer.Exit(code or 0)

    return wrapped


def _message(error: Exception) -> str:
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return f"{error.filename or 'standard output'}: {error.strerror}"  # of the files, every one has its name


def _is_memory(error: BaseException) -> bool:
    """torch has no class of its own for what a CPU cannot allocate."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("allocate memory", "out of memory", "size calculation overflowed")
    )

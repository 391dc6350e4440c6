"""The command `memkernels`: info, verify, bench, train, generate, demo."""

from __future__ import annotations

import io
import os
import sys


def main() -> None:
    """Runs the command line; what a user did wrong is one line on stderr and exit code 1 (2 for the arguments themselves)."""
    _open_standard_files()
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"memkernels: the command line needs the packages typer and rich ({error}); install them with: pip install typer rich")
    code: str | int | None = 0
    try:
        from memkernels.cli.app import app

        app(prog_name="memkernels")
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # before a command has begun
        print("memkernels: stopped", file=sys.stderr)
        code = 130
    except OSError as error:  # of a text of help; the commands have their own
        print(f"memkernels: standard output: {error.strerror}", file=sys.stderr)
        code = 1
    sys.exit(_flush(code))


def _open_standard_files() -> None:
    """A shell can close them (`>&-`): a file of a store would get the number, and hold what anybody prints there."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8


def _flush(code: str | int | None) -> str | int | None:
    """What cannot be printed: the interpreter would try it again at its end, and say so in many lines."""
    try:
        sys.stdout.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        if not code and not isinstance(error, BrokenPipeError):  # whoever reads a pipe has enough
            print(f"memkernels: standard output: {error.strerror}", file=sys.stderr)
        code = code or 1
    return code

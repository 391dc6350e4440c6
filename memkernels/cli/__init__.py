"""The command `memkernels`: info, verify, bench, train, generate, demo."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; what a user did wrong is one line on stderr and exit code 1 (2 for the arguments themselves)."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.exit(f"memkernels: the command line needs the packages typer and rich ({error}); install them with: pip install typer rich")
    try:
        from memkernels.cli.app import app

        app(prog_name="memkernels")
    except KeyboardInterrupt:  # before a command has begun
        print("memkernels: stopped", file=sys.stderr)
        sys.exit(130)

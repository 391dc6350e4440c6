"""Output files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from memkernels.cli.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes beside the target and renames. Raises UserError if that cannot be done."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True) if path.parent.is_dir() else None
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_output(path: Path | None) -> None:
    """Before hours of work: a file of this name can be written. Makes its folder. Raises UserError if not."""
    if path is None:
        return
    if not path.name or path.is_dir():
        raise UserError(f"{path}: expected the name of a file to write, got a folder")
    writable_folder(path.parent)


def writable_folder(path: Path) -> Path:
    """Makes the folder. Raises UserError if it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be made ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: the folder cannot be written to")
    return path

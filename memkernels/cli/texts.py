"""Text to learn from, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from memkernels.cli.errors import UserError


def read_texts(paths: Sequence[Path]) -> str:
    """The files' text, joined by a line end.

    Raises: UserError if a file is missing, empty, a folder, unreadable or not UTF-8.
    """
    parts = []
    for path in paths:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})") from None
        if not text.strip():
            raise UserError(f"{path}: the file has no text")
        parts.append(text.replace("\r\n", "\n"))
    return "\n".join(parts)


def python_documentation() -> str:
    """The text of Python's own `help()` topics: about 460,000 characters that every Python brings along."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))

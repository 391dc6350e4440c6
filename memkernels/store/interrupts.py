"""Ctrl-C between two steps of a change: it waits until the change is whole."""

from __future__ import annotations

import importlib
import signal
import threading
from typing import Any

try:
    _plain: Any = importlib.import_module("_signal")  # signal looks for every handler among the members of an enum: 2 us a call
except ImportError:  # CPython's
    _plain = signal


class uninterrupted:
    """A SIGINT that arrives inside is handled behind it. Only the main thread is interrupted, by handlers of Python's."""

    __slots__ = ("_before", "_came")

    def __enter__(self) -> None:
        self._before = _plain.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
        self._came: tuple[Any, ...] | None = None
        if callable(self._before):
            _plain.signal(signal.SIGINT, self._note)

    def _note(self, *what: Any) -> None:
        self._came = what

    def __exit__(self, *error: object) -> None:
        if callable(self._before):
            _plain.signal(signal.SIGINT, self._before)
            if self._came is not None:
                self._before(*self._came)

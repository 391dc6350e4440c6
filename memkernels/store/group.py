"""The thread that commits in the background: what gathers while it writes goes into one transaction.

While it waits it holds nothing of the log, which so goes when nobody else has it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Group:
    """`write(items)` in a thread, for all items given since the last call; a failure ends it and is raised from then on by the log."""

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._write: Callable[[list[Any]], None] | None = None  # while there are items
        self._busy = self._stop = False
        self._change = threading.Condition(threading.RLock())  # a log that goes calls `let_go` from anywhere
        self._thread = threading.Thread(target=self._run, name="memkernels-store", daemon=True)
        self._thread.start()

    def submit(self, write: Callable[[list[Any]], None], item: Any) -> None:
        with self._change:
            self._write = write
            self._items.append(item)
            self._change.notify_all()

    def wait(self) -> None:
        """Until everything given is written, or writing has failed."""
        with self._change:
            while (self._items or self._busy) and self._thread.is_alive():
                self._change.wait(0.1)

    def stop(self) -> None:
        self.wait()
        self.let_go()
        self._thread.join()

    def let_go(self) -> None:
        """The thread ends when nothing is left to write. It may be the caller."""
        with self._change:
            self._stop = True
            self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._items and not self._stop:
                    self._change.wait()
                if not self._items:
                    return
                items, write, self._items, self._write, self._busy = self._items, self._write, [], None, True
            try:
                assert write is not None
                write(items)
            except BaseException:  # kept by the log, which refuses to go on
                return
            finally:
                del items, write  # before anybody is told: a log that nobody else has then is gone, and so is its lock
                with self._change:
                    self._busy = False
                    self._change.notify_all()

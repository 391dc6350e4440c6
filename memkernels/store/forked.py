"""torch's threads are not there in a forked child, which would wait for them for ever."""

from __future__ import annotations

import os

import torch


class serial_in_child:
    """What runs inside does without torch's threads in a child of a fork, whatever number of them it has set."""

    __slots__ = ("_threads",)
    forked = False

    def __enter__(self) -> None:
        self._threads = torch.get_num_threads() if serial_in_child.forked else 1
        if self._threads > 1:
            torch.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        if self._threads > 1:
            torch.set_num_threads(self._threads)


def _after_fork() -> None:
    serial_in_child.forked = True


os.register_at_fork(after_in_child=_after_fork)

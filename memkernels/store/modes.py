"""What the caller has set for torch and a store's own work must not meet."""

from __future__ import annotations

import os
from contextlib import ExitStack

import torch


class own_modes:
    """Inside, torch works as the store's buffers, which live on, need it, whatever the caller has set.

    - In a child of a fork without torch's threads: they are not there, and it would wait for them for ever.
    - Not in inference mode: what is made there cannot be changed outside it.
    - New tensors are made on the CPU where no device is named, not on `torch.set_default_device`'s.
    """

    __slots__ = ("_changed",)
    forked = False

    def __enter__(self) -> None:
        self._changed: ExitStack | None = None
        threads = torch.get_num_threads() if own_modes.forked else 1
        inference, elsewhere = torch.is_inference_mode_enabled(), torch.empty(0).device.type != "cpu"  # get_default_device takes 8 us
        if threads == 1 and not inference and not elsewhere:
            return
        self._changed = changed = ExitStack()
        if threads > 1:
            torch.set_num_threads(1)
            changed.callback(torch.set_num_threads, threads)
        if inference:
            changed.enter_context(torch.inference_mode(False))
            changed.enter_context(torch.no_grad())  # leaving inference mode turns gradients on
        if elsewhere:
            changed.enter_context(torch.device("cpu"))

    def __exit__(self, *error: object) -> None:
        if self._changed is not None:
            self._changed.close()


def _after_fork() -> None:
    own_modes.forked = True


os.register_at_fork(after_in_child=_after_fork)

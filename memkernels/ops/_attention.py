"""What the public functions of the attention family share."""

from __future__ import annotations

from typing import Any

from memkernels._checks import fail

FAR = 2**40  # past the end of any sequence, and far from where int64 positions overflow


def window_limits(op: str, window: Any) -> tuple[int, int]:
    """(left, right) with -1 for no limit."""
    if window is None:
        return -1, -1
    pair = isinstance(window, (tuple, list)) and len(window) == 2
    if not (pair and all(w is None or (isinstance(w, int) and not isinstance(w, bool) and w >= -1) for w in window)):
        fail(op, "window", "(left, right), each an int >= 0, or -1 or None for no limit", window)
    left, right = (-1 if w is None else min(w, FAR) for w in window)
    return left, right

"""Checks of what a call of a store says beside keys and values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from memkernels._checks import fail


def as_folder(op: str, path: Any) -> Path:
    """The path of a call."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        fail(op, "path", "a str or a pathlib.Path", type(path).__name__, TypeError)
    if not os.fspath(path) or "\0" in os.fspath(path):  # Path("") would be the working directory
        fail(op, "path", "the name of a file or directory", repr(path))
    return Path(path)


def as_device(op: str, device: Any) -> torch.device:
    """The device of a call."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        fail(op, "device", "a device such as 'cpu' or 'cuda'", repr(device))
        raise
    if found.type == "meta":
        fail(op, "device", "a device that holds data", repr(device))
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA asserts
        fail(op, "device", "a device that is there", f"{device!r} ({str(error).splitlines()[0]})")
    return found

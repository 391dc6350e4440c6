"""Files of tensors and text: safetensors with JSON in the header, no pickle, replaced in one step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

FORMAT = "memkernels.MemoryLM"
VERSION = 1


def write(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor], header: dict[str, Any]) -> None:
    """Writes a checkpoint so that at any moment, kill -9 and power loss included, `path` is the old file or the whole new one.

    Args:
        path: file name; its folder must exist.
        tensors: name to tensor, any dtype.
        header: JSON-serialisable values by name; format and version are added.

    Raises: OSError if the file cannot be written, ValueError if `read` would refuse it; nothing is left behind then.
    """
    path = Path(path)
    _check_finite(path, tensors)
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in header.items()}
    metadata |= {"format": FORMAT, "version": str(VERSION)}
    data = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _check_finite(path: str | os.PathLike[str], tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite")


def _sync_folder(folder: Path) -> None:
    """Makes the rename durable where folders can be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the header that `write` wrote.

    Raises: FileNotFoundError; ValueError, one line, if the file is truncated, of another program or of a newer version.
    """
    if os.path.isdir(path):
        raise ValueError(f"{path}: expected a checkpoint file, got a folder")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({' '.join(str(error).split())})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a {FORMAT} checkpoint, got a file of format {metadata.get('format')!r}")
    _check_finite(path, tensors)
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"{path}: expected version {VERSION}, got {metadata.get('version')!r}")
    try:
        return tensors, {name: json.loads(value) for name, value in metadata.items() if name != "format"}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the header is damaged ({error})") from None

"""Plots as PNG files; they need matplotlib (`pip install memkernels[plot]`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from memkernels._checks import check_flag, check_tensor, fail
from memkernels.nn._arguments import check_integers


def memory_trace(
    path: str | Path,
    read: torch.Tensor,
    write: torch.Tensor | None = None,
    *,
    sample: int = 0,
    title: str = "",
    rows: tuple[int, int] | None = None,
    index: torch.Tensor | None = None,
    batch_first: bool = False,
) -> Path:
    """Draws where a memory was read and written over time, as in the figures of the Neural Turing Machine's paper.

    Args:
        path: the PNG file to write.
        read: "T B R N", read weights of R heads over N rows at T steps, e.g. `Trace.read` of `nn.ExternalMemory`; "T R N" is one sequence.
        batch_first: the tensors are "B T ...", as the layers give them that are made with ``batch_first=True``, their default.
        write: "T B H N" or "T H N", write weights likewise; None: no such panels.
        index: int64 "T B R k" or "T R k": `read` holds the weights of these rows alone (`Trace.rows`; -1 is absent); None: of all rows.
        sample: which sequence of the batch. title: over the figure. rows: (first, last + 1) of the rows to show; all if None.

    Returns:
        The path. One panel a head: steps to the right, rows upwards, black = weight 0, white = the largest weight of the panel, which
        its colour bar tells.

    Raises:
        ImportError: matplotlib is not installed. ValueError: weights of another rank or size, a sequence that is not there, no rows to
        show. TypeError: something of another type.

    Example:
        >>> weights = torch.softmax(torch.randn(20, 1, 2, 16), -1)
        >>> memory_trace("trace.png", weights, weights[:, :, :1]).name  # doctest: +SKIP
        'trace.png'
    """
    check_integers("memory_trace", sample=sample)
    check_flag("memory_trace", "batch_first", batch_first)
    if not isinstance(path, (str, os.PathLike)):
        fail("memory_trace", "path", "the name of a file", type(path).__name__, TypeError)
    tensors = {"read": read, "write": write, "index": index}
    given = {kind: _heads(kind, t, sample, batch_first) for kind, t in tensors.items() if t is not None or kind == "read"}
    if index is not None:
        given["read"] = _dense(given["read"], given.pop("index"), given["write"].shape[2] if write is not None else 0)
    steps, _, count = given["read"].shape
    if write is not None and given["write"].shape[::2] != (steps, count):
        wanted = f"T={steps} steps and N={count} rows, as in read"
        fail("memory_trace", "write", wanted, f"shape {tuple(write.shape)}")
    panels = [(f"{kind} {h}", w) for kind, t in given.items() for h, w in enumerate(t.float().unbind(1))]
    first, last = _range(rows, count)
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 1 + 1.8 * len(panels)), sharex=True, squeeze=False)
    for (name, weights), axis in zip(panels, axes[:, 0], strict=True):
        extent = (-0.5, weights.shape[0] - 0.5, first - 0.5, last - 0.5)
        shown = weights[:, first:last].T.tolist()
        image = axis.imshow(shown, origin="lower", aspect="auto", cmap="gray", interpolation="nearest", vmin=0, extent=extent)
        axis.set_ylabel(f"{name}\nrow")
        figure.colorbar(image, ax=axis, pad=0.01)
    axes[-1, 0].set_xlabel("step")
    figure.suptitle(title or "weights over the rows of the memory")
    figure.tight_layout()
    figure.savefig(path, dpi=100, format="png")
    pyplot.close(figure)
    return Path(path)


def _range(rows: Any, count: int) -> tuple[int, int]:
    """The rows to show, of `count`."""
    if rows is None:
        return 0, count
    if not isinstance(rows, (tuple, list)) or len(rows) != 2:
        fail("memory_trace", "rows", "(first, last + 1) or None", repr(rows), TypeError)
    check_integers("memory_trace", **{"rows[0]": rows[0], "rows[1]": rows[1]})
    if not 0 <= rows[0] < rows[1] <= count:
        fail("memory_trace", "rows", f"a range in 0..{count} that is not empty", rows)
    return rows[0], rows[1]


def _dense(weights: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """Weights "T R k" of the rows "T R k" as weights "T R N"; N is `rows`, or 0: as many as the index names."""
    if index.shape != weights.shape or index.dtype != torch.int64:
        got = f"{index.dtype} {tuple(index.shape)}"
        fail("memory_trace", "index", f"torch.int64 {tuple(weights.shape)} of a sequence, as read", got)
    rows = rows or max(int(index.max()) + 1, 1)
    if int(index.min()) < -1 or int(index.max()) >= rows:
        fail("memory_trace", "index", f"-1 or rows 0 to N-1={rows - 1}", f"{int(index.min())} to {int(index.max())}", IndexError)
    absent = index < 0
    found = weights.new_zeros(*weights.shape[:2], rows)
    return found.scatter_add(2, index.masked_fill(absent, 0), weights.masked_fill(absent, 0))


def _heads(kind: str, weights: Any, sample: int, batch_first: bool) -> torch.Tensor:
    """Weights "T R N" of one sequence."""
    check_tensor("memory_trace", kind, weights)
    if weights.dim() not in (3, 4):
        fail("memory_trace", kind, "[T B R N] or [T R N]", f"shape {tuple(weights.shape)}")
    if weights.dim() == 4:
        weights = weights.transpose(0, 1) if batch_first else weights
        if not 0 <= sample < weights.shape[1]:
            fail("memory_trace", "sample", f"a sequence of the batch, 0..{weights.shape[1] - 1}", sample)
        weights = weights[:, sample]
    if 0 in weights.shape:
        fail("memory_trace", kind, "at least one step, head and row", f"shape {tuple(weights.shape)}")
    return weights.detach().cpu()


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("memory_trace needs matplotlib: pip install memkernels[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

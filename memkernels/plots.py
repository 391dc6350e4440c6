"""Plots as PNG files; they need matplotlib (`pip install memkernels[plot]`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from memkernels._checks import fail


def memory_trace(
    path: str | Path,
    read: torch.Tensor,
    write: torch.Tensor | None = None,
    *,
    sample: int = 0,
    title: str = "",
    rows: tuple[int, int] | None = None,
) -> Path:
    """Draws where a memory was read and written over time, as in the figures of the Neural Turing Machine's paper.

    Args:
        path: the PNG file to write.
        read: "T B R N", read weights of R heads over N rows at T steps, e.g. `Trace.read` of `nn.ExternalMemory`; "T R N" is one sequence.
        write: "T B H N" or "T H N", write weights likewise; None: no such panels.
        sample: which sequence of the batch. title: over the figure. rows: (first, last + 1) of the rows to show; all if None.

    Returns:
        The path. One panel a head: steps to the right, rows upwards, black = weight 0, white = the largest weight of the panel, which
        its colour bar tells.

    Raises:
        ImportError: matplotlib is not installed. ValueError: weights of another rank, a sequence that is not there, no rows to show.

    Example:
        >>> weights = torch.softmax(torch.randn(20, 1, 2, 16), -1)
        >>> memory_trace("trace.png", weights, weights[:, :, :1]).name  # doctest: +SKIP
        'trace.png'
    """
    panels = [(f"{kind} {h}", w) for kind, t in (("read", read), ("write", write)) if t is not None for h, w in _heads(kind, t, sample)]
    first, last = (0, panels[0][1].shape[1]) if rows is None else rows
    if not 0 <= first < last <= panels[0][1].shape[1]:
        fail("memory_trace", "rows", f"a range in 0..{panels[0][1].shape[1]} that is not empty", rows)
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


def _heads(kind: str, weights: torch.Tensor, sample: int) -> list[tuple[int, torch.Tensor]]:
    """(head, weights "T N") of one sequence."""
    if weights.dim() not in (3, 4):
        fail("memory_trace", kind, "[T B R N] or [T R N]", f"shape {tuple(weights.shape)}")
    if weights.dim() == 4:
        if not 0 <= sample < weights.shape[1]:
            fail("memory_trace", "sample", f"a sequence of the batch, 0..{weights.shape[1] - 1}", sample)
        weights = weights[:, sample]
    if 0 in weights.shape:
        fail("memory_trace", kind, "at least one step, head and row", f"shape {tuple(weights.shape)}")
    return list(enumerate(weights.detach().float().cpu().unbind(1)))


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("memory_trace needs matplotlib: pip install memkernels[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

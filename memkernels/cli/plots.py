"""Plots as PNG, where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memkernels.cli.train import Point


def loss_curve(points: Sequence[Point], path: Path, source: str) -> str:
    """Draws bits per character over seconds; returns what to tell the user if that is impossible, else an empty text."""
    try:
        import matplotlib
    except ImportError:
        return "no plots: they need matplotlib, install memkernels[plot]"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    seconds = [p.seconds for p in points]
    axes.plot(seconds, [p.train for p in points], marker=".", label="training text")
    axes.plot(seconds, [p.held_out for p in points], marker=".", label="held-out text")
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("bits per character")
    axes.set_ylim(bottom=0)
    axes.set_title(source if source.isascii() else "the given text")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return ""

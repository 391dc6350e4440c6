"""One measured line: what was run, against which peer, and how far from the machine's floor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One op at one size, dtype and mode, timed interleaved with one peer. Times are medians.

    Args:
        op, size, dtype, mode: what ran; mode is "forward" (inference_mode), "backward", "fwd+bwd" or "training forward".
        threads, device, backend, level: where it ran; level is the CPU instruction-set level, "" on other devices.
        peer: what it is compared with, e.g. "eager", "compile", "torch.nn.LSTM".
        ms, peer_ms, ratio: ratio = peer_ms / ms, above 1 where memkernels is faster.
        gb_s: least bytes the op must move, over its time.
        floor: time floor (bytes at the measured copy bandwidth, flops at the measured matrix rate) over the time, 1.0 is the floor.
        checked: "float64" or "float64 at N=4096": the size at which the output and gradients were compared before timing.
        note: empty, or why a number is missing.
        extra_mb, peer_extra_mb: peak memory of one call beyond its inputs and outputs (gradients are outputs), in 1e6 bytes; None where the
            system does not tell.
    """

    op: str
    size: str
    dtype: str
    mode: str
    threads: int
    device: str
    backend: str
    level: str
    peer: str
    ms: float
    peer_ms: float | None
    ratio: float | None
    gb_s: float | None
    floor: float | None
    checked: str
    note: str = ""
    extra_mb: float | None = None
    peer_extra_mb: float | None = None

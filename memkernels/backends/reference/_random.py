"""Counter-based random numbers: uint32 arithmetic in int64 tensors, a function of (seed, stream, step, row, unit) alone."""

from __future__ import annotations

import torch

ZONEOUT_H, ZONEOUT_C, RECURRENT_DROPOUT = 0, 1, 2  # streams
_LOW = 0xFFFFFFFF
_GOLDEN, _ROW = 0x9E3779B9, 0x85EBCA6B


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Wellons' lowbias32; products may wrap in int64, which leaves their low 32 bits right."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    x = (x ^ (x >> 15)) * 0x846CA68B & _LOW
    return x ^ (x >> 16)


def events(seed: torch.Tensor, stream: int, probability: float, steps: int, rows: int, units: int) -> torch.Tensor:
    """Booleans "steps rows units", each True with this probability, to within 2**-25."""
    t, b, j = (torch.arange(n, device=seed.device) for n in (steps, rows, units))
    start = _mix(_mix((seed & _LOW) ^ (stream * _GOLDEN & _LOW)) ^ (seed >> 32 & _LOW))
    row = _mix((_mix((start + t) & _LOW)[:, None] + b * _ROW) & _LOW)
    return (_mix((row[:, :, None] + (j + 1) * _GOLDEN) & _LOW) >> 8) < round(probability * 2**24)

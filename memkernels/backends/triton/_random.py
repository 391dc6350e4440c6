"""Counter-based random numbers: an event is a pure function of (seed, stream, step, row, unit), the same on every backend.

row = mix(mix(mix(mix(low(seed) ^ stream * golden) ^ high(seed)) + t) + b * odd) and bits(j) = mix(row + (j + 1) * golden), with Wellons'
lowbias32 as mix; the event happens where bits >> 8 < threshold = round(p * 2^24).
"""

from __future__ import annotations

import triton
import triton.language as tl

ZONEOUT_H = tl.constexpr(0)
ZONEOUT_C = tl.constexpr(0x9E3779B9)
DROPOUT = tl.constexpr(0x3C6EF372)  # 2 * 0x9E3779B9 in 32 bits


@triton.jit
def mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def events(seed_ptr, STREAM: tl.constexpr, t, b, unit, threshold):
    """For rows b and units: whether it happens at step t."""
    seed = tl.load(seed_ptr)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    start = mix(mix(low ^ STREAM) ^ high)
    row = mix(mix(start + tl.cast(t, tl.uint32)) + b.to(tl.uint32) * 0x85EBCA6B)
    bits = mix(row[:, None] + ((unit + 1).to(tl.uint32) * 0x9E3779B9)[None, :])
    return (bits >> 8).to(tl.int32) < threshold


def threshold(p: float) -> int:
    """Of 2^24 values, how many mean that the event happens."""
    return round(p * (1 << 24))

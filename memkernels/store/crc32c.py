"""CRC32C (Castagnoli): the checksum of everything on disk. In C++ where the extension is built, else from a table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from memkernels import _backends

POLYNOMIAL = 0x82F63B78  # reflected: bit 31 is x^0


def crc32c(data: Any, value: int = 0) -> int:
    """The checksum of the bytes whose checksum is `value`, followed by `data` (bytes, bytearray or a contiguous memoryview)."""
    return _best()(data, value)


@cache
def _best() -> Callable[[Any, int], int]:
    found = _backends.kernel("cpp", "crc32c")
    return by_table if isinstance(found, str) else found.crc32c


def by_table(data: Any, value: int = 0) -> int:
    """`crc32c` in plain Python."""
    crc, view = value ^ 0xFFFFFFFF, memoryview(data).cast("B")
    pairs = len(view) // 2 if sys.byteorder == "little" else 0
    table = _table(16)
    for pair in view[: 2 * pairs].cast("H") if pairs else ():
        crc = table[(crc ^ pair) & 0xFFFF] ^ (crc >> 16)
    table = _table(8)
    for byte in view[2 * pairs :]:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _table(bits: int) -> list[int]:
    """What `bits` bits shifted out of the register leave in it."""
    if bits == 16:
        byte = _table(8)
        return [byte[byte[i & 0xFF] & 0xFF ^ (i >> 8)] ^ (byte[i & 0xFF] >> 8) for i in range(1 << 16)]
    table = []
    for i in range(1 << bits):
        for _ in range(bits):
            i = (i >> 1) ^ (POLYNOMIAL if i & 1 else 0)
        table.append(i)
    return table


def combine(first: int, second: int, length: int) -> int:
    """The checksum of two pieces joined, of which the second is `length` bytes long."""
    return _multiply(_power(length), first) ^ second


@lru_cache(4096)
def _power(length: int) -> int:
    """x to the number of bits in `length` bytes, modulo the polynomial."""
    power, square, bits = 1 << 31, 1 << 30, 8 * length
    while bits:
        if bits & 1:
            power = _multiply(power, square)
        square, bits = _multiply(square, square), bits >> 1
    return power


def _multiply(a: int, b: int) -> int:
    product, bit = 0, 1 << 31
    while a:
        if a & bit:
            product, a = product ^ b, a ^ bit
        bit >>= 1
        b = (b >> 1) ^ (POLYNOMIAL if b & 1 else 0)
    return product

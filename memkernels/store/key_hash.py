"""The hashes of byte keys; csrc/common/key_hash.h is the same."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_KEY = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F
_START = 0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573  # of SipHash


def hash_key(key: bytes) -> tuple[int, int]:
    """128 bits, as two signed ints: SipHash-1-3 (Aumasson, Bernstein, SIPHASH, 2012) under a fixed key."""
    state = [start ^ part for start, part in zip(_START, _KEY + _KEY, strict=True)]
    state[1] ^= 0xEE
    whole = len(key) // 8 * 8
    for i in range(0, whole, 8):
        _take(state, int.from_bytes(key[i : i + 8], "little"))
    _take(state, int.from_bytes(key[whole:], "little") | (len(key) & 0xFF) << 56)
    state[2] ^= 0xEE
    first = _finish(state)
    state[1] ^= 0xDD
    return first, _finish(state)


def _take(state: list[int], word: int) -> None:
    state[3] ^= word
    _mix(state)
    state[0] ^= word


def _finish(state: list[int]) -> int:
    for _ in range(3):
        _mix(state)
    return signed(state[0] ^ state[1] ^ state[2] ^ state[3])


def _mix(state: list[int]) -> None:
    a, b, c, d = state
    a, c = (a + b) & _MASK, (c + d) & _MASK
    b, d = _turned(b, 13) ^ a, _turned(d, 16) ^ c
    a = _turned(a, 32)
    c, a = (c + b) & _MASK, (a + d) & _MASK
    b, d = _turned(b, 17) ^ c, _turned(d, 21) ^ a
    state[:] = a, b, _turned(c, 32), d


def _turned(x: int, by: int) -> int:
    return (x << by | x >> (64 - by)) & _MASK


def owner_hash(key: bytes) -> int:
    """64 bits, as a signed int, that say which rank of a sharded store owns a key: part of its format on disk. One bijection a word of
    eight bytes."""
    state = (len(key) + 1) * 0x9E3779B97F4A7C15 & _MASK
    for i in range(0, len(key), 8):
        state = (state ^ int.from_bytes(key[i : i + 8], "little")) * 0xD6E8FEB86659FD93 & _MASK
        state ^= state >> 32
    return signed(state)


def signed(word: int) -> int:
    """The same 64 bits as int64."""
    return word - (1 << 64) if word >> 63 else word

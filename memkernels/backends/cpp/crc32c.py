"""CRC32C in C++: crc32c(data, value=0) of any object with a contiguous buffer."""

from __future__ import annotations

from memkernels import _C

crc32c = _C.crc32c

"""Short texts as rows of bytes, so that a store can hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memkernels._checks import fail


def text_rows(texts: Sequence[str], width: int) -> torch.Tensor:
    """Texts as uint8 "n width": UTF-8, zeros behind.

    Raises:
        ValueError: a text is longer than `width` bytes, or ends with a zero byte, which could not be told from what is behind.

    Example:
        >>> from memkernels.store import text_of, text_rows
        >>> text_of(text_rows(["A fruit"], 16))
        ['A fruit']
    """
    rows = torch.zeros(len(texts), width, dtype=torch.uint8)
    for i, text in enumerate(texts):
        data = text.encode()
        if len(data) > width or data.endswith(b"\0"):
            fail("text_rows", f"texts[{i}]", f"at most {width} bytes of UTF-8, the last one not zero", f"{len(data)} bytes")
        if data:
            rows[i, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return rows


def text_of(rows: torch.Tensor) -> list[str]:
    """The texts that `text_rows` made rows of."""
    return [bytes(row).rstrip(b"\0").decode() for row in rows.tolist()]

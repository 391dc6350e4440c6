"""`Vocabulary`: the characters of a text, numbered, with one token for every character that is not among them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

UNKNOWN = 0
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Vocabulary:
    """Characters (Unicode code points, any script) to tokens 1, 2, ...; token 0 is any other character.

    Args:
        characters: the known characters, in token order; duplicates are an error.

    Example:
        >>> vocabulary = Vocabulary.of("banana")
        >>> vocabulary.encode("nab?").tolist(), vocabulary.decode([3, 1, 2])
        ([3, 1, 2, 0], 'nab')
    """

    def __init__(self, characters: Iterable[str]) -> None:
        if not isinstance(characters, Iterable):
            raise TypeError(f"Vocabulary: characters: expected characters, got {type(characters).__name__}")
        self.characters = tuple(characters)
        if any(not isinstance(c, str) or len(c) != 1 for c in self.characters) or len(set(self.characters)) != len(self.characters):
            raise ValueError("Vocabulary: characters: expected distinct single characters")
        self._tokens = np.zeros(0x110000, dtype=np.int64)
        self._tokens[[ord(c) for c in self.characters]] = np.arange(1, len(self.characters) + 1)

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """The vocabulary of all characters of a text, in code point order."""
        return cls(sorted(set(_text("of", text))))

    def __len__(self) -> int:
        return len(self.characters) + 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.characters == other.characters

    def __hash__(self) -> int:
        return hash(self.characters)

    def encode(self, text: str) -> torch.Tensor:
        """Tokens of a text, int64, one a character."""
        points = np.frombuffer(_text("encode", text).encode("utf-32-le", "surrogatepass"), dtype="<u4")
        return torch.from_numpy(self._tokens[points])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; token 0 becomes U+FFFD."""
        known = (_REPLACEMENT, *self.characters)
        numbers = [int(t) for t in tokens]
        if wrong := [t for t in numbers if not 0 <= t < len(known)]:
            raise IndexError(f"Vocabulary.decode: tokens: expected 0 to {len(known) - 1}, got {wrong[0]}")
        return "".join(known[t] for t in numbers)


def _text(method: str, got: Any) -> str:
    if not isinstance(got, str):
        raise TypeError(f"Vocabulary.{method}: text: expected a str, got {type(got).__name__}")
    return got

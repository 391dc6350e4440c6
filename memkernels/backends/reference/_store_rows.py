"""Where rows lie in chunks."""


def places(chunks, firsts, rows, op):
    """[(chunk, which of `rows` it holds, where in it)] for chunks that hold rows firsts[i] to firsts[i] + its size."""
    found, missing = [], rows >= 0
    for chunk, first in zip(chunks, firsts):
        here = (rows >= first) & (rows < first + chunk.shape[0])
        found.append((chunk, here, rows[here] - first))
        missing = missing & ~here
    if missing.any():
        raise IndexError(f"{op}: rows: expected rows that a chunk holds, got {int(rows[missing][0])}")
    return found

"""Launch parameters as pure functions of sizes, dtype and device: testable without a GPU, and the same for the same sizes on every call.

No parameter depends on the batch size, so a row's result does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WIDTH = 512
MAX_HEADS = 128
MAX_TILE = 8192  # heads x width of an accumulator that stays in registers
ROWS_PER_SPLIT = 512
MAX_SPLITS = 256


@dataclass(frozen=True)
class Device:
    """What a launch depends on of a device."""

    capability: tuple[int, int]
    shared_bytes: int


@dataclass(frozen=True)
class Rows:
    """Tiles over a memory "B N W": heads x rows x width, and the rows of one split."""

    block_r: int
    block_n: int
    block_w: int
    block_v: int
    chunk: int
    splits: int
    num_warps: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())


def refuse_rows(heads: int, *widths: int) -> str | None:
    """Why a memory op of these sizes has no tile, or None."""
    if max(widths) > MAX_WIDTH:
        return f"a row of {max(widths)} elements is over the limit of {MAX_WIDTH}"
    if heads > MAX_HEADS:
        return f"{heads} heads are over the limit of {MAX_HEADS}"
    tile = power_of_two(heads, 16) * power_of_two(max(widths), 16)
    return None if tile <= MAX_TILE else f"heads x width, padded to {tile}, is over the limit of {MAX_TILE}"


def split(rows: int, block: int) -> tuple[int, int]:
    """(rows of a split, number of splits): long enough to amortise the combine, at most MAX_SPLITS."""
    chunk = ceil_div(max(ROWS_PER_SPLIT, ceil_div(rows, MAX_SPLITS)), block) * block
    return chunk, ceil_div(rows, chunk)


def content(rows: int, heads: int, width: int, value_width: int | None, backward: bool = False) -> Rows:
    """For content_address and content_read: a tile holds whole rows. value_width None: the value is the memory itself."""
    block_r, block_w = power_of_two(heads, 16), power_of_two(width, 16)
    block_v = block_w if value_width is None else power_of_two(value_width, 16)
    block_n = 16 if backward else max(16, min(32, 2048 // max(block_w, block_v, block_r)))
    chunk, splits = split(rows, block_n)
    return Rows(block_r, block_n, block_w, block_v, chunk, splits, 8 if backward or block_r * max(block_w, block_v) > 2048 else 4)


def memory_read(rows: int, heads: int, width: int, backward: bool = False) -> Rows:
    """For memory_read: the width is cut into tiles, so it has no limit."""
    block_r, block_w = power_of_two(heads, 16), min(32 if backward else 64, power_of_two(width, 16))
    block_n = 32
    chunk, splits = split(rows, block_n)
    return Rows(block_r, block_n, block_w, block_w, chunk, splits, 4)


def memory_write(rows: int, width: int) -> Rows:
    """For memory_write: a tile holds whole rows in backward, which sums over the width."""
    block_w = power_of_two(width)
    block_n = max(1, min(64, 2048 // block_w))
    return Rows(1, block_n, block_w, block_w, block_n, ceil_div(rows, block_n), 4)


def circle(rows: int) -> Rows:
    """For location_address: blocks of the rows of one head."""
    block_n = min(1024, power_of_two(rows, 32))
    return Rows(1, block_n, 1, 1, block_n, 1, max(1, block_n // 256))


def pointwise(hidden: int) -> Rows:
    """For lstm_gates: a tile of 1024 elements, wide rather than tall."""
    block_w = min(128, power_of_two(hidden))
    block_n = 1024 // block_w
    return Rows(1, block_n, block_w, block_w, block_n, 1, 4)


@dataclass(frozen=True)
class Recurrence:
    """Tiles of a recurrent layer: batch rows x hidden units (x state units), summed over block_k.

    `resident`: one program runs all steps of a head with its weights in shared memory; `ahead`: steps whose loads are under way at once.
    """

    block_b: int
    block_h: int
    block_p: int
    block_k: int
    num_warps: int
    ahead: int
    resident: bool


def recurrence(
    units: int, state: int, gates: int, more: int, norm: bool, element: int, backward: bool, shared_bytes: int, interpreted: bool = False
) -> Recurrence:
    """Of one head: `units` hidden units, `state` elements of what enters weight_hh. `more`: further square weights of a step; `norm`: it
    has a layer norm; `element`: bytes of a weight. float32 weights are held only with loads ahead: without, LLVM fails on the loop."""
    block_h, block_p = power_of_two(units, 16), power_of_two(state, 16)
    largest = max(block_h, block_p)
    if largest <= (64 if element == 4 else 128):
        tile = 16 * largest * 4
        weights = (gates + more) * largest * largest * element
        loads = gates + (2 + (gates if norm else 0) if backward else 0) + (8 if element == 4 else 3)
        warps = 8 if largest > (32 if element == 4 else 64) else 4
        for ahead, need in ((2, weights + loads * tile), (1, weights + 2 * tile)):
            if need <= shared_bytes and (ahead == 2 or element < 4):
                return Recurrence(16, block_h, block_p, 16, warps, ahead, True)
    block = 128 if interpreted else 32
    return Recurrence(16, block, 16, min(256 if interpreted else 32, power_of_two(max(units, state), 16)), 4, 2, False)


def recurrence_rows(hidden: int, whole: bool) -> Recurrence:
    """Of a step without products; `whole`: a program sums over whole rows."""
    block_h = power_of_two(hidden, 16) if whole else min(128, power_of_two(hidden, 16))
    block_b = max(1, 1024 // block_h)
    return Recurrence(block_b, block_h, 16, 16, max(4, min(16, block_h // 256)), 1, False)


@dataclass(frozen=True)
class Machine:
    """Tiles of ntm_sequence: memory rows x width, vectors over rows and over taps, outputs x inputs of the controller's products."""

    block_n: int
    block_w: int
    block_v: int
    block_s: int
    block_j: int
    block_k: int
    num_warps: int


def machine(rows: int, width: int, taps: int, hidden: int, backward: bool) -> Machine:
    """Tiles of 2048: the addresses of a step already take many registers; for smaller ones ptxas spills to have two programs at once."""
    block_w = power_of_two(width)
    block_n = max(1, min(2048 // block_w, power_of_two(rows)))
    block_k = min(64 if backward else 128, power_of_two(hidden, 16))
    return Machine(block_n, block_w, min(256, power_of_two(rows, 32)), power_of_two(taps), 16, block_k, 8)


@dataclass(frozen=True)
class Attention:
    """Tiles of attention: queries x keys; `splits` of the keys for few queries."""

    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int
    chunk: int
    splits: int


SPLIT_QUERIES = 64
KEYS_PER_SPLIT = 1024


# (16-bit kernel, padded width up to) -> queries, keys, warps, stages: the largest tiles that compile without spills.
ATTENTION_TILES = {
    ("forward", 64): (128, 64, 8, 3),
    ("forward", 128): (128, 64, 8, 3),
    ("special", 64): (128, 64, 4, 3),
    ("special", 128): (128, 64, 8, 2),
    ("dkey", 64): (32, 64, 4, 2),
    ("dkey", 128): (64, 32, 8, 2),
    ("dquery", 64): (128, 64, 8, 2),
    ("dquery", 128): (128, 64, 8, 2),
}


AMPERE_TILES = dict.fromkeys((("forward", 64), ("forward", 128), ("dquery", 128)), (64, 64, 8, 2)) | {("dkey", 64): (32, 32, 4, 2)}


def attention(
    queries: int, keys: int, width: int, value_width: int, wide: bool, kernel: str, capability: tuple[int, int], interpreted: bool = False
) -> Attention:
    """For attention; `wide`: float32. `kernel`: "forward", "special" (its warps differ), "dkey" or "dquery". Few queries over many keys
    are split over the keys."""
    wide = wide and not interpreted
    block_d, block_v = power_of_two(width, 16), power_of_two(value_width, 16)
    largest = max(block_d, block_v)
    if wide:
        block_m, block_n, warps, stages = (32, 32, 8, 2) if largest <= 64 else (16, 16, 8, 2)
    elif largest <= 128:
        case = kernel, 64 if largest <= 64 else 128
        block_m, block_n, warps, stages = AMPERE_TILES.get(case, ATTENTION_TILES[case]) if capability < (9, 0) else ATTENTION_TILES[case]
    else:
        block_m, block_n, warps, stages = (32, 16, 8, 2) if largest <= 256 else (16, 16, 8, 2)
    if interpreted and keys > KEYS_PER_SPLIT:
        block_n = 256
    if power_of_two(queries, 16) < block_m:  # else the same tile, which would spill with fewer warps
        block_m = power_of_two(queries, 16)
        warps = min(warps, 4)
    chunk, splits = max(keys, 1), 1
    if queries <= SPLIT_QUERIES and keys > 2 * KEYS_PER_SPLIT:
        chunk = ceil_div(max(KEYS_PER_SPLIT, ceil_div(keys, MAX_SPLITS)), block_n) * block_n
        splits = ceil_div(keys, chunk)
    return Attention(block_m, block_n, block_d, block_v, warps, stages, chunk, splits)


def by_tma(launch: Attention, wide: bool, capability: tuple[int, int], queries: int) -> bool:
    """Whether keys and values are worth descriptors: 16 bits, whole tiles of queries, no split; and rows that a descriptor can have."""
    return (
        not wide and capability >= (9, 0) and launch.splits == 1 and queries >= SPLIT_QUERIES and max(launch.block_d, launch.block_v) <= 128
    )


@dataclass(frozen=True)
class Segment:
    """Tiles of segment_attention: edges x heads x width; a row of more than `run` edges is split into runs of so many."""

    block_e: int
    block_h: int
    block_d: int
    block_v: int
    run: int
    num_warps: int


def segment(heads: int, width: int, value_width: int) -> Segment:
    """For segment_attention: as many heads as fit, since the rows of an edge are gathered once for all heads of a tile."""
    block_d, block_v = power_of_two(width, 16), power_of_two(value_width, 16)
    largest = max(block_d, block_v)
    block_h = min(power_of_two(heads), max(1, 512 // largest))
    block_e = max(4, min(16, 2048 // (block_h * largest)))
    return Segment(block_e, block_h, block_d, block_v, 256, max(1, min(4, block_e * block_h * largest // 512)))


@dataclass(frozen=True)
class Retrieval:
    """Tiles of retrieval_attention: memories of one query that are gathered at a time, whole rows."""

    block_k: int
    block_d: int
    block_v: int
    num_warps: int


def retrieval(slots: int, width: int, value_width: int) -> Retrieval:
    block_d, block_v = power_of_two(width, 16), power_of_two(value_width, 16)
    block_k = min(power_of_two(slots), max(4, 2048 // max(block_d, block_v)))
    return Retrieval(block_k, block_d, block_v, 4)


def quantized_attention(rows: int, keys: int, width: int, value_width: int, wide: bool, interpreted: bool = False) -> Attention:
    """For quantized_attention: `rows` queries of all heads that share a key head; `wide`: float32."""
    block_d, block_v = power_of_two(width, 16), power_of_two(value_width, 16)
    largest = max(block_d, block_v)
    if wide:
        block_m, block_n, warps = (16, 32, 4) if largest <= 64 else (16, 16, 8)
    else:
        block_m, block_n, warps = 32 if largest <= 128 else 16, 64 if largest <= 64 else 32 if largest <= 128 else 16, 4
    block_m, block_n = min(power_of_two(rows, 16), block_m), 256 if interpreted else block_n
    chunk = ceil_div(max(KEYS_PER_SPLIT, ceil_div(keys, MAX_SPLITS)), block_n) * block_n
    return Attention(block_m, block_n, block_d, block_v, warps, 2, chunk, max(ceil_div(keys, chunk), 1))


@dataclass(frozen=True)
class Link:
    """Tiles of a link matrix: rows x columns, and the read heads; `splits` blocks of rows."""

    block_m: int
    block_n: int
    block_r: int
    splits: int
    num_warps: int


def link(rows: int, heads: int, backward: bool) -> Link:
    block_m = 32 if backward else 64
    return Link(block_m, 32, power_of_two(heads, 16), ceil_div(rows, block_m), 4)


@dataclass(frozen=True)
class Bag:
    """Tiles of weighted_bag: rows that are gathered at a time, and columns."""

    block_j: int
    block_d: int
    num_warps: int


def weighted_bag(width: int) -> Bag:
    """For weighted_bag: columns are cut into strips, so the width has no limit."""
    block_d = min(256, power_of_two(width, 16))
    return Bag(max(16, 2048 // block_d) if block_d < 128 else 16, block_d, 4)


@dataclass(frozen=True)
class Hopfield:
    """Tiles of hopfield_retrieve: queries, patterns, and whole rows of patterns and values."""

    block_m: int
    block_n: int
    block_d: int
    block_v: int
    num_warps: int
    num_stages: int


def hopfield(queries: int, width: int, value_width: int, wide: bool) -> Hopfield:
    """For hopfield_retrieve, whose states are float32; `wide`: the patterns too. Tiles that compile without spills."""
    block_d, block_v = power_of_two(width, 16), power_of_two(value_width, 16)
    largest = max(block_d, block_v)
    block_m, block_n = (32, 16 if wide else 32) if largest <= 64 else (16, 16)
    return Hopfield(min(block_m, power_of_two(queries, 16)), block_n, block_d, block_v, 4 if largest <= 64 else 8, 2)


MAX_SLOTS = 64  # of a running top-k: two sets of so many pairs a query lie in registers
MAX_TOPK_WIDTH = 256


@dataclass(frozen=True)
class TopkRead:
    """Tiles of topk_read: queries x rows that are scored at a time, whole rows; the rows are split to fill the device."""

    block_q: int
    block_n: int
    block_d: int
    block_v: int
    slots: int
    splits: int
    rows_per_split: int
    num_warps: int


def topk_read(queries: int, rows: int, k: int, width: int, value_width: int, interpreted: bool) -> TopkRead:
    """`queries`: of all entries."""
    block_d, block_v = power_of_two(width, 16), power_of_two(value_width, 16)
    slots = max(power_of_two(k), 2)
    block_n = max(64 if interpreted or block_d <= 128 else 32, slots)
    splits = min(3, ceil_div(rows, 64)) if interpreted else min(64, ceil_div(rows, 4096), ceil_div(512, ceil_div(max(queries, 1), 16)))
    splits = max(splits, 1)
    rows_per_split = max(ceil_div(ceil_div(rows, splits), block_n) * block_n, block_n)
    return TopkRead(16, block_n, block_d, block_v, slots, max(ceil_div(rows, rows_per_split), 1), rows_per_split, 4)

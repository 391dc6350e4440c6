"""Helpers of the store's tests: keys as Python's, and, of the log's, keys and values by number, and what a log holds as a dict."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from memkernels.store.log import KeyBatch, Log, Schema

WIDTH = 6
SMALL = Schema("int64", {"value": ((WIDTH,), torch.float32), "stamp": ((), torch.int64)})
ROW = 32  # bytes of a row of SMALL
SEGMENT = 4096 + 40 * ROW  # 40 rows a segment
needs_lmdb = pytest.mark.skipif(importlib.util.find_spec("lmdb") is None, reason="lmdb is not installed")
ENGINES = ["sqlite", pytest.param("lmdb", marks=needs_lmdb)]


def plain(keys):
    """Keys as a store gives them, as a list."""
    return keys.tolist() if isinstance(keys, torch.Tensor) else keys


def ints(keys):
    return KeyBatch("int64", ints=torch.tensor(list(keys), dtype=torch.int64))


def texts(kind, keys):
    raw = [key.encode() if isinstance(key, str) else key for key in keys]
    data = torch.tensor(list(b"".join(raw)), dtype=torch.uint8)
    return KeyBatch(kind, data=data, offsets=torch.tensor([0, *map(len, raw)]).cumsum(0))


def keys_of(batch):
    if batch.ints is not None:
        return batch.ints.tolist()
    raw, offsets = bytes(batch.data.tolist()), batch.offsets.tolist()
    found = [raw[a:b] for a, b in itertools.pairwise(offsets)]
    return [key.decode() for key in found] if batch.type == "str" else found


def values(stamps):
    """Rows whose every element tells the stamp."""
    stamp = torch.tensor(list(stamps), dtype=torch.int64)
    return {"value": (stamp[:, None] * 8 + torch.arange(WIDTH)).float(), "stamp": stamp}


def put(log, keys, stamp):
    keys = list(keys)
    return log.append(ints(keys), values([stamp] * len(keys)))


def apply(rows, batches):
    """Batches of replay or refresh on a dict of keys to rows."""
    for batch, found in batches:
        for key, row in zip(keys_of(batch), found.tolist()):
            rows.pop(key, None) if row < 0 else rows.__setitem__(key, row)
    return rows


def look(log, rows):
    """{key: stamp} of a dict of rows; every element of every row must agree."""
    out, chunks = {}, log.chunks()
    for key, row in rows.items():
        chunk = next(c for c in chunks if c.first_row <= row < c.first_row + c.rows)
        stamp = int(chunk.columns["stamp"][row - chunk.first_row])
        assert torch.equal(chunk.columns["value"][row - chunk.first_row], values([stamp])["value"][0]), (key, row, stamp)
        out[key] = stamp
    return out


def contents(log):
    return look(log, apply({}, log.replay()))


def stored(path):
    with Log.open(path) as log:
        report = log.verify()
        assert report.ok, report
        return contents(log)


def new(path, engine="sqlite", **kwargs):
    return Log.create(path, SMALL, engine=engine, segment_bytes=kwargs.pop("segment_bytes", SEGMENT), **kwargs)

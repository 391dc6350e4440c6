"""The spec of `retrieval_attention`."""

from __future__ import annotations

import torch

from memkernels.ops.retrieval_attention import retrieval_attention
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample
from memkernels.testing.specs.attention import near_equal


def _eager(query, key, value, memory_key, memory_value, index, is_causal=True, scale=None, memory_bias=None, window=None, return_lse=False):
    if window is not None or return_lse:
        raise NotImplementedError("window" if window is not None else "return_lse")
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    group, count = query.shape[1] // key.shape[1], index.shape[-1]
    if group > 1:
        key, value, memory_key, memory_value = (t.repeat_interleave(group, 1) for t in (key, value, memory_key, memory_value))
    rows, absent = index.clamp(min=0).flatten(2)[..., None], index < 0
    keys, values = (m.gather(2, rows.expand(-1, -1, -1, m.shape[-1])).unflatten(2, index.shape[2:]) for m in (memory_key, memory_value))
    retrieved = torch.einsum("bhqd,bhqkd->bhqk", query, keys) * scale
    if memory_bias is not None:
        retrieved = retrieved + memory_bias
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(), -torch.inf)
    weights = torch.softmax(torch.cat((retrieved.masked_fill(absent, -torch.inf), scores), -1), -1)
    return torch.einsum("bhqk,bhqkd->bhqd", weights[..., :count], values) + weights[..., count:] @ value


def _draw_index(shape, dtype, generator):
    return torch.randint(2**40, shape, generator=generator)


def _in_range(inputs):
    """Rows of the memory and, one time in N + 1, nothing."""
    return {**inputs, "index": inputs["index"] % (inputs["memory_key"].shape[2] + 1) - 1}


def _twisted(change):
    return lambda inputs: change(_in_range(inputs))


def _duplicates(inputs):
    """Every query names a row twice, and all name row 0."""
    index = inputs["index"]
    index[..., 0] = 0
    index[..., -1] = index[..., -2]
    return inputs


def _some_absent(inputs):
    """A query without memories, one whose only memory comes last, and absent slots between."""
    inputs["index"][..., :2, :] = -1
    inputs["index"][..., 1, -1] = 1
    inputs["index"][..., 2:, 1] = -1
    return inputs


def _no_bias(inputs):
    """A bias of -inf: absent."""
    inputs["memory_bias"][..., 0, :] = -torch.inf
    inputs["memory_bias"][..., 1:, 2] = -torch.inf
    return inputs


def _nan_nobody_reads(inputs):
    """NaN in rows that nobody retrieves or whose bias is -inf, and in keys that no query sees."""
    inputs["memory_key"][..., 1, :], inputs["memory_value"][..., 1, :] = torch.nan, torch.nan
    inputs["memory_key"][..., 0, :], inputs["memory_value"][..., 0, :] = torch.nan, torch.nan
    inputs["key"][..., -1, :], inputs["value"][..., -1, :] = torch.nan, torch.nan
    inputs["index"] = torch.where(inputs["index"] == 1, -1, inputs["index"])
    inputs["memory_bias"][inputs["index"] == 0] = -torch.inf
    return inputs


def _peaked(inputs):
    """Scores in the hundreds: one memory or one key takes all."""
    return {**inputs, "query": 20 * inputs["query"], "key": 5 * inputs["key"], "memory_key": 5 * inputs["memory_key"]}


def _far(inputs):
    """Scores of about 1e7, where keys come in equal pairs and each row is retrieved twice: whatever wins, two share it.

    Their gradients come from where the query is 0 and rows differ, so that no sum cancels.
    """
    query, key, half = 4e3 * inputs["query"], 2e3 * inputs["key"], inputs["query"].shape[-1] // 2
    query[..., half:] = 0
    key[..., 1::2, :half] = key[..., ::2, :half]
    index = inputs["index"]
    index[..., 1::2] = index[..., ::2]
    return {**inputs, "query": query, "key": key, "memory_key": 2e3 * inputs["memory_key"], "index": index}


def _sizes(B=2, NH=2, Q=5, K=5, D=4, V=None, NHk=None, N=6, k=3):
    return dict(B=B, NH=NH, NHk=NH if NHk is None else NHk, Q=Q, K=K, D=D, V=D if V is None else V, N=N, k=k)


def _sample(name, sizes, options=None, present=(), twist=None, hard=False):
    return Sample(name, sizes, options or {}, present, _in_range if twist is None else _twisted(twist), hard)


def _wrong_index(inputs, options):
    inputs["index"][1, 0, 2, 1] = 6


def _negative_index(inputs, options):
    inputs["index"][0, 0, 0, 0] = -2


def _wrong_index_dtype(inputs, options):
    inputs["index"] = inputs["index"].short()


def _wrong_slots(inputs, options):
    inputs["memory_bias"] = inputs["query"].new_zeros(2, 2, 5, 4)


def _wrong_heads(inputs, options):
    inputs["query"], inputs["index"] = inputs["query"].new_zeros(2, 3, 5, 4), inputs["index"].new_zeros(2, 3, 5, 3)


def _wrong_memory(inputs, options):
    inputs["memory_value"] = inputs["memory_value"].new_zeros(2, 2, 7, 4)


def _bytes(d, s, passes):
    local = d["NH"] * d["Q"] * (d["D"] + d["V"]) + d["NHk"] * d["K"] * (d["D"] + d["V"])
    return d["B"] * (s * (local + d["NH"] * d["Q"] * d["k"] * (d["D"] + d["V"])) + 8 * d["NH"] * d["Q"] * d["k"]) * passes


_BIG = dict(B=1, NH=8, NHk=8, D=64, V=64)
SPEC = OpSpec(
    name="retrieval_attention",
    function=retrieval_attention,
    inputs={
        "query": Input("B NH Q D"),
        "key": Input("B NHk K D"),
        "value": Input("B NHk K V"),
        "memory_key": Input("B NHk N D"),
        "memory_value": Input("B NHk N V"),
        "index": Input("B NH Q k", _draw_index, torch.int64),
        "memory_bias": Input("B NH Q k", optional=True),
    },
    samples=(
        _sample("typical", _sizes()),
        _sample("everything", _sizes(NH=4, NHk=2, V=3), dict(return_lse=True, scale=0.3), ("memory_bias",), _duplicates),
        _sample("all_keys", _sizes(Q=4, K=9), dict(is_causal=False)),
        _sample("window", _sizes(Q=9, K=6, k=2), dict(window=(1, 0), return_lse=True), ("memory_bias",)),
        _sample("absent", _sizes(), dict(return_lse=True), (), _some_absent),
        _sample("no_bias", _sizes(), dict(window=(0, 0)), ("memory_bias",), _no_bias),
        _sample("one", _sizes(B=1, NH=1, Q=1, K=1, D=1, N=1, k=2), dict(is_causal=False)),
        _sample("blocks", _sizes(B=1, NH=2, NHk=1, Q=37, K=150, D=19, V=35, N=90, k=21), dict(is_causal=False, return_lse=True)),
        _sample("unread", _sizes(K=7), dict(return_lse=True), ("memory_bias",), _nan_nobody_reads, hard=True),
        _sample("peaked", _sizes(Q=6, K=40, D=16, k=9), dict(return_lse=True), (), _peaked, hard=True),
        _sample("near_equal", _sizes(Q=12, K=12, D=16), dict(return_lse=True), (), near_equal("value", "memory_value"), hard=True),
        _sample("far", _sizes(B=1, Q=6, K=20, D=16, N=20, k=20), dict(is_causal=False), (), _far, hard=True),
        _sample("far_late", _sizes(B=1, Q=20, K=20, D=16, N=20, k=20), dict(is_causal=False), (), _far, hard=True),
        _sample("no_batch", _sizes(B=0)),
        _sample("no_queries", _sizes(Q=0)),
        _sample("no_keys", _sizes(K=0), dict(return_lse=True), ("memory_bias",), _some_absent),
        _sample("no_memories", _sizes(N=0), dict(return_lse=True)),
        _sample("no_slots", _sizes(k=0), dict(return_lse=True), ("memory_bias",)),
        _sample("no_width", _sizes(D=0, V=4)),
        _sample("no_value_width", _sizes(V=0), dict(return_lse=True)),
    ),
    bench=(
        _sample("S512_k32_N65536", dict(_BIG, Q=512, K=512, N=65536, k=32)),
        _sample("S2048_k32_N65536", dict(_BIG, Q=2048, K=2048, N=65536, k=32)),
    ),
    peers={"eager": _eager},
    bytes=lambda d, s: _bytes(d, s, 1),
    bytes_backward=lambda d, s: _bytes(d, s, 2) + s * d["B"] * d["NHk"] * d["N"] * (d["D"] + d["V"]),
    errors=(
        ErrorCase("scale", lambda i, o: o.update(scale=float("nan")), ValueError, r"scale: expected a finite number, got nan"),
        ErrorCase("index", _wrong_index, IndexError, r"retrieval_attention: index: expected -1 or rows 0 to N-1=5, got .*6"),
        ErrorCase("negative", _negative_index, IndexError, r"retrieval_attention: index: expected -1 .*got -2"),
        ErrorCase("index_dtype", _wrong_index_dtype, TypeError, r"retrieval_attention: index: expected int64 or int32, got int16"),
        ErrorCase("slots", _wrong_slots, ValueError, r"retrieval_attention: memory_bias: expected .*k=3.*got .*4\)"),
        ErrorCase("heads", _wrong_heads, ValueError, r"retrieval_attention: key: expected a head count that divides .*3, got .*2, 2, 5, 4"),
        ErrorCase("memory", _wrong_memory, ValueError, r"retrieval_attention: memory_value: expected .*N=6.*got .*7"),
        ErrorCase("window", lambda i, o: o.update(window=(-2, 0)), ValueError, r"retrieval_attention: window: expected .*got \(-2, 0\)"),
    ),
    rows=(("query", 0), ("key", 0), ("value", 0), ("memory_key", 0), ("memory_value", 0)),
    gaps=("On a GPU, an index outside -1 .. N - 1 counts as absent instead of being refused.",),
)

"""The spec of `attention_varlen`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from memkernels.ops.attention_varlen import attention_varlen
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample
from memkernels.testing.specs.attention import near_equal


def _starts(shape, dtype, generator):
    """All sequences are empty; a twist then cuts the tokens."""
    return torch.zeros(shape, dtype=torch.int64)


def _cuts(tokens, shares):
    """Where the sequences begin if they have these shares of the tokens; the last share is left over."""
    steps = torch.tensor([0, *shares]).cumsum(0)
    return steps[:-1] * tokens // max(int(steps[-1]), 1)


def ragged(inputs):
    """Sequences of many lengths: one token, none, none on one side, the longest in the middle; some tokens are in none."""
    count = inputs["cu_seqlens_q"].shape[0] - 1
    of_query, of_key = [[(3, 0, 9, 1, 0, 5, 2)[(i + o) % 7] for i in range(count)] for o in (0, 1)]
    return {
        "cu_seqlens_q": _cuts(inputs["query"].shape[0], [*of_query, 1 if count else 0]),
        "cu_seqlens_k": _cuts(inputs["key"].shape[0], [*of_key, 2 if count else 0]),
    }


def even(inputs):
    """All tokens, in sequences of almost equal lengths."""
    count = inputs["cu_seqlens_q"].shape[0] - 1
    return {name: _cuts(inputs[of].shape[0], [1] * count + [0]) for name, of in (("cu_seqlens_q", "query"), ("cu_seqlens_k", "key"))}


def spread(inputs):
    """Lengths from a tenth of the longest up to it, in no order; the same on both sides."""
    count = inputs["cu_seqlens_q"].shape[0] - 1
    cuts = _cuts(inputs["query"].shape[0], [2 + 18 * (7 * i % count) // max(count - 1, 1) for i in range(count)] + [0])
    return {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts}


def _peaked(inputs):
    """Scores in the hundreds: one key takes all."""
    return {**even(inputs), "query": 20 * inputs["query"], "key": 10 * inputs["key"]}


def _lost(inputs):
    """Keys and values in no sequence are not finite; so are queries."""
    given = {**inputs, **ragged(inputs)}
    ends = {"query": "cu_seqlens_q", "key": "cu_seqlens_k", "value": "cu_seqlens_k"}
    for name, starts in ends.items():
        given[name] = given[name].clone()
        given[name][given[starts][-1] :] = float("nan") if name != "query" else 0
    return given


def _sequences(cu_seqlens_q, cu_seqlens_k):
    return zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()))


def _mask(queries, keys, o, device):
    away = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    away = away - (keys - queries if o.get("causal", "bottom-right") == "bottom-right" else 0)
    left, right = o.get("window") or (None, None)
    right = 0 if o.get("is_causal") else right
    seen = torch.ones_like(away, dtype=torch.bool)
    seen = seen if left is None or left < 0 else seen & (away >= -left)
    return seen if right is None or right < 0 else seen & (away <= right)


def _eager(query, key, value, cu_seqlens_q, cu_seqlens_k, scale=None, softcap=None, return_lse=False, **o):
    """Sequence by sequence."""
    group = query.shape[1] // max(key.shape[1], 1)
    scale = max(query.shape[2], 1) ** -0.5 if scale is None else scale
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)
    for (q, q_end), (k, k_end) in _sequences(cu_seqlens_q, cu_seqlens_k):
        if q == q_end or k == k_end:
            continue
        scores = torch.einsum("qhd,khd->hqk", query[q:q_end], key[k:k_end].repeat_interleave(group, 1)) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_mask(q_end - q, k_end - k, o, query.device), -torch.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        out[q:q_end] = torch.einsum("hqk,khv->qhv", weights, value[k:k_end].repeat_interleave(group, 1))
        lse[q:q_end] = torch.logsumexp(scores.to(lse.dtype), -1).T
    return (out, lse) if return_lse else out


def _plain(options):
    lacking = [name for name in options if name not in ("scale", "is_causal")]
    if lacking:
        raise NotImplementedError(", ".join(lacking))


def _sdpa(query, key, value, cu_seqlens_q, cu_seqlens_k, **options):
    """A loop of calls of torch's attention."""
    _plain(options)
    parts, enable_gqa = [], query.shape[1] != key.shape[1]
    for (q, q_end), (k, k_end) in _sequences(cu_seqlens_q, cu_seqlens_k):
        rows, keys, values = (t.transpose(0, 1)[None] for t in (query[q:q_end], key[k:k_end], value[k:k_end]))
        parts.append(F.scaled_dot_product_attention(rows, keys, values, enable_gqa=enable_gqa, **options)[0].transpose(0, 1))
    return torch.cat(parts)


def _padded(query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal=False, **options):
    """One call of torch's attention on padded sequences with a mask."""
    _plain(options)
    lengths, keys = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    parts = [t.split(n.tolist()) for t, n in ((query, lengths), (key, keys), (value, keys))]
    rows, padded, values = (torch.nn.utils.rnn.pad_sequence(list(t), batch_first=True).transpose(1, 2) for t in parts)
    mask = (torch.arange(padded.shape[2]) < keys[:, None])[:, None, None]
    if is_causal:
        mask = mask & torch.ones(rows.shape[2], padded.shape[2], dtype=torch.bool).tril()
    out = F.scaled_dot_product_attention(rows, padded, values, mask, enable_gqa=query.shape[1] != key.shape[1], **options)
    return out.transpose(1, 2)[torch.arange(out.shape[2]) < lengths[:, None]]


def _sizes(S=4, Tq=11, Tk=13, NH=2, D=4, V=None, NHk=None):
    return dict(S=S, Tq=Tq, Tk=Tk, NH=NH, NHk=NH if NHk is None else NHk, D=D, V=D if V is None else V)


def _wrong_heads(inputs, options):
    inputs["query"] = inputs["query"].new_zeros(11, 3, 4)


def _no_starts(inputs, options):
    inputs.update(dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), torch.zeros(0, dtype=torch.int64)))


def _tokens(d):
    return (d["NH"] * d["Tq"] + d["NHk"] * d["Tk"]) * (d["D"] + d["V"])


def _replaced(name, values):
    def change(inputs, options):
        inputs[name] = torch.tensor(values)

    return change


SPEC = OpSpec(
    name="attention_varlen",
    function=attention_varlen,
    inputs={
        "query": Input("Tq NH D"),
        "key": Input("Tk NHk D"),
        "value": Input("Tk NHk V"),
        "cu_seqlens_q": Input("S+1", _starts, torch.int64),
        "cu_seqlens_k": Input("S+1", _starts, torch.int64),
    },
    samples=(
        Sample("typical", _sizes(), {}, (), even),
        Sample("ragged", _sizes(S=7, Tq=21, Tk=30, V=5), {}, (), ragged),
        Sample("lse", _sizes(S=2, NHk=1), dict(is_causal=True, return_lse=True), (), even),
        Sample("top_left", _sizes(Tq=17, Tk=9), dict(is_causal=True, causal="top-left", scale=0.3), (), even),
        Sample("window", _sizes(S=2, Tq=9, Tk=16), dict(window=(2, 1)), (), even),
        Sample("softcap", _sizes(NH=4, NHk=2), dict(softcap=1.5, is_causal=True, return_lse=True), (), ragged),
        Sample("groups", _sizes(S=3, NH=6, NHk=2, D=3, V=2), dict(window=(None, 0)), (), ragged),
        Sample("blocks", _sizes(S=3, Tq=220, Tk=300, NH=1, D=17), dict(is_causal=True), (), ragged),
        Sample("causal", _sizes(S=5, Tq=19, Tk=23), dict(is_causal=True, return_lse=True), (), ragged),
        Sample("one", _sizes(S=1, Tq=1, Tk=1, NH=1, D=1), {}, (), even),
        Sample("empty", _sizes(S=3), dict(return_lse=True)),
        Sample("peaked", _sizes(S=3, Tq=16, Tk=60, D=16), {}, (), _peaked, hard=True),
        Sample("near_equal", _sizes(S=2, Tq=16, Tk=24, D=16), {}, (), near_equal("value", after=ragged), hard=True),
        Sample("lost", _sizes(), dict(return_lse=True), (), _lost, hard=True),
        Sample("no_sequences", _sizes(S=0), {}, (), even),
        Sample("no_keys", _sizes(Tk=0), dict(return_lse=True), (), even),
    ),
    bench=(
        Sample("S16", _sizes(16, 8800, 8800, 8, 64), {}, (), spread),
        Sample("S16_causal", _sizes(16, 8800, 8800, 8, 64), dict(is_causal=True), (), spread),
    ),
    peers={"eager": _eager, "sdpa": _sdpa, "padded": _padded},
    bytes=lambda d, s: s * _tokens(d),
    bytes_backward=lambda d, s: 2 * s * _tokens(d),
    errors=(
        ErrorCase("scale", lambda i, o: o.update(scale=float("nan")), ValueError, r"scale: expected a finite number, got nan"),
        ErrorCase("heads", _wrong_heads, ValueError, r"attention_varlen: key: expected a divisor of 3 heads, got .*13, 2, 4"),
        ErrorCase("begin", _replaced("cu_seqlens_q", [1, 2, 3, 4, 5]), ValueError, r"cu_seqlens_q: expected .*from 0.*Tq=11, got 1 to 5"),
        ErrorCase("order", _replaced("cu_seqlens_k", [0, 4, 3, 5, 9]), ValueError, r"cu_seqlens_k: expected .*decrease.*got 4 before 3"),
        ErrorCase("end", _replaced("cu_seqlens_k", [0, 4, 5, 6, 14]), ValueError, r"cu_seqlens_k: expected .*Tk=13, got 0 to 14"),
        ErrorCase("sizes", _replaced("cu_seqlens_k", [0, 4]), ValueError, r"attention_varlen: cu_seqlens_k: expected \[S\+1\].*S=4"),
        ErrorCase("none", _no_starts, ValueError, r"cu_seqlens_q: expected at least 1 element"),
        ErrorCase("dtype", _replaced("cu_seqlens_q", [0.0, 1.0]), TypeError, r"cu_seqlens_q: expected int64 or int32, got float32"),
        ErrorCase("softcap", lambda i, o: o.update(softcap=0), ValueError, r"attention_varlen: softcap: expected a positive number, got 0"),
    ),
    gaps=("In half precision, a query that sees more than 128 keys of nearly equal values: as in attention.",),
)  # fmt: skip

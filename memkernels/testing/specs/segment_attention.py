"""The spec of `segment_attention`."""

from __future__ import annotations

import torch

from memkernels.ops.segment_attention import segment_attention
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample
from memkernels.testing.specs.attention import near_equal

_HALF = 2**20  # an edge is drawn as one number: source * _HALF + node, each a fraction of _HALF


def _edges(shape, dtype, generator):
    return torch.randint(0, _HALF**2, shape, generator=generator)


def _offsets(shape, dtype, generator):
    return torch.zeros(shape, dtype=torch.int64)  # a graph's twist counts them


def evenly(fraction, nodes):
    """Every node as likely as any other."""
    return (fraction * nodes).long()


def zipf(fraction, nodes):
    """Node i with a probability that falls as 1 / (i + 1)."""
    return (nodes**fraction).long().clamp(1, max(nodes, 1)) - 1


def graph(node=evenly, source=evenly, change=None):
    """A twist that makes a graph of the drawn numbers: how nodes and sources are chosen, and a further change of the inputs."""

    def twist(inputs):
        nodes, sources = inputs["ptr"].shape[0] - 1, inputs["key"].shape[0]
        drawn = inputs["index"] if nodes and sources else inputs["index"][:0]
        ends = node((drawn % _HALF).double() / _HALF, nodes).sort(stable=True).values
        begins = source((drawn // _HALF).double() / _HALF, sources)
        ptr = torch.searchsorted(ends, torch.arange(nodes + 1))
        made = {**inputs, "ptr": ptr, "index": begins}
        if inputs["edge_bias"] is not None:
            made["edge_bias"] = inputs["edge_bias"][: drawn.shape[0]]
        return made if change is None else change(made)

    return twist


def _blind(inputs):
    """The edges of the first node that has some are taken away from head 0, some others too; what only they would read is NaN."""
    bias, index = inputs["edge_bias"].clone(), inputs["index"]
    first = int((inputs["ptr"] > 0).nonzero()[0]) - 1
    bias[: int(inputs["ptr"][first + 1]), :1] = -torch.inf
    bias[::5] = -torch.inf
    hidden = torch.ones(inputs["key"].shape[:2], dtype=torch.bool)
    for edge, source in enumerate(index.tolist()):
        hidden[source] &= bias[edge] == -torch.inf
    key, value = (inputs[name].masked_fill(hidden[..., None], torch.nan) for name in ("key", "value"))
    return {**inputs, "edge_bias": bias, "key": key, "value": value}


def _duplicates(inputs):
    """Every edge but the last one of a node is that of before."""
    return {**inputs, "index": inputs["index"][torch.arange(inputs["index"].shape[0]) // 3 * 3]}


def _far(inputs):
    """Scores in the thousands: one edge takes all."""
    return {**inputs, "query": 60 * inputs["query"], "key": 40 * inputs["key"]}


def _gathered(query, key, value, ptr, index, edge_bias=None, scale=None, return_lse=False):
    """What graph libraries do: every edge's rows as tensors of their own, softmax by scattering."""
    node = torch.repeat_interleave(torch.diff(ptr), output_size=index.shape[0])
    queries, keys, values = query[node], key[index], value[index]
    scores = (queries * keys).sum(-1) * (max(query.shape[-1], 1) ** -0.5 if scale is None else scale)
    if edge_bias is not None:
        scores = scores + edge_bias
    at = node[:, None].expand_as(scores)
    top = scores.new_full((query.shape[0], query.shape[1]), -torch.inf).scatter_reduce(0, at, scores.detach(), "amax")
    powers = (scores - top[node]).exp()
    total = torch.zeros_like(top).scatter_add(0, at, powers)
    weighted = values * (powers / (total[node] + 1e-16))[..., None]
    out = query.new_zeros(*query.shape[:2], value.shape[2]).scatter_add(0, node[:, None, None].expand_as(weighted), weighted)
    return (out, top + total.log()) if return_lse else out


def _sizes(Nd=5, Ns=6, E=17, NH=2, D=4, V=3):
    return dict(Nd=Nd, Ns=Ns, E=E, NH=NH, D=D, V=V)


def _wrong_ptr(inputs, options):
    inputs["ptr"] = inputs["ptr"].flip(0)


def _wrong_end(inputs, options):
    inputs["ptr"] = torch.cat((inputs["ptr"][:-1], inputs["ptr"][-1:] + 1))


def _wrong_index(value):
    def change(inputs, options):
        inputs["index"] = inputs["index"].clone()
        inputs["index"][3] = value

    return change


def _wrong_index_dtype(inputs, options):
    inputs["index"] = inputs["index"].short()


def _wrong_bias(inputs, options):
    inputs["edge_bias"] = inputs["query"].new_zeros(17, 3)


BENCH = _sizes(20_000, 20_000, 200_000, 4, 16, 16)
LSE = dict(return_lse=True)
BIAS = ("edge_bias",)
POWER_LAW = graph(zipf, zipf)


SPEC = OpSpec(
    name="segment_attention",
    function=segment_attention,
    inputs={
        "query": Input("Nd NH D"),
        "key": Input("Ns NH D"),
        "value": Input("Ns NH V"),
        "ptr": Input("Nd+1", _offsets, torch.int64),
        "index": Input("E", _edges, torch.int64),
        "edge_bias": Input("E NH", optional=True),
    },
    samples=(
        Sample("typical", _sizes(), LSE, BIAS, graph()),
        Sample("plain", _sizes(Ns=5), {}, (), graph()),
        Sample("power_law", _sizes(Nd=31, Ns=29, E=90, D=16, V=16), dict(scale=0.4), (), POWER_LAW),
        Sample("one", _sizes(1, 1, 1, 1, 1, 1), {}, BIAS, graph()),
        Sample("isolated", _sizes(Nd=21, E=6), LSE, (), graph()),
        Sample("duplicates", _sizes(), {}, BIAS, graph(change=_duplicates)),
        Sample("blind", _sizes(Nd=7, Ns=9, E=30), LSE, BIAS, graph(change=_blind)),
        Sample("odd", _sizes(Nd=4, Ns=70, E=100, NH=3, D=37, V=21), {}, BIAS, graph()),
        Sample("hub", _sizes(Nd=5, Ns=4, E=1100, NH=2, D=5, V=17), LSE, BIAS, graph(zipf, zipf)),
        Sample("far", _sizes(Nd=9, E=40, D=16), LSE, (), graph(change=_far), hard=True),
        Sample("near_equal", _sizes(Nd=9, E=40, D=16, V=16), LSE, BIAS, graph(change=near_equal("value")), hard=True),
        Sample("no_nodes", _sizes(Nd=0), LSE, BIAS, graph()),
        Sample("no_sources", _sizes(Ns=0), LSE, BIAS, graph()),
        Sample("no_edges", _sizes(E=0), LSE, BIAS, graph()),
        Sample("no_heads", _sizes(NH=0), LSE, BIAS, graph()),
        Sample("no_width", _sizes(D=0), {}, BIAS, graph()),
        Sample("no_value_width", _sizes(V=0), LSE, BIAS, graph()),
    ),
    bench=(
        Sample("E200k_uniform", BENCH, {}, (), graph()),
        Sample("E200k_power_law", BENCH, {}, (), POWER_LAW),
    ),
    peers={"eager": _gathered},
    bytes=lambda d, s: s * d["NH"] * (d["D"] + d["V"]) * (d["Nd"] + d["Ns"]) + 8 * (d["E"] + d["Nd"]),
    bytes_backward=lambda d, s: 2 * s * d["NH"] * (d["D"] + d["V"]) * (d["Nd"] + d["Ns"]) + 8 * (d["E"] + d["Nd"]),
    errors=(
        ErrorCase("scale", lambda i, o: o.update(scale=float("nan")), ValueError, r"scale: expected a finite number, got nan"),
        ErrorCase("ptr", _wrong_ptr, ValueError, r"segment_attention: ptr: expected offsets from 0 to E=17 .*, got 17 to 0, decreasing"),
        ErrorCase("end", _wrong_end, ValueError, r"segment_attention: ptr: expected offsets from 0 to E=17 .*, got 0 to 18"),
        ErrorCase("index", _wrong_index(6), IndexError, r"segment_attention: index: expected values in 0\.\.Ns-1=5, got \d+\.\.6"),
        ErrorCase("negative", _wrong_index(-1), IndexError, r"segment_attention: index: expected values in 0\.\.Ns-1=5, got -1\.\.\d"),
        ErrorCase("index_dtype", _wrong_index_dtype, TypeError, r"segment_attention: index: expected int64 or int32, got int16"),
        ErrorCase("bias", _wrong_bias, ValueError, r"segment_attention: edge_bias: expected \[E NH\].*E=17.*got shape \(17, 3\)"),
    ),
    gaps=("On a GPU, ptr and index outside their range are clamped instead of refused.",),
)

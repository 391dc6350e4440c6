"""Attention along the edges of a graph in compressed rows (CSR): each node attends to its own neighbours."""

from __future__ import annotations

import torch

from memkernels import _compat
from memkernels._checks import Signature, as_index, check_flag, fail
from memkernels._registry import Arg, Out, define_op, new_empty
from memkernels.ops._attention import attention_products, softmax_scale
from memkernels.ops._recurrent import needs_gradients


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ptr: torch.Tensor,
    index: torch.Tensor,
    *,
    edge_bias: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of each node over the source nodes of its own edges.

    Formula:
        With e running over the edges ptr[i] .. ptr[i + 1] - 1 of node i, for each head:
        ``s[e] = scale * query[i] . key[index[e]] + edge_bias[e]``, ``lse[i] = log sum_e exp(s[e])``,
        ``out[i] = sum_e exp(s[e] - lse[i]) * value[index[e]]``.

    Args:
        query: "Nd NH D", one row a node that attends; float64, float32, bfloat16 or float16, any strides.
        key: "Ns NH D", one row a source node, same dtype and device.
        value: "Ns NH V"; V may differ from D.
        ptr: int64 or int32 "Nd+1", from 0 to E, not decreasing: the edges of node i are ptr[i] to ptr[i + 1] - 1.
        index: int64 or int32 "E", the source node of each edge, 0 to Ns - 1. An edge that occurs twice counts twice.
        edge_bias: "E NH", added to the scores, differentiable; -inf takes the edge away from that head.
        scale: factor of the scores, default 1 / sqrt(D).
        return_lse: also return the log-sum-exp.

    Returns:
        out: "Nd NH V", same dtype, contiguous; exactly 0 for a node without edges. With ``return_lse``: (out, lse "Nd NH"), lse float32
        (float64 for float64), natural logarithm, -inf for a node without edges.

    Gradients:
        To ``query``, ``key``, ``value`` and ``edge_bias``, also through ``lse``, of any order; finite for nodes without edges. A source
        node that no edge names gets 0. What it holds (NaN too) reaches nothing.

    Numerics:
        Sums and softmax in float32 (float64 for float64). Memory beyond inputs and outputs is O(nodes) and E integers: scores are computed
        again in backward, which goes along the transposed graph, each source summing its edges in their order. Deterministic; the number
        of threads changes nothing. Work is split by edges: a node of huge degree costs no more than as many edges elsewhere.

    Raises:
        ValueError: a size does not fit, a scale that is not finite, or ptr does not go from 0 to E without decreasing. IndexError: an
            index outside 0..Ns-1. Both look
        at the values on a CPU only; on a GPU, which would have to be waited for, they are clamped. TypeError: a dtype differs.

    Source:
        Shi et al., Masked Label Prediction (2021), equations 3 and 4; Velickovic et al., Graph Attention Networks (2018).

    Example:
        >>> import torch, memkernels as mk
        >>> x = torch.tensor([[[0.0]], [[0.0]], [[6.0]]])
        >>> mk.segment_attention(x, x, x, torch.tensor([0, 2, 2, 3]), torch.tensor([1, 2, 2])).flatten()
        tensor([3., 0., 6.])
    """
    ptr, index = as_index("segment_attention", "ptr", ptr), as_index("segment_attention", "index", index)
    dims = SIGNATURE(query, key, value, ptr, index, edge_bias)
    scale = softmax_scale("segment_attention", scale, dims["D"])
    if return_lse.__class__ is not bool:
        check_flag("segment_attention", "return_lse", return_lse)
    _check_graph(ptr, index, key)
    saving = needs_gradients((query, key, value, edge_bias))
    out, lse, _, _ = OP(query, key, value, ptr, index, edge_bias, scale, saving)
    return (out, lse) if return_lse else out


def _check_graph(ptr, index, key):
    """Reads the values only where that is free: on a CPU, outside of transforms and tracing; the C++ kernel looks in any case."""
    if torch.compiler.is_compiling():
        return
    edges, nodes = index.shape[0], key.shape[0]
    if _compat.integers_fit(ptr, 0, edges, _compat.SPANNING) is False:
        rising = bool((ptr[1:] >= ptr[:-1]).all())
        got = f"{int(ptr[0])} to {int(ptr[-1])}" + ("" if rising else ", decreasing in between")
        fail("segment_attention", "ptr", f"offsets from 0 to E={edges} that do not decrease", got)
    if _compat.integers_fit(index, 0, nodes - 1, _compat.ANY) is False:
        low, high = (int(end) for end in torch.aminmax(index))
        fail("segment_attention", "index", f"values in 0..Ns-1={nodes - 1}", f"{low}..{high}", IndexError)


def _allocate(query, key, value, ptr, index, edge_bias, scale, saving):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    nodes, heads, _ = query.shape
    shape = (nodes, heads, value.shape[2])
    exact = new_empty(query, shape, wide) if saving and query.dtype != wide else None
    return new_empty(query, shape), new_empty(query, (nodes, heads), wide), new_empty(query, (nodes, heads, 2), wide), exact


def _products(query, key, value, ptr, index, *_):
    return attention_products(index.shape[0] * query.shape[1], query.shape[2], value.shape[2])


# `stats`: of each node the maximum m of its scores and the sum of exp(score - m). `exact`: out of the half types before it was rounded:
# where a node has one edge, dout . out and dout . value cancel to nothing only if neither was.
SIGNATURE = Signature(
    "segment_attention", query="Nd NH D", key="Ns NH D", value="Ns NH V", ptr=("Nd+1", torch.int64), index=("E", torch.int64),
    edge_bias="E NH | None",
)  # fmt: skip
OP = define_op(
    "segment_attention",
    inputs=(
        Arg("query", batch=None),
        Arg("key", batch=None),
        Arg("value", batch=None),
        Arg("ptr", differentiable=False, batch=None),
        Arg("index", differentiable=False, batch=None),
        Arg("edge_bias", optional=True, batch=None),
    ),
    outputs=(
        Out("out", save=True, batch=None),
        Out("lse", batch=None),
        Out("stats", differentiable=False, save=True, batch=None),
        Out("exact", differentiable=False, save=True, batch=None),
    ),
    options="float scale, bool saving",
    allocate=_allocate,
    autocast="matmul",
    products=_products,
)

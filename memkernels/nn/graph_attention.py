"""`GraphAttention`: multi-head attention over the edges of a graph, and `csr_from_edges`, which brings a list of edges into its form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memkernels._checks import as_index, check_floating, check_tensor, fail
from memkernels._compat import jit_tracing, plain_call
from memkernels.nn._arguments import check_inputs, check_sizes, refuse_script
from memkernels.ops.segment_attention import segment_attention


def csr_from_edges(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups edges by the node they end at, in the order of the list: what `segment_attention` takes.

    Args:
        edge_index: int64 or int32 "2 E": row 0 the sources, row 1 the nodes they lead to, 0 to num_nodes - 1.
        num_nodes: nodes that attend.

    Returns:
        (ptr int64 "num_nodes+1", index int64 "E", order int64 "E"): the edges of node i are ptr[i] to ptr[i + 1] - 1, edge e comes from
        source index[e] and was edge order[e] of the list.

    Raises:
        ValueError, TypeError: not int64 or int32 "2 E". IndexError: a node outside 0..num_nodes-1 (looked at on a CPU only).

    Example:
        >>> csr_from_edges(torch.tensor([[4, 5, 6], [2, 0, 2]]), 3)
        (tensor([0, 1, 1, 3]), tensor([5, 4, 6]), tensor([1, 0, 2]))
    """
    edge_index = as_index("csr_from_edges", "edge_index", edge_index)
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        fail("csr_from_edges", "edge_index", "[2 E]", f"shape {tuple(edge_index.shape)}")
    if not jit_tracing():  # where sizes are tensors, so that the trace takes graphs of any
        check_sizes("csr_from_edges", 0, num_nodes=num_nodes)
    readable = not torch.compiler.is_compiling() and edge_index.device.type == "cpu" and plain_call((edge_index,))
    if readable and edge_index.numel():
        low, high = (int(v) for v in torch.aminmax(edge_index[1]))
        if low < 0 or high >= num_nodes:
            fail("csr_from_edges", "edge_index", f"nodes in 0..{num_nodes - 1}", f"{low}..{high}", IndexError)
    nodes, order = torch.sort(edge_index[1], stable=True)
    ptr = torch.searchsorted(nodes, torch.arange(num_nodes + 1, device=edge_index.device))
    return ptr, edge_index[0][order], order


class GraphAttention(nn.Module):
    """Each node attends to the nodes that edges lead from (the layer of Shi et al. that torch_geometric calls TransformerConv).

    ``out[i] = concat_h(sum_e softmax_e(q_h[i] . k_h[j] / sqrt(C) + b_h[e]) v_h[j]) + W_skip x[i]``, e running over the edges j -> i, with
    ``q = W_query x``, ``k = W_key x``, ``v = W_value x``, and ``b = W_edge edge_attr``. No row is copied an edge.

    Parameters have the names and shapes of TransformerConv's: lin_key, lin_query, lin_value (NH*C features), lin_skip (NH*C, or C without
    `concat`), so state_dicts load both ways for beta=False, edge_dim=None and root_weight=True. With `edge_dim` ours gives one number
    a head that is added to the score (lin_edge: edge_dim -> NH, no bias); TransformerConv adds a vector to key and value.

    Args:
        in_channels: features of a node, or a pair (of sources, of nodes that attend).
        out_channels: features C of a head.
        heads: NH.
        concat: heads are concatenated (NH*C features); else averaged (C).
        edge_dim: features of an edge; None: edges have none.
        bias: lin_key, lin_query, lin_value and lin_skip have biases.
        root_weight: what the node itself holds is added, through lin_skip.
        device, dtype: of the parameters.

    Source: Shi et al., Masked Label Prediction (2021), equations 3 to 5.

    Example:
        >>> layer = GraphAttention(16, 8, heads=4)
        >>> edges = torch.tensor([[0, 1, 2, 2], [1, 0, 0, 3]])
        >>> layer(torch.randn(4, 16), edges).shape
        torch.Size([4, 32])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        edge_dim: int | None = None,
        bias: bool = True,
        root_weight: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        sources, nodes = in_channels if isinstance(in_channels, (tuple, list)) else (in_channels, in_channels)
        check_sizes("GraphAttention", in_channels=sources, out_channels=out_channels, heads=heads)
        check_sizes("GraphAttention", in_channels=nodes, edge_dim=1 if edge_dim is None else edge_dim)
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.concat, self.edge_dim, self.root_weight = concat, edge_dim, root_weight
        kind: dict[str, Any] = dict(bias=bias, device=device, dtype=dtype)
        self.lin_key = nn.Linear(sources, heads * out_channels, **kind)
        self.lin_query = nn.Linear(nodes, heads * out_channels, **kind)
        self.lin_value = nn.Linear(sources, heads * out_channels, **kind)
        self.lin_edge = None if edge_dim is None else nn.Linear(edge_dim, heads, **{**kind, "bias": False})
        width = heads * out_channels if concat else out_channels
        self.lin_skip = nn.Linear(nodes, width, **kind) if root_weight else None

    def forward(
        self, x: Tensor | tuple[Tensor, Tensor], edge_index: Tensor | tuple[Tensor, ...], edge_attr: Tensor | None = None
    ) -> Tensor:
        """Attends.

        Args:
            x: "N in_channels", or a pair (of sources "Ns F", of nodes that attend "Nd F").
            edge_index: int64 or int32 "2 E", (source, node) of each edge, which is sorted first; or sorted already, (ptr "Nd+1", index "E")
                or what `csr_from_edges` returned: a graph that is used again need not be sorted again.
            edge_attr: "E edge_dim" if and only if the layer has an `edge_dim`, in the order of the edges as they are given (after
                `csr_from_edges`: of the list that it was made of).

        Returns:
            "Nd NH*C", or "Nd C" without `concat`. A node without edges gets what lin_skip gives it.

        Raises: ValueError, TypeError, IndexError, as `segment_attention` and `csr_from_edges` do.
        """
        if isinstance(x, (tuple, list)) and len(x) != 2:
            fail("GraphAttention", "x", "the nodes, or a pair of (sources, nodes that attend)", f"{len(x)} of them")
        sources, nodes = x if isinstance(x, (tuple, list)) else (x, x)
        self._check(sources, nodes, edge_attr)
        graph = csr_from_edges(edge_index, nodes.shape[0]) if isinstance(edge_index, Tensor) else edge_index
        if not isinstance(graph, (tuple, list)) or not 2 <= len(graph) <= 3:
            got = f"{len(graph)} of them" if isinstance(graph, (tuple, list)) else type(graph).__name__
            fail("GraphAttention", "edge_index", "a tensor [2 E], (ptr, index), or what csr_from_edges returned", got, TypeError)
        if edge_attr is not None and not jit_tracing():  # one row too many would be left out in silence
            check_tensor("GraphAttention", "edge_index", graph[1])
            if edge_attr.shape[0] != graph[1].shape[0]:
                fail("GraphAttention", "edge_attr", f"one row for each of {graph[1].shape[0]} edges", f"shape {tuple(edge_attr.shape)}")
        bias = None
        if self.lin_edge is not None and edge_attr is not None:
            bias = self.lin_edge(edge_attr)
            bias = bias[graph[2]] if len(graph) == 3 else bias
        query, key, value = (
            layer(rows).unflatten(-1, (self.heads, self.out_channels))
            for layer, rows in ((self.lin_query, nodes), (self.lin_key, sources), (self.lin_value, sources))
        )
        heads: Any = segment_attention(query, key, value, graph[0], graph[1], edge_bias=bias)
        out = heads.flatten(1) if self.concat else heads.mean(1)
        return out if self.lin_skip is None else out + self.lin_skip(nodes)

    def _check(self, sources: Any, nodes: Any, edge_attr: Any) -> None:
        check_inputs("GraphAttention", ("edge_attr",), x=sources, nodes=nodes, edge_attr=edge_attr, parameters=self.lin_query.weight)
        given: list[tuple[str, Any, str, int | None]] = [
            ("x", sources, "N", self.lin_key.in_features),
            ("x", nodes, "N", self.lin_query.in_features),
        ]
        if (edge_attr is None) != (self.lin_edge is None):
            expected = "None without edge_dim" if self.lin_edge is None else f"[E {self.edge_dim}]"
            fail("GraphAttention", "edge_attr", expected, "None" if edge_attr is None else "a tensor")
        if self.lin_edge is not None:
            given.append(("edge_attr", edge_attr, "E", self.edge_dim))
        for name, rows, letter, width in given:
            if rows.dim() != 2 or rows.shape[1] != width:
                fail("GraphAttention", name, f"[{letter} {width}]", f"shape {tuple(rows.shape)}")
        check_floating("GraphAttention", parameters=self.lin_query.weight, x=sources, nodes=nodes, edge_attr=edge_attr)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}, concat={self.concat}, edge_dim={self.edge_dim}"

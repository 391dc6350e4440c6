"""GraphAttention against its formula written out with a scatter softmax, and what it shares with torch_geometric's TransformerConv."""

import pytest
import torch

from memkernels.nn import GraphAttention, csr_from_edges

pytestmark = pytest.mark.timeout(300)


def power_law(nodes, sources, edges, seed=0):
    """Edges "2 E" in no order; both ends fall off as 1 / rank, so that most nodes have few edges and some none."""
    numbers = torch.Generator().manual_seed(seed)
    ends = (count ** torch.rand(edges, generator=numbers, dtype=torch.float64) for count in (sources, nodes))
    return torch.stack([t.long() - 1 for t in ends])


def formula(layer, x, edges, edge_attr=None):
    """The layer, edge by edge."""
    sources, nodes = x if isinstance(x, tuple) else (x, x)
    count, heads, width = nodes.shape[0], layer.heads, layer.out_channels
    query, key, value = (
        linear(rows)[at].view(-1, heads, width)
        for linear, rows, at in (
            (layer.lin_query, nodes, edges[1]),
            (layer.lin_key, sources, edges[0]),
            (layer.lin_value, sources, edges[0]),
        )
    )
    scores = (query * key).sum(-1) / width**0.5
    if edge_attr is not None:
        scores = scores + edge_attr @ layer.lin_edge.weight.T
    at = edges[1][:, None].expand_as(scores)
    top = scores.new_full((count, heads), -torch.inf).scatter_reduce(0, at, scores.detach(), "amax")
    powers = (scores - top[edges[1]]).exp()
    weights = powers / powers.new_zeros(count, heads).scatter_add(0, at, powers)[edges[1]]
    out = value.new_zeros(count, heads, width).index_add(0, edges[1], weights[..., None] * value)
    out = out.flatten(1) if layer.concat else out.mean(1)
    return out if layer.lin_skip is None else out + layer.lin_skip(nodes)


def gradients(layer, inputs, out):
    leaves = [*layer.parameters(), *(t for t in inputs if t is not None)]
    return torch.autograd.grad((out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).sum(), leaves)


@pytest.mark.parametrize("form", ("edges", "csr", "pair"))
@pytest.mark.parametrize("options", ({}, dict(concat=False), dict(edge_dim=3), dict(root_weight=False, edge_dim=2), dict(bias=False)))
def test_is_the_formula(options, form):
    torch.manual_seed(1)
    layer = GraphAttention((5, 7), 6, heads=3, **options)
    x = torch.randn(40, 5, requires_grad=True), torch.randn(60, 7, requires_grad=True)
    edges = power_law(60, 40, 400)
    graph = csr_from_edges(edges, 60)
    if form == "pair":
        edges = edges[:, graph[2]]
    attributes = torch.randn(400, layer.edge_dim, requires_grad=True) if layer.edge_dim else None
    found = layer(x, {"edges": edges, "csr": graph, "pair": graph[:2]}[form], attributes)
    wanted = formula(layer, x, edges, attributes)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(layer, (*x, attributes), found), gradients(layer, (*x, attributes), wanted)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_random_power_law_graphs(seed):
    torch.manual_seed(seed)
    layer, x = GraphAttention(16, 4, heads=2 + seed), torch.randn(300, 16)
    edges = power_law(300, 300, 2000, seed)
    assert torch.bincount(edges[1]).max() > 100 and torch.bincount(edges[1], minlength=300).min() == 0
    torch.testing.assert_close(layer(x, edges), formula(layer, x, edges), rtol=1e-4, atol=1e-5)


def test_parameters_are_those_of_transformer_conv():
    names = [f"lin_{part}.{kind}" for part in ("key", "query", "value", "skip") for kind in ("weight", "bias")]
    assert sorted(GraphAttention(5, 6, 2).state_dict()) == sorted(names)
    assert sorted(GraphAttention(5, 6, 2, bias=False).state_dict()) == sorted(names[::2])
    shapes = {n: tuple(p.shape) for n, p in GraphAttention((3, 5), 6, 2, concat=False, edge_dim=4).named_parameters()}
    assert shapes["lin_key.weight"] == shapes["lin_value.weight"] == (12, 3)
    assert shapes["lin_query.weight"] == (12, 5) and shapes["lin_skip.weight"] == (6, 5) and shapes["lin_edge.weight"] == (2, 4)


def test_node_without_edges_keeps_itself():
    layer, x = GraphAttention(4, 3), torch.randn(3, 4)
    torch.testing.assert_close(layer(x, torch.tensor([[0], [1]]))[[0, 2]], layer.lin_skip(x)[[0, 2]], rtol=0, atol=0)
    assert layer(x[:0], torch.zeros(2, 0, dtype=torch.int64)).shape == (0, 3)


def test_csr_from_edges():
    edges = power_law(50, 30, 300)
    ptr, index, order = csr_from_edges(edges, 52)
    for node in range(52):
        mine = (edges[1] == node).nonzero()[:, 0]
        assert torch.equal(order[ptr[node] : ptr[node + 1]], mine) and torch.equal(index[ptr[node] : ptr[node + 1]], edges[0][mine])


@pytest.mark.filterwarnings("ignore:.*(torch.jit.trace|TracerWarning|Converting a tensor)")
def test_traced_takes_graphs_of_any_size():
    layer, edges = GraphAttention(8, 4, heads=2), power_law(6, 6, 20)
    traced = torch.jit.trace(layer, (torch.randn(6, 8), edges))
    x, edges = torch.randn(9, 8), power_law(9, 9, 31)
    assert torch.equal(traced(x, edges), layer(x, edges))


def test_compiled():
    layer, x, edges = GraphAttention(8, 4, 2, edge_dim=3), torch.randn(20, 8), power_law(20, 20, 50)
    attributes = torch.randn(50, 3)
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fast(x, edges, attributes), layer(x, edges, attributes))


def edge():
    return torch.tensor([[0], [1]])


def with_attributes(attributes, edges=None):
    return GraphAttention(4, 2, edge_dim=2)(torch.ones(3, 4), edge() if edges is None else edges, attributes)


@pytest.mark.parametrize(
    "call, error, text",
    (
        (lambda: csr_from_edges(torch.zeros(3, 2, dtype=torch.int64), 1), ValueError, r"edge_index: expected \[2 E\], got shape \(3, 2\)"),
        (lambda: csr_from_edges(torch.zeros(2, 2), 1), TypeError, "edge_index: expected int64 or int32, got float32"),
        (lambda: csr_from_edges(torch.tensor([[0], [3]]), 3), IndexError, r"edge_index: expected nodes in 0\.\.2, got 3\.\.3"),
        (lambda: GraphAttention(4, 2)(torch.ones(3, 4), 5 * edge()), IndexError, r"edge_index: expected nodes in 0\.\.2, got 5\.\.5"),
        (lambda: GraphAttention(4, 2)(torch.ones(1, 4), 0 * edge() + torch.tensor([[3], [0]])), IndexError, "segment_attention: index"),
        (lambda: GraphAttention(4, 2)(torch.ones(3, 4), edge(), torch.ones(1, 2)), ValueError, "edge_attr: expected None"),
        (lambda: GraphAttention(4, 2, edge_dim=2)(torch.ones(3, 4), edge()), ValueError, "edge_attr: expected .E 2., got None"),
        (lambda: with_attributes(torch.ones(2, 2)), ValueError, r"edge_attr: expected one row for each of 1 edges, got shape \(2, 2\)"),
        (lambda: with_attributes(torch.ones(2, 2), csr_from_edges(edge(), 3)), ValueError, "edge_attr: expected one row for each of 1"),
        (lambda: with_attributes(torch.ones(0, 2)), ValueError, "edge_attr: expected one row for each of 1 edges"),
        (lambda: with_attributes(torch.ones(1, 3)), ValueError, r"edge_attr: expected \[E 2\], got shape \(1, 3\)"),
        (lambda: with_attributes(torch.ones(1, 2, dtype=torch.int64)), TypeError, "edge_attr: expected float32, got int64"),
        (lambda: GraphAttention(4, 2)(torch.ones(3, 5), edge()), ValueError, r"x: expected \[N 4\], got shape \(3, 5\)"),
        (lambda: GraphAttention(4, 2)(torch.ones(1, 3, 4), edge()), ValueError, r"x: expected \[N 4\], got shape \(1, 3, 4\)"),
        (lambda: GraphAttention(4, 2)(torch.ones(3, 4).double(), edge()), TypeError, "x: expected float32, got float64"),
        (lambda: GraphAttention(4, 2)(torch.ones(3, 4), (edge(),)), TypeError, "edge_index: expected a tensor .2 E., .* got 1 of them"),
        (lambda: GraphAttention(4, 2)(torch.ones(3, 4), None), TypeError, "edge_index: expected .* got NoneType"),
        (lambda: GraphAttention(4, 0), ValueError, "GraphAttention: out_channels"),
        (lambda: GraphAttention(4, 2, heads=1.5), TypeError, "GraphAttention: heads"),
    ),
)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_half_precision_under_autocast():
    layer, x, edges = GraphAttention(8, 4, 2), torch.randn(20, 8), power_law(20, 20, 50)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, edges)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())

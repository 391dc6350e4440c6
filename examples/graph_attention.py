"""Node classification on a graph whose degrees follow a power law, by two layers of graph attention.

Nodes belong to communities, most edges stay within one, and what a node itself holds tells its community badly: a layer has to collect it
from the neighbours. Two layers of memkernels.nn.GraphAttention are trained on a tenth of the labels, beside a model without edges.

python examples/graph_attention.py
"""

import time

import torch
import torch.nn.functional as F

import memkernels as mk

Graph = tuple[torch.Tensor, ...]

NODES, EDGES, CLASSES, FEATURES, HIDDEN, HEADS, STEPS = 2000, 12_000, 6, 16, 8, 4, 40


def community_graph() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features "N F", labels "N", edges "2 E": sources are drawn with a probability of about 1 / rank, nine of ten of the node's label."""
    labels = torch.randint(CLASSES, (NODES,))
    features = torch.randn(CLASSES, FEATURES)[labels] * 0.35 + torch.randn(NODES, FEATURES)
    nodes = torch.randint(NODES, (8 * EDGES,))
    sources = (NODES ** torch.rand(8 * EDGES)).long() - 1
    kept = (labels[nodes] == labels[sources]) | (torch.rand(8 * EDGES) < 0.02)
    return features, labels, torch.stack((sources[kept], nodes[kept]))[:, :EDGES]


class Classifier(torch.nn.Module):
    """Two layers of attention over the edges, or of nothing but the node itself."""

    def __init__(self, use_edges: bool) -> None:
        super().__init__()
        self.use_edges = use_edges
        self.first = mk.nn.GraphAttention(FEATURES, HIDDEN, HEADS)
        self.second = mk.nn.GraphAttention(HEADS * HIDDEN, CLASSES, concat=False)

    def forward(self, features: torch.Tensor, graph: Graph) -> torch.Tensor:
        if not self.use_edges:
            return self.second.lin_skip(F.elu(self.first.lin_skip(features)))
        return self.second(F.elu(self.first(features, graph)), graph)


def train(use_edges: bool, features: torch.Tensor, labels: torch.Tensor, graph: Graph) -> tuple[float, float]:
    """Accuracy on the nodes whose label was not shown, and milliseconds a step."""
    shown = torch.arange(NODES) % 10 == 0
    model = Classifier(use_edges)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    begin = time.perf_counter()
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(features, graph)[shown], labels[shown]).backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        right = model(features, graph).argmax(-1) == labels
    return float(right[~shown].float().mean()), 1e3 * seconds / STEPS


def main() -> None:
    torch.manual_seed(0)
    features, labels, edges = community_graph()
    graph = mk.nn.csr_from_edges(edges, NODES)
    degrees = torch.bincount(edges[0], minlength=NODES)
    print(f"{NODES} nodes, {edges.shape[1]} edges, up to {int(degrees.max())} from one node")
    found = {}
    for name, use_edges in (("without edges", False), ("graph attention", True)):
        found[name], ms = train(use_edges, features, labels, graph)
        print(f"{name:<16} accuracy {found[name]:.2f}, {ms:.1f} ms a step")
    assert found["graph attention"] > 0.8 > found["without edges"] + 0.1


if __name__ == "__main__":
    main()

"""link_read in plain torch: forward = L q, backward = L^T q, for every read head and every link matrix."""

import torch

from memkernels.backends.reference._math import compute


def directions(link, read):
    """L q and L^T q: "B R H N" both."""
    return torch.einsum("bhij,brj->brhi", link, read), torch.einsum("bhij,bri->brhj", link, read)


def directions_backward(dforward, dbackward, link, read):
    """The gradients of the link and of the read weights; a gradient that did not arrive is None."""
    dlink, dread = torch.zeros_like(link), torch.zeros_like(read)
    if dforward is not None:
        dlink = dlink + torch.einsum("brhi,brj->bhij", dforward, read)
        dread = dread + torch.einsum("bhij,brhi->brj", link, dforward)
    if dbackward is not None:
        dlink = dlink + torch.einsum("bri,brhj->bhij", read, dbackward)
        dread = dread + torch.einsum("bhij,brhj->bri", link, dbackward)
    return dlink, dread


def forward(link, read_weights):
    return tuple(t.to(link.dtype) for t in directions(compute(link), compute(read_weights)))


def backward(dforward, dbackward, link, read_weights):
    found = directions_backward(*(compute(t) for t in (dforward, dbackward, link, read_weights)))
    return tuple(t.to(link.dtype) for t in found)

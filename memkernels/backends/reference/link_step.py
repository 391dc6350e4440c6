"""link_step in plain torch: L' = (1 - w_i - w_j) L + w_i p_j, diagonal 0; p' = (1 - sum w) p + w; L' q and L'^T q."""

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference.link_read import directions, directions_backward


def _off_diagonal(matrix):
    return matrix.masked_fill(torch.eye(matrix.shape[-1], dtype=torch.bool, device=matrix.device), 0)


def _updated(link, precedence, write):
    """The share of each link that stays, and the new links."""
    kept = 1 - write[..., None] - write[..., None, :]
    return kept, _off_diagonal(kept * link + write[..., None] * precedence[..., None, :])


def forward(link, precedence, write_weights, read_weights):
    dtype, precedence, write = link.dtype, compute(precedence), compute(write_weights)
    _, new_link = _updated(compute(link), precedence, write)
    new_precedence = (1 - write.sum(-1, keepdim=True)) * precedence + write
    return tuple(t.to(dtype) for t in (new_link, new_precedence, *directions(new_link, compute(read_weights))))


def backward(dnew_link, dnew_precedence, dforward, dbackward, link, precedence, write_weights, read_weights):
    dtype, link, precedence, write = link.dtype, _off_diagonal(compute(link)), compute(precedence), compute(write_weights)
    kept, new_link = _updated(link, precedence, write)
    d, dread = directions_backward(compute(dforward), compute(dbackward), new_link, compute(read_weights))
    d = _off_diagonal(d if dnew_link is None else d + compute(dnew_link))
    dprecedence = torch.einsum("bhi,bhij->bhj", write, d)
    dwrite = (d * (precedence[..., None, :] - link)).sum(-1) - (d * link).sum(-2)
    if dnew_precedence is not None:
        upstream = compute(dnew_precedence)
        dprecedence = dprecedence + (1 - write.sum(-1, keepdim=True)) * upstream
        dwrite = dwrite + upstream - (upstream * precedence).sum(-1, keepdim=True)
    return tuple(t.to(dtype) for t in (kept * d, dprecedence, dwrite, dread))

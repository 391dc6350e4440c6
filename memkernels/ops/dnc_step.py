"""One step of a Differentiable Neural Computer's memory, made of the ops of this package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memkernels._checks import Signature, check_choice, check_flag
from memkernels._compat import no_autocast, register_namedtuple
from memkernels.ops.allocation import allocation
from memkernels.ops.content_address import content_address
from memkernels.ops.link_step import link_step
from memkernels.ops.memory_write import memory_write
from memkernels.ops.usage import usage

EPS = 1e-6
COSINES = ("roots", "roots_and_product", "product")


class DNCState(NamedTuple):
    """What one step hands to the next: all a DNC remembers. Shapes and meaning at `dnc_step`."""

    memory: Tensor
    usage: Tensor
    link: Tensor
    precedence: Tensor
    write_weights: Tensor
    read_weights: Tensor

    def detach(self) -> DNCState:
        """The same values without their history: between the windows of truncated back-propagation."""
        return DNCState(*(t.detach() for t in self))


class DNCInterface(NamedTuple):
    """What a controller asks of the memory in one step, after its activations. Shapes and meaning at `dnc_step`."""

    read_keys: Tensor
    read_strengths: Tensor
    write_keys: Tensor
    write_strengths: Tensor
    erase: Tensor
    add: Tensor
    free_gate: Tensor
    allocation_gate: Tensor
    write_gate: Tensor
    read_modes: Tensor
    write_mask: Tensor | None = None
    read_mask: Tensor | None = None
    link_sharpness: Tensor | None = None


register_namedtuple(DNCState)
register_namedtuple(DNCInterface)


def dnc_step(
    state: DNCState,
    interface: DNCInterface,
    *,
    deallocate: bool = False,
    write_gradient: bool = False,
    eps: float = EPS,
    cosine: str = "roots",
) -> tuple[Tensor, DNCState]:
    """One step of a DNC's memory: what was read is freed, rows are chosen and written, links follow, and rows are chosen and read.

    Formula:
        ``usage'`` = `usage` of the last step's weights; ``write = write_gate * (allocation_gate * a + (1 - allocation_gate) * c)`` with
        a = `allocation(usage')` and c the softmax of ``write_strengths * cosine(write_keys, memory)``; ``memory'`` = `memory_write`;
        ``link', precedence', f, b`` = `link_step` with the last read weights;
        ``read = sum_h modes[h] b[h] + sum_h modes[H + h] f[h] + modes[2H] c'`` with c' from the read keys and memory';
        ``reads = read memory'``.

    Args:
        state: memory "B N W", usage "B N", link "B H N N", precedence "B H N", write_weights "B H N", read_weights "B R N"; all zeros
            before the first step.
        interface: read_keys "B R W", read_strengths "B R", write_keys "B H W", write_strengths "B H", erase "B H W" in [0, 1],
            add "B H W", free_gate "B R", allocation_gate "B H" and write_gate "B H" in [0, 1], read_modes "B R 2H+1", sums to 1 over its
            modes (backward, forward, content); and, each or None, Csordas and Schmidhuber's: write_mask "B H W" and read_mask "B R W"
            (content is compared on ``key * mask`` and ``memory * mask``), link_sharpness "B R 2" (forward f becomes
            ``(f + 1e-6)^sharpness / sum``, backward likewise; at least 1). All of one dtype, that of the state.
        deallocate: rows lose their content, not only their usage, as they are freed (Csordas and Schmidhuber).
        write_gradient: let the gradient of usage through to the write weights.
        eps: the least usage in `allocation`.
        cosine: where the 1e-6 of the cosine stands: "roots" inside both square roots (as `content_address`), "roots_and_product" there and
            added to the product of the norms (deepmind/dnc), "product" added to the product alone (pytorch-dnc, Csordas and Schmidhuber).

    Returns:
        reads "B R W", and the new state.

    Gradients:
        To all tensors of state and interface.

    Numerics:
        Six ops of this package and one matrix product of torch's each way; a mask or another `cosine` replaces `content_address` by plain
        torch, in the dtype of the state. Autocast does not enter: convert the interface to the dtype of the state.

    Raises:
        ValueError: a size differs from what another tensor says, `eps` outside [0, 1), or an unknown cosine.
        TypeError: a dtype or device differs; something is missing from state or interface; a flag is no bool.

    Source:
        Graves et al., Hybrid computing using a neural network with dynamic external memory (2016), Methods; Csordas and Schmidhuber,
        Improving Differentiable Neural Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness Control (2019).

    Example:
        >>> import torch, memkernels as mk
        >>> state = mk.DNCState(torch.zeros(1, 4, 2), torch.zeros(1, 4), torch.zeros(1, 1, 4, 4), *torch.zeros(3, 1, 1, 4))
        >>> one, key = torch.ones(1, 1), torch.tensor([[[3.0, 4.0]]])
        >>> modes = torch.tensor([[[0.0, 0.0, 1.0]]])  # by content
        >>> ask = mk.DNCInterface(key, 20 * one, key, one, torch.ones(1, 1, 2), key, 0 * one, one, one, modes)
        >>> reads, state = mk.dnc_step(state, ask)
        >>> reads.round(decimals=3)
        tensor([[[3., 4.]]])
    """
    old, ask = DNCState(*state), DNCInterface(*interface)
    check_choice("dnc_step", "cosine", cosine, COSINES)
    check_flag("dnc_step", "deallocate", deallocate)
    heads = SIGNATURE(*old, *ask)["H"]
    with no_autocast(old.memory.device.type):
        used = usage(old.usage, old.write_weights, old.read_weights, ask.free_gate, write_gradient=write_gradient)
        free = allocation(used, write_gates=ask.allocation_gate * ask.write_gate, eps=eps)
        content = _content(old.memory, ask.write_keys, ask.write_strengths, ask.write_mask, cosine)
        write = ask.write_gate[..., None] * torch.lerp(content, free, ask.allocation_gate[..., None])
        kept = old.memory * _retention(old.read_weights, ask.free_gate) if deallocate else old.memory
        memory = memory_write(kept, write, ask.erase, ask.add)
        link, precedence, forward, backward = link_step(old.link, old.precedence, write, old.read_weights)
        if ask.link_sharpness is not None:
            forward, backward = (_sharpened(d, s) for d, s in zip((forward, backward), ask.link_sharpness.unbind(-1)))
        content = _content(memory, ask.read_keys, ask.read_strengths, ask.read_mask, cosine)
        back, forth, by_content = ask.read_modes.split((heads, heads, 1), 2)
        read = by_content * content + _over_heads(back, backward) + _over_heads(forth, forward)
        return read @ memory, DNCState(memory, used, link, precedence, write, read)


def _content(memory: Tensor, keys: Tensor, strengths: Tensor, mask: Tensor | None, cosine: str) -> Tensor:
    """Content weights, "B R N"."""
    if mask is None and cosine == "roots":
        return content_address(memory, keys, strengths)
    if mask is None and cosine == "product":
        norms = _norm(keys)[..., None] * _norm(memory)[:, None] + EPS
        return torch.softmax(strengths[..., None] * (keys @ memory.mT) / norms, -1)
    if mask is None:
        dot, rows = keys @ memory.mT, memory.square().sum(-1)[:, None]
    else:  # |memory * mask|^2 for every head is a product of squares: no "B R N W" is made
        keys = keys * mask
        dot, rows = (keys * mask) @ memory.mT, mask.square() @ memory.square().mT
    of_key = keys.square().sum(-1, keepdim=True)
    if cosine == "product":
        norms = _root(of_key) * _root(rows) + EPS
    else:
        norms = (of_key + EPS).sqrt() * (rows + EPS).sqrt() + (EPS if cosine == "roots_and_product" else 0)
    return torch.softmax(strengths[..., None] * dot / norms, -1)


def _over_heads(modes: Tensor, weights: Tensor) -> Tensor:
    """sum_h modes "B R H" * weights "B R H N"."""
    return modes * weights.squeeze(2) if modes.shape[2] == 1 else (modes[..., None] * weights).sum(2)


def _norm(rows: Tensor) -> Tensor:
    """The norm of each row, with derivatives of 0 at a row of zeros: torch's second one is NaN there."""
    empty = (rows == 0).all(-1, keepdim=True)
    return torch.linalg.vector_norm(rows.masked_fill(empty, 1), dim=-1).masked_fill(empty[..., 0], 0)


def _root(square: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0 instead of infinity."""
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def _retention(read_weights: Tensor, free_gate: Tensor) -> Tensor:
    """What of each row is not freed, "B N 1"."""
    return (1 - free_gate[..., None] * read_weights).prod(1)[..., None]


def _sharpened(weights: Tensor, sharpness: Tensor) -> Tensor:
    """(d + 1e-6)^sharpness over its sum, in log space: "B R H N"."""
    return torch.softmax(sharpness[..., None, None] * (weights + EPS).log(), -1)


SIGNATURE = Signature(
    "dnc_step",
    memory="B N W", usage="B N", link="B H N N", precedence="B H N", write_weights="B H N", read_weights="B R N",
    read_keys="B R W", read_strengths="B R", write_keys="B H W", write_strengths="B H", erase="B H W", add="B H W",
    free_gate="B R", allocation_gate="B H", write_gate="B H", read_modes="B R 2H+1",
    write_mask="B H W | None", read_mask="B R W | None", link_sharpness="B R 2 | None",
)  # fmt: skip

"""A memory of which each step reads and writes a few rows, in place: back-propagation undoes the writes on its way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from memkernels._checks import Signature, check_tensor, fail
from memkernels._compat import functorch_active, no_autocast
from memkernels.ops._sparse_history import History, put, take

EPSILON = 1e-6  # inside both square roots of the cosine


class SparseMemory:
    """Rows that `sparse_read` and `sparse_write` work on in place, with a log of what was overwritten.

    A step costs what its few rows cost, in time and in memory, however many rows there are: nothing of the size of the memory is saved.
    Back-propagation walks back through the steps and puts the overwritten rows back, so that each step's gradient sees the memory as
    that step saw it; `detach_` then brings the last state back and forgets the log.

    Args:
        rows: "B N W", float64 or float32: the memory before the first step. It is copied, and may need a gradient.

    Attributes:
        rows: "B N W": the memory now. Not to be written by others while a graph is alive.
        accessed: int64 "B N": a number that grows with the time of a row's last access, all different; `least_accessed` reads it.

    Gradients: first order only. `backward` can run once for a graph, not with `retain_graph` a second time; afterwards `detach_` comes
        before the next step.
    Raises: RuntimeError for a second backward, for a step after backward without `detach_`, and for a backward past steps that ran under
        `torch.no_grad`, and under torch.func transforms. ValueError or TypeError for `rows` of another rank or dtype.
    Source: Rae et al., Scaling Memory-Augmented Neural Networks with Sparse Reads and Writes (2016, arXiv 1610.09027), section 3.4.

    Example:
        >>> import torch, memkernels as mk
        >>> memory = mk.SparseMemory(torch.eye(3)[None])
        >>> row, word = torch.tensor([[2]]), torch.tensor([[[5.0, 0.0, 0.0]]])
        >>> mk.sparse_write(memory, row[None], torch.ones(1, 1, 1), word, clear=row)
        >>> memory.rows[0, 2]
        tensor([5., 0., 0.])
    """

    def __init__(self, rows: Tensor) -> None:
        check_tensor("SparseMemory", "rows", rows)
        if rows.dim() != 3:
            fail("SparseMemory", "rows", "B N W", tuple(rows.shape))
        if rows.dtype not in (torch.float32, torch.float64):
            fail("SparseMemory", "rows", "float64 or float32", rows.dtype, TypeError)
        if functorch_active():
            raise RuntimeError("SparseMemory: expected a call outside torch.func transforms: its rows are written in place")
        self._history = History(rows.detach().clone(memory_format=torch.contiguous_format))
        batch, count, _ = rows.shape
        self.accessed = torch.arange(-count, 0, device=rows.device).expand(batch, -1).contiguous()
        self._clock = 0
        self._token = _Begin.apply(rows, self._history)  # type: ignore[no-untyped-call]

    @property
    def rows(self) -> Tensor:
        return self._history.rows

    def __repr__(self) -> str:
        batch, count, width = self.rows.shape
        return f"SparseMemory(B={batch}, N={count}, W={width}, writes that can be undone: {len(self._history.log)})"

    def detach_(self) -> SparseMemory:
        """The last state again, without its history: after backward, or between the windows of truncated back-propagation."""
        self._history.restore()
        self._token = self._token.detach()
        return self

    def least_accessed(self, count: int = 1) -> Tensor:
        """int64 "B count": the rows whose last access lies furthest back, the furthest first; untouched ones by their number."""
        if isinstance(count, bool) or not isinstance(count, int):
            fail("SparseMemory", "count", "an integer", repr(count), TypeError)
        if not 0 <= count <= self.rows.shape[1]:
            fail("SparseMemory", "count", f"0 to N={self.rows.shape[1]}", count)
        if count == 1:
            return self.accessed.argmin(1, keepdim=True)
        return self.accessed.topk(count, 1, largest=False).indices

    def access(self, index: Tensor) -> None:
        """Notes that the rows int64 "B J" are accessed now, the later in the list the later."""
        ACCESS(self.rows, index)
        _check_rows("SparseMemory", self, index=index)
        if index.numel():
            now = self._clock + torch.arange(index.shape[1], device=index.device)
            self.accessed.scatter_reduce_(1, index, now.expand_as(index), "amax")
            self._clock += index.shape[1]


def sparse_read(memory: SparseMemory, query: Tensor, strength: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Reads rows by content: softmax(strength * cosine) over the rows that an index names, for each head.

    Args:
        memory: what is read.
        query: "B R W", dtype and device of the memory. strength: "B R".
        index: int64 "B R J": the rows to look at, e.g. the `index` of `topk_read`.

    Returns:
        read "B R W" and weights "B R J".

    Gradients: to query, strength, and to what was written into the rows; first order.
    Raises: ValueError, TypeError, IndexError: a size, dtype, device or index does not fit. RuntimeError: see `SparseMemory`.
    Source: Rae et al. 2016, section 3.1.

    Example:
        >>> import torch, memkernels as mk
        >>> memory = mk.SparseMemory(torch.eye(3)[None])
        >>> read, weights = mk.sparse_read(memory, torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[1e3]]), torch.tensor([[[2, 0]]]))
        >>> weights
        tensor([[[0., 1.]]])
    """
    READ(query, strength, index)
    _check_sizes("sparse_read", memory, query, index)
    memory._history.check_step("sparse_read")
    with no_autocast(memory.rows.device.type):
        if not _recorded(memory._token, query, strength):  # the history of the memory goes on past a read that is not part of it
            return _attend(take(memory.rows, index), query, strength)
        memory._token, read, weights = _Read.apply(memory._token, query, strength, index, memory._history)  # type: ignore[no-untyped-call]
    return read, weights


def sparse_write(memory: SparseMemory, index: Tensor, weights: Tensor, add: Tensor, *, clear: Tensor | None = None) -> None:
    """Adds weighted words to a few rows of a memory, in place; rows of `clear` become 0 before.

    ``M[clear] = 0;  M[index[h, j]] += weights[h, j] * add[h]`` for every head h and j; a row named twice is added to twice.

    Args:
        memory: what is written.
        index: int64 "B H J". weights: "B H J", dtype and device of the memory. add: "B H W".
        clear: int64 "B C": rows that are emptied first, or None.

    Gradients: to weights, add, and through the rows that stay to what was written before; first order. The log keeps H J + C rows.
    Raises: ValueError, TypeError, IndexError: a size, dtype, device or index does not fit; nothing is written then. RuntimeError: see
        `SparseMemory`.
    Source: Rae et al. 2016, section 3.2, equations 4 to 6 (erase the least recently used row, add to it and to the rows last read).
    """
    check_tensor("sparse_write", "index", index)
    if clear is None:
        clear = index.new_zeros(*index.shape[:1], 0)
    WRITE(index, weights, add, clear)
    _check_sizes("sparse_write", memory, add, index, clear)
    memory._history.check_step("sparse_write")
    if _recorded(memory._token, weights, add):
        memory._token = _Write.apply(memory._token, weights, add, index, clear, memory._history)  # type: ignore[no-untyped-call]
    else:
        memory._history.write(index, weights, add, clear, logged=False)


def _recorded(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check_sizes(op: str, memory: Any, given: Tensor, *indices: Tensor) -> None:
    """What the signature of the tensors alone does not say."""
    if not isinstance(memory, SparseMemory):
        fail(op, "memory", "a SparseMemory", type(memory).__name__, TypeError)
    batch, _, width = memory.rows.shape
    wanted = f"B={batch}, W={width}, {memory.rows.dtype} on {memory.rows.device}, as in the memory"
    if (given.shape[0], given.shape[2], given.dtype, given.device) != (batch, width, memory.rows.dtype, memory.rows.device):
        got = f"B={given.shape[0]}, W={given.shape[2]}, {given.dtype} on {given.device}"
        fail(op, "query" if op == "sparse_read" else "add", wanted, got)
    _check_rows(op, memory, **dict(zip(("index", "clear"), indices)))


def _check_rows(op: str, memory: SparseMemory, **indices: Tensor) -> None:
    count = memory.rows.shape[1]
    for name, index in indices.items():
        if index.device.type == "cpu" and index.numel():
            low, high = (int(v) for v in torch.aminmax(index))
            if low < 0 or high >= count:
                fail(op, name, f"rows 0 to N-1={count - 1}", low if low < 0 else high, IndexError)


READ = Signature("sparse_read", query="B R W", strength="B R", index=("B R J", torch.int64))
ACCESS = Signature("SparseMemory", rows="B N W", index=("B J", torch.int64))
WRITE = Signature("sparse_write", index=("B H J", torch.int64), weights="B H J", add="B H W", clear=("B C", torch.int64))


def _attend(rows: Tensor, query: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    """rows "B R J W" -> read "B R W", weights "B R J"."""
    norms = ((query * query).sum(-1, keepdim=True) + EPSILON) * ((rows * rows).sum(-1) + EPSILON)
    cosine = (rows @ query[..., None]).squeeze(-1) * norms.rsqrt()
    weights = torch.softmax(strength[..., None] * cosine, -1)
    return (weights[..., None, :] @ rows).squeeze(-2), weights


class _Begin(torch.autograd.Function):
    """The first of a chain of scalars that makes backward visit the steps in reverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, history: History) -> Tensor:
        ctx.history = history
        return rows.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken: Tensor) -> tuple[Tensor, None]:
        return ctx.history.rewind("SparseMemory", 0).clone(), None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, query: Tensor, strength: Tensor, index: Tensor, history: History) -> tuple[Tensor, ...]:
        ctx.save_for_backward(query, strength, index)
        ctx.history, ctx.time = history, len(history.log)
        return token.clone(), *_attend(take(history.rows, index), query, strength)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken: Tensor, dread: Tensor, dweights: Tensor) -> tuple[Tensor | None, ...]:
        query, strength, index = ctx.saved_tensors
        gradient = ctx.history.rewind("sparse_read", ctx.time)
        leaves = [t.detach().requires_grad_() for t in (take(ctx.history.rows, index), query, strength)]
        with torch.enable_grad():
            outputs = _attend(*leaves)
        drows, dquery, dstrength = torch.autograd.grad(outputs, leaves, (dread, dweights))
        put(gradient, index.flatten(1), drows.flatten(1, 2), accumulate=True)
        return dtoken, dquery, dstrength, None, None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, weights: Tensor, add: Tensor, index: Tensor, clear: Tensor, history: History) -> Tensor:
        ctx.save_for_backward(weights, add, index, clear)
        ctx.history, ctx.time = history, len(history.log)
        history.write(index, weights, add, clear, logged=True)
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken: Tensor) -> tuple[Tensor | None, ...]:
        weights, add, index, clear = ctx.saved_tensors
        gradient = ctx.history.rewind("sparse_write", ctx.time)
        drows = take(gradient, index)
        dweights = (drows @ add[..., None]).squeeze(-1)
        dadd = (weights[..., None, :] @ drows).squeeze(-2)
        put(gradient, clear, gradient.new_zeros(()).expand(*clear.shape, gradient.shape[2]))
        return dtoken, dweights, dadd, None, None, None

"""Sparse access memory: a controller LSTM with a memory of any size, of which each step touches a few rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels._checks import check_flag, check_number, fail
from memkernels._compat import no_autocast
from memkernels.nn._arguments import check_sizes, plain_like, refuse_script, time_first
from memkernels.nn._trace import SparseTrace, stacked
from memkernels.nn.lstm_cell import LSTMCell
from memkernels.ops.sparse_memory import SparseMemory, sparse_read, sparse_write
from memkernels.ops.topk_read import topk_read


class SAMState(NamedTuple):
    """What is carried from step to step: the memory, the controller's (h, c), and what was read last: where, how much, and the words."""

    memory: SparseMemory
    hidden: tuple[Tensor, Tensor]
    places: Tensor
    weights: Tensor
    read: Tensor

    def detach_(self) -> SAMState:
        """The same state without its history, the memory in place: between the windows of truncated back-propagation."""
        hidden = (self.hidden[0].detach(), self.hidden[1].detach())
        return SAMState(self.memory.detach_(), hidden, self.places, self.weights.detach(), self.read.detach())


class SAM(nn.Module):
    """Sparse access memory (SAM): an NTM whose steps cost what their few rows cost, so that a million rows and long sequences train.

    At each step the controller sees ``[x_t, r_{t-1}]``; of each head h, with the rows last read and their weights w, a write gate a and an
    interpolation g: the least recently accessed row is emptied, and ``a (g w + (1 - g) 1[least recently accessed])`` times a word is added;
    then the `rows_read` rows of highest cosine with a query are read by softmax. Rows with a weight above `threshold` count as accessed.
    The output is ``W_o [h_t, r_t] + b_o``.

    Args:
        input_size: features I. hidden_size: of the controller. output_size: features O.
        slots: memory rows N. width: memory columns W. heads: heads R, each reads and writes.
        rows_read: rows k that a head reads.
        threshold: weights above it mark a row as accessed.
        batch_first: input and output are "B T I" and "B T O" (default), else "T B I" and "T B O".
        device, dtype: of the parameters: float32 or float64.

    Raises: ValueError or TypeError for a size, flag, input or state that does not fit.
    Source: Rae et al. 2016 (arXiv 1610.09027), sections 3.1 and 3.2.

    Example:
        >>> model = SAM(8, hidden_size=16, output_size=4, slots=100, width=6, heads=2)
        >>> output, state = model(torch.randn(3, 5, 8))
        >>> output.shape, state.memory
        (torch.Size([3, 5, 4]), SparseMemory(B=3, N=100, W=6, writes that can be undone: 5))
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        slots: int,
        width: int,
        heads: int = 1,
        *,
        rows_read: int = 4,
        threshold: float = 0.005,
        batch_first: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes("SAM", input_size=input_size, hidden_size=hidden_size, output_size=output_size, slots=slots, width=width, heads=heads)
        check_sizes("SAM", rows_read=rows_read)
        check_flag("SAM", "batch_first", batch_first)
        check_number("SAM", "threshold", threshold)
        if rows_read > slots or heads > slots:
            fail("SAM", "slots", f"at least rows_read={rows_read} and heads={heads}", slots)
        self.input_size, self.hidden_size, self.output_size, self.slots = input_size, hidden_size, output_size, slots
        self.width, self.heads, self.rows_read, self.threshold, self.batch_first = width, heads, rows_read, threshold, batch_first
        factory = {"device": device, "dtype": dtype}
        self.controller = LSTMCell(input_size + heads * width, hidden_size, **factory)
        # Queries and words of all heads, then strengths, write gates and interpolations.
        self._sizes = [heads * width, heads * width, heads, heads, heads]
        self.interface = nn.Linear(hidden_size, sum(self._sizes), **factory)
        self.output = nn.Linear(hidden_size + heads * width, output_size, **factory)

    def extra_repr(self) -> str:
        sizes = f"{self.input_size}, hidden_size={self.hidden_size}, output_size={self.output_size}, slots={self.slots}"
        return f"{sizes}, width={self.width}, heads={self.heads}, rows_read={self.rows_read}"

    def initial_state(self, batch: int) -> SAMState:
        """An empty memory, `batch` times."""
        zeros = plain_like(self.interface.weight).new_zeros
        hidden = zeros(batch, self.hidden_size)
        index = torch.arange(self.rows_read, device=hidden.device).expand(batch, self.heads, -1)
        memory = SparseMemory(zeros(1, 1, 1).expand(batch, self.slots, self.width))
        return SAMState(memory, (hidden, hidden), index, zeros(index.shape), zeros(batch, self.heads, self.width))

    def forward(self, input: Tensor, state: SAMState | None = None, *, return_trace: bool = False) -> Any:
        """Runs over all steps.

        Args:
            input: "B T I" (`batch_first`) or "T B I".
            state: what the last call returned, `detach_`ed after its backward; its memory is written on. None: an empty memory.
            return_trace: also return a `SparseTrace`: the rows that each step read and wrote, and how much.

        Returns:
            output "B T O" or "T B O", and the state after the last step; with ``return_trace`` the `SparseTrace` too.

        Gradients: of first order, once a graph (see `SparseMemory`); to the input, the parameters and the tensors of the state.
        """
        check_flag("SAM", "return_trace", return_trace)
        x = time_first("SAM", input, self.input_size, self.batch_first, self.interface.weight)
        state = self.initial_state(x.shape[1]) if state is None else self._checked(state, x.shape[1])
        outputs, trace = [], []
        for step in x.unbind(0):
            state, *written = self._step(step, state)
            outputs.append(torch.cat([state.hidden[0], state.read.flatten(1)], -1))
            if return_trace:
                trace.append((state.weights, state.places, *written))
        output = self.output(stacked(outputs, x.new_zeros(0, x.shape[1], self.output.in_features)))
        output = output.transpose(0, 1) if self.batch_first else output
        if not return_trace:
            return output, state
        none, one_more = state.weights[None][:0], torch.zeros(0, *state.weights.shape[:2], self.rows_read + 1).to(state.weights)
        nothing = none, none.long(), one_more, one_more.long()
        found = [stacked(list(part), empty) for part, empty in zip(zip(*trace) if trace else [()] * 4, nothing)]
        return output, state, SparseTrace(*(t.transpose(0, 1) if self.batch_first else t for t in found))

    def _checked(self, state: Any, batch: int) -> SAMState:
        if not isinstance(state, SAMState):
            fail("SAM", "state", "a SAMState or None", type(state).__name__, TypeError)
        wanted = (batch, self.slots, self.width)
        if state.memory.rows.shape != wanted:
            fail("SAM", "state.memory", f"rows of shape {wanted}", tuple(state.memory.rows.shape))
        return state

    def _step(self, x: Tensor, state: SAMState) -> tuple[SAMState, Tensor, Tensor]:
        """The next state, and how much was written to which rows."""
        memory, hidden, index, weights, read = state
        hidden = self.controller(torch.cat([x, read.flatten(1)], -1), hidden)
        asked = self.interface(hidden[0]).to(memory.rows.dtype)
        with no_autocast(x.device.type):  # the memory keeps its dtype
            index, weights, read, amounts, places = self._access_memory(memory, asked, index, weights)
        return SAMState(memory, hidden, index, weights, read), amounts, places

    def _access_memory(self, memory: SparseMemory, asked: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Writes, then reads what the controller asks for: rows read, their weights, what was read; how much was written, and where."""
        query, word, strength, gate, interpolation = asked.split(self._sizes, -1)
        query, word = (t.unflatten(-1, (self.heads, self.width)) for t in (query, word))
        gate, interpolation = torch.sigmoid(gate)[..., None], torch.sigmoid(interpolation)[..., None]
        oldest = memory.least_accessed(self.heads)
        places = torch.cat([index, oldest[..., None]], -1)
        amounts = gate * torch.cat([interpolation * weights, 1 - interpolation], -1)
        sparse_write(memory, places, amounts, word, clear=oldest)
        with torch.no_grad():  # the choice; sparse_read has the gradient
            _, _, index = topk_read(query, memory.rows, memory.rows[..., :1], self.rows_read, similarity="cosine")
        read, weights = sparse_read(memory, query, 1 + F.softplus(strength), index)
        for at, much in ((places, amounts), (index, weights)):
            self._note(memory, at, much)
        return index, weights, read, amounts, places

    def _note(self, memory: SparseMemory, index: Tensor, weights: Tensor) -> None:
        """Rows with more weight than the threshold are accessed now; of the others the head's heaviest row stands in, which is."""
        top = index.gather(-1, weights.argmax(-1, keepdim=True))
        memory.access(torch.where(weights > self.threshold, index, top).flatten(1))

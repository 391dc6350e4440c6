"""`ExternalMemory`: a layer with a memory of N rows that it writes and reads at every step."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels._checks import check_choice, check_flag, check_floating, check_tensor, fail
from memkernels._compat import register_namedtuple
from memkernels.nn._arguments import check_sizes
from memkernels.ops.content_address import content_address
from memkernels.ops.content_read import content_read
from memkernels.ops.memory_read import memory_read
from memkernels.ops.memory_write import memory_write

MODES = ("content", "ntm")
SIMILARITIES = ("cosine", "dot", "l2")


class ExternalMemoryState(NamedTuple):
    """What is carried from one call to the next: `memory` "B N W", and `weights` "B R+H N" of the last step in mode "ntm", else None."""

    memory: Tensor
    weights: Tensor | None = None

    def detach(self) -> ExternalMemoryState:
        """The same values without their history: between the windows of truncated back-propagation."""
        return ExternalMemoryState(self.memory.detach(), None if self.weights is None else self.weights.detach())


class Trace(NamedTuple):
    """Which rows a call read and wrote: weights `read` "T B R N" and `write` "T B H N" of every step ("B T ..." with `batch_first`)."""

    read: Tensor
    write: Tensor


register_namedtuple(ExternalMemoryState)
register_namedtuple(Trace)


class ExternalMemory(nn.Module):
    """A memory of `slots` rows between two layers of a sequence model, e.g. between an LSTM (its controller) and a Dense layer.

    At each step t, keys k, strengths b, erase e and add a are linear in the input x_t (b = 1 + softplus, e = sigmoid, a = tanh), then

    - "content": ``w = softmax(b_w cos(k_w, M'))``, ``M = M' prod_h(1 - g w_h e_h^T) + g sum_h w_h a_h^T`` with a write gate g = sigmoid,
      ``r = softmax(b_r cos(k_r, M)) M``: addressed by content alone.
    - "ntm": the weights of all heads are made from M' and from the last weights as in the Neural Turing Machine: content weights are
      interpolated with the last ones, shifted by up to `shift` rows in a circle, and sharpened; then M is written and read with them.

    and the output is ``W_o [x_t, r_t] + b_o``. A step sees only inputs up to its own: the layer is causal.

    Args:
        input_size: features I of the input.
        slots: memory rows N.
        width: memory columns W.
        read_heads: read heads R.
        mode: "content" or "ntm".
        write_heads: write heads H.
        output_size: features O of the output; `input_size` if None.
        similarity: "cosine", "dot" or "l2".
        shift: "ntm" only: the largest shift S in rows; any value, also beyond `slots`.
        batch_first: input and output are "B T I" and "B T O" (default), else "T B I" and "T B O".
        device, dtype: of the parameters.

    Numerics: sharpening is done in log space, so the weights keep their mass for any sharpness and never become NaN.
    Raises: ValueError for an unknown mode or similarity, a size that is not positive, and for an input or state of another size;
        TypeError for an argument of another type.
    Source: Graves, Wayne and Danihelka 2014 (arXiv 1410.5401), equations 2 to 9.

    Example:
        >>> layer = ExternalMemory(8, slots=16, width=4, read_heads=2)
        >>> output, state = layer(torch.randn(3, 5, 8))
        >>> output.shape, state.memory.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 16, 4]))
        >>> output, state = layer(torch.randn(3, 5, 8), state.detach())
    """

    def __init__(
        self,
        input_size: int,
        slots: int,
        width: int,
        read_heads: int,
        mode: str = "content",
        *,
        write_heads: int = 1,
        output_size: int | None = None,
        similarity: str = "cosine",
        shift: int = 1,
        batch_first: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("ExternalMemory", "mode", mode, MODES)
        check_choice("ExternalMemory", "similarity", similarity, SIMILARITIES)
        output_size = input_size if output_size is None else output_size
        sizes = dict(input_size=input_size, slots=slots, width=width, read_heads=read_heads, write_heads=write_heads)
        check_sizes("ExternalMemory", **sizes, output_size=output_size)
        check_sizes("ExternalMemory", 0, shift=shift)
        check_flag("ExternalMemory", "batch_first", batch_first)
        self.input_size, self.slots, self.width, self.mode = input_size, slots, width, mode
        self.read_heads, self.write_heads, self.similarity, self.shift = read_heads, write_heads, similarity, shift
        self.output_size, self.batch_first = output_size, batch_first
        factory = {"device": device, "dtype": dtype}
        heads = read_heads + write_heads
        # Keys and strengths of all heads, erase and add of the write heads; then the write gates, or gate, shift and sharpness.
        self._sizes = [heads * width, heads, write_heads * width, write_heads * width]
        self._sizes += [write_heads] if mode == "content" else [heads, heads * (2 * shift + 1), heads]
        self.interface = nn.Linear(input_size, sum(self._sizes), **factory)
        self.output = nn.Linear(input_size + read_heads * width, self.output_size, **factory)
        self.initial_memory = nn.Parameter(torch.empty(slots, width, **factory))
        self.initial_weights = nn.Parameter(torch.empty(heads, slots, **factory)) if mode == "ntm" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random distinct memory rows, so that content can tell them apart; "ntm" heads start on the first row."""
        self.interface.reset_parameters()
        self.output.reset_parameters()
        nn.init.normal_(self.initial_memory, std=self.width**-0.5)
        if self.initial_weights is not None:
            nn.init.zeros_(self.initial_weights)
            with torch.no_grad():
                self.initial_weights[:, 0] = 5.0

    def extra_repr(self) -> str:
        text = f"{self.input_size}, slots={self.slots}, width={self.width}, read_heads={self.read_heads}, mode={self.mode!r}"
        return text + ("" if self.write_heads == 1 else f", write_heads={self.write_heads}")

    def initial_state(self, batch: int) -> ExternalMemoryState:
        """The learned state before the first step, for `batch` sequences."""
        weights = None if self.initial_weights is None else torch.softmax(self.initial_weights, -1).expand(batch, -1, -1)
        return ExternalMemoryState(self.initial_memory.expand(batch, -1, -1), weights)

    def forward(self, input: Tensor, state: ExternalMemoryState | None = None, *, return_trace: bool = False) -> Any:
        """Runs over all steps.

        Args:
            input: "B T I" (`batch_first`) or "T B I".
            state: what the last call returned, or None for the learned initial state.
            return_trace: also return which rows each step read and wrote.

        Returns:
            output "B T O" or "T B O", and the state after the last step; with ``return_trace`` also a `Trace`: weights of the read heads,
            "T B R N", and of the write heads, "T B H N", the latter times the write gate in mode "content" ("B T ..." with `batch_first`).
            `memkernels.plots.memory_trace` draws it.

        Gradients: to the input, the state and all parameters; through the trace too.
        """
        check_tensor("ExternalMemory", "input", input)
        if input.dim() != 3 or input.shape[-1] != self.input_size:
            dims = "B T I" if self.batch_first else "T B I"
            raise ValueError(f"ExternalMemory: input: expected [{dims}] with I={self.input_size}, got shape {tuple(input.shape)}")
        x = input.transpose(0, 1) if self.batch_first else input
        batch = x.shape[1]
        check_floating("ExternalMemory", parameters=self.interface.weight, input=input)
        state = self.initial_state(batch) if state is None else self._checked(state, batch)
        # All that is linear in the input is computed for all steps at once; the parameters stay float32 under autocast.
        parts = self.interface(x).to(state.memory.dtype).split(self._sizes, -1)
        check_flag("ExternalMemory", "return_trace", return_trace)
        trace: list[tuple[Tensor, Tensor]] | None = [] if return_trace else None
        reads, state = (self._content if self.mode == "content" else self._ntm)(parts, state, trace)
        stacked = torch.stack(reads).flatten(2) if reads else x.new_zeros(0, batch, self.read_heads * self.width)
        output = self.output(torch.cat([x, stacked.to(x.dtype)], -1))
        output = output.transpose(0, 1) if self.batch_first else output
        return (output, state) if trace is None else (output, state, self._traced(trace, batch, state.memory))

    def _traced(self, trace: list[tuple[Tensor, Tensor]], batch: int, memory: Tensor) -> Trace:
        read, write = (
            torch.stack([step[i] for step in trace]) if trace else memory.new_zeros(0, batch, heads, self.slots)
            for i, heads in enumerate((self.read_heads, self.write_heads))
        )
        return Trace(read.transpose(0, 1), write.transpose(0, 1)) if self.batch_first else Trace(read, write)

    def _checked(self, state: Any, batch: int) -> ExternalMemoryState:
        """The state that a caller passes, or one clear error."""
        if not isinstance(state, (tuple, list)) or len(state) not in (1, 2):
            fail("ExternalMemory", "state", "an ExternalMemoryState or None", type(state).__name__, TypeError)
        found = ExternalMemoryState(*state)
        expected = {"memory": (batch, self.slots, self.width)}
        if self.mode == "ntm":
            expected["weights"] = (batch, self.read_heads + self.write_heads, self.slots)
        for name, shape in expected.items():
            part = getattr(found, name)
            if part is None:
                fail("ExternalMemory", "state", f"{name} in mode {self.mode!r}", None)
            check_tensor("ExternalMemory", f"state.{name}", part)
            if part.shape != shape:
                fail("ExternalMemory", "state", f"{name} of shape {shape}", tuple(part.shape))
            if not part.is_floating_point():
                fail("ExternalMemory", f"state.{name}", "a floating dtype", part.dtype, TypeError)
        return found

    def _content(
        self, parts: tuple[Tensor, ...], state: ExternalMemoryState, trace: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[list[Tensor], ExternalMemoryState]:
        heads = (self.read_heads, self.write_heads)
        keys = parts[0].unflatten(-1, (-1, self.width)).split(heads, 2)
        strengths = (1 + F.softplus(parts[1])).split(heads, 2)
        gate = torch.sigmoid(parts[4])[..., None]
        # The gate multiplies erase and add instead of the weights: the same product, once for all steps.
        erase = gate * torch.sigmoid(parts[2]).unflatten(-1, (-1, self.width))
        add = gate * torch.tanh(parts[3]).unflatten(-1, (-1, self.width))
        memory = state.memory
        reads: list[Any] = []
        for read_key, write_key, read_strength, write_strength, e, a, g in _steps(*keys, *strengths, erase, add, gate):
            weights = content_address(memory, write_key, write_strength, similarity=self.similarity)
            memory = memory_write(memory, weights, e, a)
            read = content_read(memory, read_key, read_strength, similarity=self.similarity, return_weights=trace is not None)
            if trace is not None:
                read, read_weights = read
                trace.append((read_weights, g * weights))
            reads.append(read)
        return reads, ExternalMemoryState(memory)

    def _ntm(
        self, parts: tuple[Tensor, ...], state: ExternalMemoryState, trace: list[tuple[Tensor, Tensor]] | None
    ) -> tuple[list[Tensor], ExternalMemoryState]:
        heads = (self.read_heads, self.write_heads)
        keys = parts[0].unflatten(-1, (-1, self.width))
        erase = torch.sigmoid(parts[2]).unflatten(-1, (-1, self.width))
        add = torch.tanh(parts[3]).unflatten(-1, (-1, self.width))
        shifts = torch.softmax(parts[5].unflatten(-1, (-1, 2 * self.shift + 1)), -1)
        scalars = 1 + F.softplus(parts[1]), torch.sigmoid(parts[4]), 1 + F.softplus(parts[6])
        memory, weights, reads = state.memory, state.weights, []
        assert weights is not None
        for key, e, a, shift, strength, gate, sharpen in _steps(keys, erase, add, shifts, *scalars):
            content = content_address(memory, key, strength, similarity=self.similarity)
            weights = _location_address(content, weights, gate, shift, sharpen)
            read_weights, write_weights = weights.split(heads, 1)
            memory = memory_write(memory, write_weights, e, a)
            reads.append(memory_read(memory, read_weights))
            if trace is not None:
                trace.append((read_weights, write_weights))
        return reads, ExternalMemoryState(memory, weights)


def _steps(*tensors: Tensor):
    """The tensors' slices at every step of their first dimension."""
    return zip(*(t.unbind(0) for t in tensors), strict=True)


def _location_address(content: Tensor, previous: Tensor, gate: Tensor, shift: Tensor, sharpen: Tensor) -> Tensor:
    """Interpolates, shifts in a circle and sharpens.

    ``w_g = g content + (1 - g) previous``;  ``w_s[i] = sum_j shift[j] w_g[(i - j) mod N]``, j = -S..S;  ``w = w_s^sharpen / sum``.

    Args:
        content, previous: "B R N", rows sum to 1. gate, sharpen: "B R". shift: "B R 2S+1", rows sum to 1.
    """
    dtype, wide = content.dtype, torch.promote_types(content.dtype, torch.float32)
    content, previous, gate, shift, sharpen = (t.to(wide) for t in (content, previous, gate, shift, sharpen))
    gated = torch.lerp(previous, content, gate[..., None])
    reach = shift.shape[-1] // 2
    rolled = torch.stack([gated.roll(offset, -1) for offset in range(-reach, reach + 1)], -1)
    shifted = (rolled @ shift[..., None]).squeeze(-1)
    # log(0) is kept out of the graph: a row of weight 0 stays 0 and gets gradient 0, not NaN.
    positive = shifted > 0
    logits = torch.where(positive, sharpen[..., None] * torch.where(positive, shifted, 1).log(), -torch.inf)
    return torch.softmax(logits, -1).to(dtype)

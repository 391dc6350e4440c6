"""`ExternalMemory`: a layer with a memory of N rows that it writes and reads at every step."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels._checks import check_choice, check_flag, check_floating, check_tensor, fail
from memkernels._compat import register_namedtuple
from memkernels.nn._arguments import check_sizes
from memkernels.nn._bag import weighted_bag
from memkernels.ops.content_address import content_address
from memkernels.ops.content_read import content_read
from memkernels.ops.memory_read import memory_read
from memkernels.ops.memory_write import memory_write
from memkernels.ops.product_key_search import product_key_search
from memkernels.ops.topk_read import topk_read

MODES = ("content", "ntm", "topk", "product")
SIMILARITIES = ("cosine", "dot", "l2")


class ExternalMemoryState(NamedTuple):
    """What is carried from one call to the next: `memory` "B N W", and `weights` "B R+H N" of the last step in mode "ntm", else None."""

    memory: Tensor
    weights: Tensor | None = None

    def detach(self) -> ExternalMemoryState:
        """The same values without their history: between the windows of truncated back-propagation."""
        return ExternalMemoryState(self.memory.detach(), None if self.weights is None else self.weights.detach())


register_namedtuple(ExternalMemoryState)


class ReadTrace(NamedTuple):
    """Where the reads of a call came from, "T B R k" each: the `weights` of the `rows` (int64) of the memory.

    In modes "content" and "ntm", where all rows are read, rows is None and the weights are "T B R N". With `batch_first`: "B T ...".
    """

    weights: Tensor
    rows: Tensor | None = None


register_namedtuple(ReadTrace)


class ExternalMemory(nn.Module):
    """A memory of `slots` rows between two layers of a sequence model, e.g. between an LSTM (its controller) and a Dense layer.

    At each step t, keys k, strengths b, erase e and add a are linear in the input x_t (b = 1 + softplus, e = sigmoid, a = tanh), then

    - "content": ``w = softmax(b_w cos(k_w, M'))``, ``M = M' prod_h(1 - g w_h e_h^T) + g sum_h w_h a_h^T`` with a write gate g = sigmoid,
      ``r = softmax(b_r cos(k_r, M)) M``: addressed by content alone.
    - "ntm": the weights of all heads are made from M' and from the last weights as in the Neural Turing Machine: content weights are
      interpolated with the last ones, shifted by up to `shift` rows in a circle, and sharpened; then M is written and read with them.

    - "topk": writes as "content"; a read goes over the `k` best rows alone, and the rest get no gradient from it.
    - "product": rows have learned addresses, the S * S pairs of two sets of S subkeys a head; every head reads or writes the `k` rows whose
      addresses fit its key best, with the weights ``softmax(b scores)``. `slots` is a square number, `width` even.

    and the output is ``W_o [x_t, r_t] + b_o``. A step sees only inputs up to its own: the layer is causal.

    Args:
        input_size: features I of the input.
        slots: memory rows N.
        width: memory columns W.
        read_heads: read heads R.
        mode: "content", "ntm", "topk" or "product".
        write_heads: write heads H.
        output_size: features O of the output; `input_size` if None.
        similarity: "cosine", "dot" or, not with "topk", "l2"; "product" has dot products.
        k: "topk" and "product" only: rows of a read (and of a write in "product").
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
        k: int = 8,
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
        check_sizes("ExternalMemory", **sizes, output_size=output_size, k=k)
        check_sizes("ExternalMemory", 0, shift=shift)
        check_flag("ExternalMemory", "batch_first", batch_first)
        _check_mode(mode, similarity, slots, width)
        self.k = min(k, slots)
        self.input_size, self.slots, self.width, self.mode = input_size, slots, width, mode
        self.read_heads, self.write_heads, self.similarity, self.shift = read_heads, write_heads, similarity, shift
        self.output_size, self.batch_first = output_size, batch_first
        factory = {"device": device, "dtype": dtype}
        heads = read_heads + write_heads
        # Keys and strengths of all heads, erase and add of the write heads; then the write gates, or gate, shift and sharpness.
        self._sizes = [heads * width, heads, write_heads * width, write_heads * width]
        self._sizes += [heads, heads * (2 * shift + 1), heads] if mode == "ntm" else [write_heads]
        self.interface = nn.Linear(input_size, sum(self._sizes), **factory)
        self.output = nn.Linear(input_size + read_heads * width, self.output_size, **factory)
        self.initial_memory = nn.Parameter(torch.empty(slots, width, **factory))
        self.initial_weights = nn.Parameter(torch.empty(heads, slots, **factory)) if mode == "ntm" else None
        shape = (heads, 2, isqrt(slots), width // 2)
        self.subkeys = nn.Parameter(torch.empty(shape, **factory)) if mode == "product" else None
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
        if self.subkeys is not None:
            nn.init.normal_(self.subkeys, std=self.width**-0.5)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, slots={self.slots}, width={self.width}, read_heads={self.read_heads}, mode={self.mode!r}"
        return text + ("" if self.write_heads == 1 else f", write_heads={self.write_heads}")

    def initial_state(self, batch: int) -> ExternalMemoryState:
        """The learned state before the first step, for `batch` sequences."""
        weights = None if self.initial_weights is None else torch.softmax(self.initial_weights, -1).expand(batch, -1, -1)
        return ExternalMemoryState(self.initial_memory.expand(batch, -1, -1), weights)

    def forward(self, input: Tensor, state: ExternalMemoryState | None = None, return_provenance: bool = False):
        """Runs over all steps.

        Args:
            input: "B T I" (`batch_first`) or "T B I".
            state: what the last call returned, or None for the learned initial state.
            return_provenance: also return a `ReadTrace`: the rows that each step read, and their weights.

        Returns:
            output "B T O" or "T B O", and the state after the last step; with ``return_provenance`` the `ReadTrace` too.

        Gradients: to the input, the state and all parameters.
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
        check_flag("ExternalMemory", "return_provenance", return_provenance)
        run = {"ntm": self._ntm, "product": self._product}.get(self.mode, self._content)
        reads, state, traces = run(parts, state, return_provenance)
        stacked = torch.stack(reads).flatten(2) if reads else x.new_zeros(0, batch, self.read_heads * self.width)
        output = self.output(torch.cat([x, stacked.to(x.dtype)], -1))
        output = output.transpose(0, 1) if self.batch_first else output
        return (output, state, self._trace(traces, stacked, batch)) if return_provenance else (output, state)

    def _trace(self, traces: list[Any], like: Tensor, batch: int) -> ReadTrace:
        """The provenance of all steps, stacked."""
        sparse = self.mode in ("topk", "product")
        empty = like.new_zeros(0, batch, self.read_heads, self.k if sparse else self.slots)
        weights = torch.stack([w for w, _ in traces]) if traces else empty
        index = (torch.stack([i for _, i in traces]) if traces else empty.long()) if sparse else None
        if self.batch_first:
            weights, index = weights.transpose(0, 1), None if index is None else index.transpose(0, 1)
        return ReadTrace(weights, index)

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

    def _gated(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Erase and add; the gate multiplies them instead of the weights: the same product, once for all steps."""
        gate = torch.sigmoid(parts[4])[..., None]
        erase = gate * torch.sigmoid(parts[2]).unflatten(-1, (-1, self.width))
        return erase, gate * torch.tanh(parts[3]).unflatten(-1, (-1, self.width))

    def _content(self, parts: tuple[Tensor, ...], state: ExternalMemoryState, traced: bool) -> _Steps:
        heads = (self.read_heads, self.write_heads)
        keys = parts[0].unflatten(-1, (-1, self.width)).split(heads, 2)
        strengths = (1 + F.softplus(parts[1])).split(heads, 2)
        memory = state.memory
        reads: list[Any] = []
        traces: list[Any] = []
        for read_key, write_key, read_strength, write_strength, e, a in _steps(*keys, *strengths, *self._gated(parts)):
            weights = content_address(memory, write_key, write_strength, similarity=self.similarity)
            memory = memory_write(memory, weights, e, a)
            if self.mode == "topk":
                read, *trace = self._best_rows(memory, read_key, read_strength)
            else:
                found: Any = content_read(memory, read_key, read_strength, similarity=self.similarity, return_weights=traced)
                read, *trace = (*found, None) if traced else (found,)
            reads.append(read)
            traces.append(trace)
        return reads, ExternalMemoryState(memory), traces

    def _best_rows(self, memory: Tensor, key: Tensor, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """softmax(strength * similarity) over the k best rows: the strength goes into the key, the cosine's norms into both sides."""
        rows = memory
        if self.similarity == "cosine":
            key, rows = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (key, memory))
        return topk_read(strength[..., None] * key, rows, memory, self.k, scale=1.0)

    def _product(self, parts: tuple[Tensor, ...], state: ExternalMemoryState, traced: bool) -> _Steps:
        memory, batch = state.memory, state.memory.shape[0]
        assert self.subkeys is not None
        # Addresses do not depend on what the memory holds: all steps and heads are searched at once.
        keys = parts[0].unflatten(-1, (-1, 2, self.width // 2))
        scores, index = product_key_search(keys.flatten(0, 1), self.subkeys.to(keys.dtype), self.k)
        weights = torch.softmax((1 + F.softplus(parts[1])).flatten(0, 1)[..., None] * scores, -1)
        steps = (t.unflatten(0, parts[0].shape[:2]).split((self.read_heads, self.write_heads), 2) for t in (weights, index.clamp(min=0)))
        (read_weights, write_weights), (read_index, write_index) = steps
        dense = torch.zeros(*write_weights.shape[:3], self.slots, dtype=weights.dtype, device=weights.device)
        dense = dense.scatter_add(-1, write_index, write_weights)
        first = torch.arange(batch, device=memory.device)[:, None, None] * self.slots  # of the rows of an entry in the flat memory
        reads: list[Any] = []
        for w, i, of_rows, e, a in _steps(read_weights, read_index, dense, *self._gated(parts)):
            memory = memory_write(memory, of_rows, e, a)
            read = weighted_bag(memory.flatten(0, 1), (first + i).flatten(0, 1), w.flatten(0, 1))
            reads.append(read.view(batch, self.read_heads, self.width))
        return reads, ExternalMemoryState(memory), list(_steps(read_weights, read_index)) if traced else []

    def _ntm(self, parts: tuple[Tensor, ...], state: ExternalMemoryState, traced: bool) -> _Steps:
        heads = (self.read_heads, self.write_heads)
        keys = parts[0].unflatten(-1, (-1, self.width))
        erase = torch.sigmoid(parts[2]).unflatten(-1, (-1, self.width))
        add = torch.tanh(parts[3]).unflatten(-1, (-1, self.width))
        shifts = torch.softmax(parts[5].unflatten(-1, (-1, 2 * self.shift + 1)), -1)
        scalars = 1 + F.softplus(parts[1]), torch.sigmoid(parts[4]), 1 + F.softplus(parts[6])
        memory, weights = state.memory, state.weights
        reads: list[Any] = []
        traces: list[Any] = []
        assert weights is not None
        for key, e, a, shift, strength, gate, sharpen in _steps(keys, erase, add, shifts, *scalars):
            content = content_address(memory, key, strength, similarity=self.similarity)
            weights = _location_address(content, weights, gate, shift, sharpen)
            read_weights, write_weights = weights.split(heads, 1)
            memory = memory_write(memory, write_weights, e, a)
            reads.append(memory_read(memory, read_weights))
            traces.append((read_weights, None))
        return reads, ExternalMemoryState(memory, weights), traces


# Reads of every step, the state after the last, and (weights, index) of every step.
_Steps = tuple[list[Any], ExternalMemoryState, list[Any]]


def _check_mode(mode: str, similarity: str, slots: int, width: int) -> None:
    """What the sparse modes need."""
    if mode == "topk" and similarity == "l2":
        fail("ExternalMemory", "similarity", "'cosine' or 'dot' in mode 'topk'", repr(similarity))
    if mode == "product" and isqrt(slots) ** 2 != slots:
        fail("ExternalMemory", "slots", "a square number in mode 'product'", slots)
    if mode == "product" and width % 2:
        fail("ExternalMemory", "width", "an even number in mode 'product'", width)


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

"""`ExternalMemory`: a layer with a memory of N rows that it writes and reads at every step."""

from __future__ import annotations

from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels._checks import check_choice, check_flag, check_floating, check_tensor, fail
from memkernels._compat import register_namedtuple
from memkernels.nn import _store_memory
from memkernels.nn._arguments import check_sizes, plain_like, refuse_script, time_first
from memkernels.nn._dnc_interface import Interface
from memkernels.nn._store_memory import StoreState
from memkernels.nn._trace import Trace
from memkernels.ops.content_address import content_address
from memkernels.ops.content_read import content_read
from memkernels.ops.dnc_step import DNCState
from memkernels.ops.location_address import location_address
from memkernels.ops.memory_read import memory_read
from memkernels.ops.memory_write import memory_write
from memkernels.ops.product_key_search import product_key_search
from memkernels.ops.topk_read import topk_read
from memkernels.ops.weighted_bag import weighted_bag

MODES = ("content", "ntm", "dnc", "topk", "product", "store")
SIMILARITIES = ("cosine", "dot", "l2")


class ExternalMemoryState(NamedTuple):
    """What is carried from one call to the next: `memory` "B N W", and `weights` "B R+H N" of the last step in mode "ntm", else None."""

    memory: Tensor
    weights: Tensor | None = None

    def detach(self) -> ExternalMemoryState:
        """The same values without their history: between the windows of truncated back-propagation."""
        return ExternalMemoryState(self.memory.detach(), None if self.weights is None else self.weights.detach())


register_namedtuple(ExternalMemoryState)


# Reads of every step, the state after the last, and what `Trace` holds of every step.
_Steps = tuple[list[Any], Any, list[tuple[Tensor, ...]]]


class ExternalMemory(nn.Module):
    """A memory of `slots` rows between two layers of a sequence model, e.g. between an LSTM (its controller) and a Dense layer.

    At each step t, keys k, strengths b, erase e and add a are linear in the input x_t (b = 1 + softplus, e = sigmoid, a = tanh), then

    - "content": ``w = softmax(b_w cos(k_w, M'))``, ``M = M' prod_h(1 - g w_h e_h^T) + g sum_h w_h a_h^T`` with a write gate g = sigmoid,
      ``r = softmax(b_r cos(k_r, M)) M``: addressed by content alone.
    - "ntm": the weights of all heads are made from M' and from the last weights as in the Neural Turing Machine: content weights are
      interpolated with the last ones, shifted by up to `shift` rows in a circle, and sharpened; then M is written and read with them.
    - "dnc": a step of a Differentiable Neural Computer (`memkernels.dnc_step`), all of whose interface is linear in the input: rows are
      chosen by content, by what is free and by the order of writes. The state is a `memkernels.DNCState`.
    - "topk": writes as "content"; a read goes over the `k` best rows alone, and the rest get no gradient from it.
    - "product": rows have learned addresses, the S * S pairs of two sets of S subkeys a head; every head reads or writes the `k` rows whose
      addresses fit its key best, with the weights ``softmax(b scores)``. `slots` is a square number, `width` even.

    - "store": an exact key-value store, ``store(k_{t-1}, v_t)``, then ``r_t = retrieve(k_t)``: values v (one a write head) are linear in
      the input, keys are integers, and a read is the value that was stored last under exactly its key, or zeros where there is none. So a
      step recalls what came after the last step like itself. The key k_t of a head are the `bits` sides of fixed random planes that x_t
      lies on (kept in the state_dict, not trained); read head r looks where write head r % H stores: its first probe is the key itself,
      further ones differ in the least certain bit, in the second least certain one, and so on. Or a call is given its `keys`, any int64.
      Equal keys overwrite each other; a new key past `slots` takes the row that was stored longest ago. It starts empty; the state is a
      `StoreState`.

    and the output is ``W_o [x_t, r_t] + b_o``. A step sees only inputs up to its own: the layer is causal.

    Args:
        input_size: features I of the input.
        slots: memory rows N.
        width: memory columns W.
        read_heads: read heads R.
        mode: "content", "ntm", "dnc", "topk", "product" or "store".
        write_heads: write heads H.
        output_size: features O of the output; `input_size` if None.
        similarity: "cosine", "dot" or, not with "topk", "l2"; "dnc" knows "cosine" alone, "product" has dot products, "store" has none.
        k: "topk" and "product" only: rows of a read (and of a write in "product").
        shift: "ntm" only: the largest shift S in rows; any value, also beyond `slots`.
        bits: "store" only: planes of a key, 1 to 48.
        batch_first: input and output are "B T I" and "B T O" (default), else "T B I" and "T B O".
        device, dtype: of the parameters.

    Numerics: sharpening is done in log space, so the weights keep their mass for any sharpness and never become NaN.
    Raises: ValueError for an unknown mode or similarity, a size that is not positive, and for an input or state of another size;
        TypeError for an argument of another type.
    Source: Graves, Wayne and Danihelka 2014 (arXiv 1410.5401), equations 2 to 9; "dnc": Graves et al. 2016;
        "product": Lample et al. 2019; "store": Charikar 2002 (keys of random planes), Lv et al. 2007 (probes).

    Example:
        >>> layer = ExternalMemory(8, slots=16, width=4, read_heads=2)
        >>> output, state = layer(torch.randn(3, 5, 8))
        >>> output.shape, state.memory.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 16, 4]))
        >>> output, state = layer(torch.randn(3, 5, 8), state.detach())
    """

    __prepare_scriptable__ = refuse_script

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
        bits: int = 12,
        batch_first: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice("ExternalMemory", "mode", mode, MODES)
        check_choice("ExternalMemory", "similarity", similarity, SIMILARITIES)
        output_size = input_size if output_size is None else output_size
        sizes = dict(input_size=input_size, slots=slots, width=width, read_heads=read_heads, write_heads=write_heads)
        check_sizes("ExternalMemory", **sizes, output_size=output_size, k=k, bits=bits)
        check_sizes("ExternalMemory", 0, shift=shift)
        check_flag("ExternalMemory", "batch_first", batch_first)
        _check_mode(mode, similarity, slots, width)
        self.k = 1 if mode == "store" else min(k, slots)
        self.bits = bits
        self.input_size, self.slots, self.width, self.mode = input_size, slots, width, mode
        self.read_heads, self.write_heads, self.similarity, self.shift = read_heads, write_heads, similarity, shift
        self.output_size, self.batch_first = output_size, batch_first
        factory = {"device": device, "dtype": dtype}
        heads = read_heads + write_heads
        # Keys and strengths of all heads, erase and add of the write heads; then the write gates, or gate, shift and sharpness.
        self._sizes = [heads * width, heads, write_heads * width, write_heads * width]
        self._sizes += [heads, heads * (2 * shift + 1), heads] if mode == "ntm" else [write_heads]
        self._asks = Interface(slots, width, read_heads, write_heads) if mode == "dnc" else None
        if self._asks is not None:
            self._sizes = [self._asks.features()]
        if mode == "store":
            _store_memory.check_heads(read_heads, write_heads, bits)
            self._sizes = [write_heads * width]
        self.interface = nn.Linear(input_size, sum(self._sizes), **factory)
        self.output = nn.Linear(input_size + read_heads * width, self.output_size, **factory)
        self.initial_memory = None if mode == "store" else nn.Parameter(torch.empty(slots, width, **factory))
        self.initial_weights = nn.Parameter(torch.empty(heads, slots, **factory)) if mode == "ntm" else None
        shape = (heads, 2, isqrt(slots), width // 2)
        self.subkeys = nn.Parameter(torch.empty(shape, **factory)) if mode == "product" else None
        self.register_buffer("planes", torch.empty(write_heads, bits, input_size, **factory) if mode == "store" else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random distinct memory rows, so that content can tell them apart; "ntm" heads start on the first row."""
        self.interface.reset_parameters()
        self.output.reset_parameters()
        if self.initial_memory is not None:
            nn.init.normal_(self.initial_memory, std=self.width**-0.5)
        if isinstance(self.planes, Tensor):
            nn.init.normal_(self.planes)
        if self.initial_weights is not None:
            nn.init.zeros_(self.initial_weights)
            with torch.no_grad():
                self.initial_weights[:, 0] = 5.0
        if self.subkeys is not None:
            nn.init.normal_(self.subkeys, std=self.width**-0.5)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, slots={self.slots}, width={self.width}, read_heads={self.read_heads}, mode={self.mode!r}"
        return text + ("" if self.write_heads == 1 else f", write_heads={self.write_heads}")

    def initial_state(self, batch: int) -> ExternalMemoryState | DNCState | StoreState:
        """The state before the first step, for `batch` sequences: learned, but in mode "store", where it is empty."""
        if self.initial_memory is None:
            return _store_memory.empty_state(plain_like(self.interface.weight), batch, self.slots, self.width, self.write_heads)
        memory = self.initial_memory.expand(batch, -1, -1)
        if self._asks is not None:
            return self._asks.nothing(self.initial_memory, batch)._replace(memory=memory)
        weights = None if self.initial_weights is None else torch.softmax(self.initial_weights, -1).expand(batch, -1, -1)
        return ExternalMemoryState(memory, weights)

    def forward(
        self,
        input: Tensor,
        state: ExternalMemoryState | DNCState | StoreState | None = None,
        *,
        keys: tuple[Tensor, Tensor] | None = None,
        return_trace: bool = False,
    ) -> Any:
        """Runs over all steps.

        Args:
            input: "B T I" (`batch_first`) or "T B I".
            state: what the last call returned, or None for the initial state.
            keys: mode "store" only, instead of those of the input: int64 "B T H" that each step stores its values under, and "B T R" that
                it retrieves then ("T B H" and "T B R" without `batch_first`); the full range of int64.
            return_trace: also return a `Trace`: the rows that each step read and wrote, and their weights.

        Returns:
            output "B T O" or "T B O", and the state after the last step; with ``return_trace`` the `Trace` too.

        Gradients: to the input, the state and all parameters; in mode "store" to the values that are retrieved, and none through keys.
        """
        x = time_first("ExternalMemory", input, self.input_size, self.batch_first, self.interface.weight)
        batch = x.shape[1]
        state = self.initial_state(batch) if state is None else self._checked(state, batch)
        if keys is not None and self.mode != "store":
            fail("ExternalMemory", "keys", f"None in mode {self.mode!r}", type(keys).__name__)
        # All that is linear in the input is computed for all steps at once; the parameters stay float32 under autocast.
        parts = self.interface(x).to(state.memory.dtype).split(self._sizes, -1)
        check_flag("ExternalMemory", "return_trace", return_trace)
        if isinstance(state, StoreState):
            stacked, state, traces = self._store(x, parts[0], state, keys, return_trace)
        elif self._asks is not None:
            stacked, state, traces = self._dnc(parts[0], state, return_trace)
        else:
            run: Any = {"ntm": self._ntm, "product": self._product}.get(self.mode, self._content)
            reads, state, traces = run(parts, state, return_trace)
            stacked = torch.stack(reads).flatten(2) if reads else x.new_zeros(0, batch, self.read_heads * self.width)
        output = self.output(torch.cat([x, stacked.to(x.dtype)], -1))
        output = output.transpose(0, 1) if self.batch_first else output
        return (output, state, self._traced(traces, stacked, batch)) if return_trace else (output, state)

    def _traced(self, traces: list[tuple[Tensor, ...]], like: Tensor, batch: int) -> Trace:
        """The traces of all steps, stacked."""
        sparse = self.mode in ("topk", "product", "store")
        stacked = [torch.stack(of_steps) for of_steps in zip(*traces, strict=True)]
        if not traces:
            read = like.new_zeros(0, batch, self.read_heads, self.k if sparse else self.slots)
            stacked = [read, like.new_zeros(0, batch, self.write_heads, self.slots), *([read.long()] if sparse else [])]
        return Trace(*(t.transpose(0, 1) if self.batch_first else t for t in stacked))

    def _store(self, x: Tensor, values: Tensor, state: StoreState, keys: Any, traced: bool) -> tuple[Tensor, StoreState, Any]:
        """All steps of mode "store": reads "T B R*W", the state, the traces of the steps."""
        heads, valid = (self.write_heads, self.read_heads), None
        if keys is not None:
            store, retrieve = _store_memory.given_keys(keys, x.shape[0], x.shape[1], heads, self.batch_first, x.device)
            last = state.last
        else:
            assert isinstance(self.planes, Tensor)
            own, retrieve = _store_memory.hashed_keys(x, self.planes, self.read_heads)
            store, valid = torch.cat([state.last[None], own])[:-1], state.last != _store_memory.NO_KEY
            last = torch.cat([state.last[None], own])[-1]
        values = values.unflatten(-1, (self.write_heads, self.width))
        read, state, rows, written = _store_memory.run(state, values, store, retrieve, valid, last)
        traces: Any = ()
        if traced:
            slots = torch.arange(self.slots, device=x.device)
            traces = zip((rows >= 0)[..., None].to(read.dtype), (written[..., None] == slots).to(read.dtype), rows[..., None])
        return read.flatten(2), state, list(traces)

    def _checked(self, state: Any, batch: int) -> ExternalMemoryState | DNCState | StoreState:
        """The state that a caller passes, or one clear error."""
        if self.mode == "store":
            return _store_memory.checked_state(state, batch, self.slots, self.width, self.write_heads)
        if self._asks is not None:
            if not isinstance(state, (tuple, list)) or len(state) != len(DNCState._fields):
                fail("ExternalMemory", "state", "a DNCState or None", type(state).__name__, TypeError)
            check_tensor("ExternalMemory", "state.memory", state[0])
            check_floating("ExternalMemory", **{"state.memory": state[0]})
            if state[0].shape != (batch, self.slots, self.width):
                fail("ExternalMemory", "state", f"memory of shape {(batch, self.slots, self.width)}", tuple(state[0].shape))
            return DNCState(*state)  # dnc_step checks the others against this one
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

    def _gated(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Erase and add, multiplied by the gate instead of the weights: the same product, once for all steps; and the gate."""
        gate = torch.sigmoid(parts[4])[..., None]
        erase = gate * torch.sigmoid(parts[2]).unflatten(-1, (-1, self.width))
        return erase, gate * torch.tanh(parts[3]).unflatten(-1, (-1, self.width)), gate

    def _content(self, parts: tuple[Tensor, ...], state: ExternalMemoryState, traced: bool) -> _Steps:
        heads = (self.read_heads, self.write_heads)
        keys = parts[0].unflatten(-1, (-1, self.width)).split(heads, 2)
        strengths = (1 + F.softplus(parts[1])).split(heads, 2)
        memory = state.memory
        reads: list[Any] = []
        traces: list[tuple[Tensor, ...]] = []
        for read_key, write_key, read_strength, write_strength, e, a, gate in _steps(*keys, *strengths, *self._gated(parts)):
            weights = content_address(memory, write_key, write_strength, similarity=self.similarity)
            memory = memory_write(memory, weights, e, a)
            found: Any
            if self.mode == "topk":
                found = self._best_rows(memory, read_key, read_strength)
            else:
                found = content_read(memory, read_key, read_strength, similarity=self.similarity, return_weights=traced)
            read, *origin = found if isinstance(found, tuple) else (found,)
            reads.append(read)
            if traced:
                traces.append((origin[0], gate * weights, *origin[1:]))
        return reads, ExternalMemoryState(memory), traces

    def _dnc(self, vectors: Tensor, state: Any, traced: bool) -> tuple[Tensor, DNCState, Any]:
        """All steps of mode "dnc": reads "T B R*W", the state, the traces of the steps."""
        assert self._asks is not None
        found, state, weights = self._asks.run(vectors, state)
        traces = [w.split((self.read_heads, self.write_heads), 1) for w in weights.unbind(0)] if traced else []
        return found.flatten(2), state, traces

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
        erase, add, gate = self._gated(parts)
        for w, i, of_rows, e, a in _steps(read_weights, read_index, dense, erase, add):
            memory = memory_write(memory, of_rows, e, a)
            read = weighted_bag(memory.flatten(0, 1), (first + i).flatten(0, 1), w.flatten(0, 1))
            reads.append(read.view(batch, self.read_heads, self.width))
        return reads, ExternalMemoryState(memory), list(_steps(read_weights, gate * dense, read_index)) if traced else []

    def _ntm(self, parts: tuple[Tensor, ...], state: ExternalMemoryState, traced: bool) -> _Steps:
        heads = (self.read_heads, self.write_heads)
        keys = parts[0].unflatten(-1, (-1, self.width))
        erase = torch.sigmoid(parts[2]).unflatten(-1, (-1, self.width))
        add = torch.tanh(parts[3]).unflatten(-1, (-1, self.width))
        shifts = torch.softmax(parts[5].unflatten(-1, (-1, 2 * self.shift + 1)), -1)
        scalars = 1 + F.softplus(parts[1]), torch.sigmoid(parts[4]), 1 + F.softplus(parts[6])
        memory, weights = state.memory, state.weights
        reads: list[Any] = []
        traces: list[tuple[Tensor, ...]] = []
        assert weights is not None
        for key, e, a, shift, strength, gate, sharpen in _steps(keys, erase, add, shifts, *scalars):
            content = content_address(memory, key, strength, similarity=self.similarity)
            weights = location_address(content, weights, gate, shift, sharpen)
            read_weights, write_weights = weights.split(heads, 1)
            memory = memory_write(memory, write_weights, e, a)
            reads.append(memory_read(memory, read_weights))
            if traced:
                traces.append((read_weights, write_weights))
        return reads, ExternalMemoryState(memory, weights), traces


def _check_mode(mode: str, similarity: str, slots: int, width: int) -> None:
    """What the modes need."""
    if mode == "dnc" and similarity != "cosine":
        fail("ExternalMemory", "similarity", "'cosine' in mode 'dnc'", repr(similarity))
    if mode == "topk" and similarity == "l2":
        fail("ExternalMemory", "similarity", "'cosine' or 'dot' in mode 'topk'", repr(similarity))
    if mode == "product" and isqrt(slots) ** 2 != slots:
        fail("ExternalMemory", "slots", "a square number in mode 'product'", slots)
    if mode == "product" and width % 2:
        fail("ExternalMemory", "width", "an even number in mode 'product'", width)


def _steps(*tensors: Tensor):
    """The tensors' slices at every step of their first dimension."""
    return zip(*(t.unbind(0) for t in tensors), strict=True)

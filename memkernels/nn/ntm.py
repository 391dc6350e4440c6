"""`NTM`: a Neural Turing Machine, whose whole sequence is one op."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels._checks import check_choice, check_flag, fail
from memkernels.nn._arguments import check_sizes, refuse_script, time_first
from memkernels.nn._trace import Trace
from memkernels.ops.content_address import content_address
from memkernels.ops.location_address import location_address
from memkernels.ops.lstm_gates import lstm_gates
from memkernels.ops.memory_read import memory_read
from memkernels.ops.memory_write import memory_write
from memkernels.ops.ntm_sequence import FORMS, NTMState, ntm_sequence

ONE_PROGRAM = 65_536  # elements of memory; on a GPU one program has a row of the batch through all steps


class NTM(nn.Module):
    """A Neural Turing Machine: an LSTM controller with read and write heads on a memory of `slots` rows.

    At each step the controller sees the input and what the heads read one step before; its hidden state h moves the heads; the output is
    ``W_o [h, reads] + b_o``. `memkernels.ntm_sequence` has the formulas of a step.

    Args:
        input_size, hidden_size, output_size: features of the input, of the controller and of the output.
        slots, width: memory rows N and columns W.
        read_heads, write_heads: their numbers.
        shift: the largest shift S of a head in rows.
        form: "graves", or "pytorch-ntm" for the formulas of loudinthecloud/pytorch-ntm, whose output passes a sigmoid.
        batch_first: input and output are "B T I" and "B T O" (default), else "T B I" and "T B O".
        device, dtype: of the parameters.

    The memory starts constant at 1e-6 (buffer `initial_memory`), heads on learned weights (in form "pytorch-ntm" on none), reads and
    controller on learned vectors.
    Numerics: as `ntm_sequence`. On a GPU, form "graves" with more than 65,536 elements of memory runs the op of every part of a step.
    Raises: ValueError for a size that is not positive, an unknown form, and an input or state of another size; TypeError for another type.
    Source: Graves, Wayne and Danihelka 2014 (arXiv 1410.5401); the constant start: Collier and Beel 2018 (arXiv 1807.08518).

    Example:
        >>> model = NTM(9, 100, 8, slots=128, width=20)
        >>> output, state = model(torch.randn(3, 41, 9))
        >>> output.shape, state.memory.shape
        (torch.Size([3, 41, 8]), torch.Size([3, 128, 20]))
        >>> output, state = model(torch.randn(3, 5, 9), state.detach())
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        slots: int,
        width: int,
        read_heads: int = 1,
        write_heads: int = 1,
        *,
        shift: int = 1,
        form: str = "graves",
        batch_first: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        sizes = dict(input_size=input_size, hidden_size=hidden_size, output_size=output_size, slots=slots, width=width)
        check_sizes("NTM", **sizes, read_heads=read_heads, write_heads=write_heads)
        check_sizes("NTM", 0, shift=shift)
        check_choice("NTM", "form", form, FORMS)
        check_flag("NTM", "batch_first", batch_first)
        self.input_size, self.hidden_size, self.output_size, self.slots, self.width = input_size, hidden_size, output_size, slots, width
        self.read_heads, self.write_heads, self.shift, self.form, self.batch_first = read_heads, write_heads, shift, form, batch_first
        factory = {"device": device, "dtype": dtype}

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        h, w, scalars = hidden_size, width, 2 * shift + 4
        self.weight_ih, self.weight_rh = parameter(4 * h, input_size), parameter(4 * h, read_heads, w)
        self.weight_hh, self.bias = parameter(4 * h, h), parameter(4 * h)
        self.read_key, self.read_scalars = parameter(read_heads, w, h + 1), parameter(read_heads, scalars, h + 1)
        self.write_key, self.write_scalars = parameter(write_heads, w, h + 1), parameter(write_heads, scalars, h + 1)
        self.write_vectors = parameter(2, write_heads, w, h + 1)
        self.output = nn.Linear(h + read_heads * w, output_size, **factory)
        self.initial_reads, self.initial_hidden, self.initial_cell = parameter(read_heads, w), parameter(h), parameter(h)
        self.initial_weights = parameter(read_heads + write_heads, slots) if form == "graves" else None
        self.register_buffer("initial_memory", torch.empty(slots, width, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A constant memory, heads on the first row, matrices of Xavier's scale."""
        nn.init.constant_(self.initial_memory, 1e-6)  # type: ignore[arg-type]
        with torch.no_grad():
            for weight in (self.weight_ih, self.weight_rh.flatten(1), self.weight_hh):
                nn.init.xavier_uniform_(weight)
            for heads in self._heads:
                nn.init.xavier_uniform_(heads.flatten(0, -2)[:, :-1])
                heads[..., -1].normal_(std=0.01)
            if self.initial_weights is not None:
                self.initial_weights.zero_()
                self.initial_weights[:, 0] = 5.0
        nn.init.zeros_(self.bias)
        self.output.reset_parameters()
        for vector in (self.initial_reads, self.initial_hidden, self.initial_cell):
            nn.init.normal_(vector, std=0.05)

    @property
    def _heads(self) -> tuple[Tensor, ...]:
        return self.read_key, self.read_scalars, self.write_key, self.write_scalars, self.write_vectors

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, {self.output_size}, slots={self.slots}, width={self.width}"
        return f"{text}, read_heads={self.read_heads}, write_heads={self.write_heads}, shift={self.shift}, form={self.form!r}"

    def initial_state(self, batch: int) -> NTMState:
        """The state before the first step, for `batch` sequences."""
        heads = self.read_heads + self.write_heads
        start = self.bias.new_zeros(heads, self.slots) if self.initial_weights is None else torch.softmax(self.initial_weights, -1)
        parts = (self.initial_memory, *start.split((self.read_heads, self.write_heads)))
        parts += (self.initial_reads, self.initial_hidden, self.initial_cell)
        return NTMState(*(t.expand(batch, *t.shape) for t in parts))  # type: ignore[operator, union-attr]

    def forward(self, input: Tensor, state: NTMState | None = None, *, return_trace: bool = False) -> Any:
        """Runs over all steps.

        Args:
            input: "B T I" (`batch_first`) or "T B I".
            state: what the last call returned, or None for the initial state.
            return_trace: also return a `Trace`: the weights with which each step read and wrote the rows.

        Returns:
            output "B T O" or "T B O", and the state after the last step; with ``return_trace`` the `Trace` too.

        Gradients: to the input, the state and all parameters.
        """
        check_flag("NTM", "return_trace", return_trace)
        x = time_first("NTM", input, self.input_size, self.batch_first, self.bias)
        wanted = (self.slots, self.width)
        if state is None:
            state = self.initial_state(x.shape[1])
        elif not isinstance(state, (tuple, list)) or len(state) != 6:
            fail("NTM", "state", "an NTMState or None", type(state).__name__, TypeError)
        elif getattr(state[0], "shape", wanted)[1:] != wanted:  # all else is checked by the op
            fail("NTM", "state.memory", "[B N W] with N={}, W={}".format(*wanted), f"shape {tuple(state[0].shape)}")
        weights = (self.weight_ih, self.weight_rh, self.weight_hh, self.bias, *self._heads)
        start = NTMState(*state)
        if x.is_cuda and self.form == "graves" and self.slots * self.width > ONE_PROGRAM:
            hidden, reads, last, *every = self._by_steps(x, start)
        else:
            hidden, reads, last, *every = ntm_sequence(x, start, *weights, form=self.form, return_weights=return_trace)
        output = self.output(torch.cat([hidden, reads.flatten(2)], -1))
        output = torch.sigmoid(output) if self.form == "pytorch-ntm" else output
        output = output.transpose(0, 1) if self.batch_first else output
        if not return_trace:
            return output, last
        parts = every[0].split((self.read_heads, self.write_heads), 2)
        return output, last, Trace(*(t.transpose(0, 1) if self.batch_first else t for t in parts))

    def _by_steps(self, x: Tensor, state: NTMState) -> tuple[Tensor, Tensor, NTMState, Tensor]:
        """What `ntm_sequence` computes in form "graves", by the ops of a step, whose programs share a large memory."""
        heads, (r, u) = torch.cat([t.flatten(0, -2) for t in self._heads]), (self.read_heads, self.write_heads)
        sizes = [t.shape[:-1].numel() for t in self._heads]
        into_h, from_x = torch.cat([self.weight_rh.flatten(1), self.weight_hh], 1), F.linear(x, self.weight_ih, self.bias)
        memory, weights, (reads, h, c) = state.memory, torch.cat([state.read_weights, state.write_weights], 1), state[3:]
        all_hidden, all_reads, all_weights = [], [], []
        for step in from_x:
            h, c = lstm_gates(step + F.linear(torch.cat([reads.flatten(1), h], 1), into_h), c)
            read_key, read_s, write_key, write_s, vectors = F.linear(h, heads[:, :-1], heads[:, -1]).split(sizes, -1)
            key = torch.cat([read_key, write_key], 1).unflatten(1, (r + u, self.width))
            s = torch.cat([read_s, write_s], 1).unflatten(1, (r + u, 2 * self.shift + 4))
            content = content_address(memory, key, 1 + F.softplus(s[..., 0]))
            gate, sharpen, taps = torch.sigmoid(s[..., 1]), 1 + F.softplus(s[..., 2]), torch.softmax(s[..., 3:], -1)
            weights = location_address(content, weights, gate, taps, sharpen)
            erase, add = vectors.unflatten(1, (2, u, self.width)).unbind(1)
            memory = memory_write(memory, weights[:, r:], torch.sigmoid(erase), torch.tanh(add))
            reads = memory_read(memory, weights[:, :r])
            all_hidden.append(h)
            all_reads.append(reads)
            all_weights.append(weights)
        hidden = torch.stack(all_hidden) if all_hidden else x.new_zeros(0, *h.shape)
        read = torch.stack(all_reads) if all_reads else x.new_zeros(0, *reads.shape)
        every = torch.stack(all_weights) if all_weights else x.new_zeros(0, *weights.shape)
        return hidden, read, NTMState(*[memory, *weights.split((r, u), 1), reads, h, c]), every

    @classmethod
    def from_pytorch_ntm(cls, weights: Mapping[str, Tensor], **options: Any) -> NTM:
        """The module that computes what loudinthecloud/pytorch-ntm computes with these weights.

        Args:
            weights: the state_dict of its `NTM` or `EncapsulatedNTM`: one LSTM layer, any number of read heads, then one write head.
            options: `batch_first`, `device`, `dtype` of the constructor.

        Its taps run the other way, so they are mirrored here; its two biases of the controller are one here.
        """
        named = {name.removeprefix("ntm."): t.detach() for name, t in weights.items()}
        order = [kind for i in range(len(named)) for kind in ("fc_read", "fc_write") if f"heads.{i}.{kind}.weight" in named]
        if "controller.lstm.weight_ih_l1" in named or order[-1:] != ["fc_write"] or order.count("fc_write") != 1:
            heads = ", ".join(order) or "none"
            fail("NTM", "weights", "one LSTM layer, read heads and then one write head", f"heads {heads}")
        readers, memory = len(order) - 1, named["memory.mem_bias"]
        (slots, width), (gates, total) = memory.shape, named["controller.lstm.weight_ih_l0"].shape
        features, hidden, outputs = total - readers * width, gates // 4, len(named["fc.weight"])
        options = {"device": memory.device, "dtype": memory.dtype, **options}
        module = cls(features, hidden, outputs, slots, width, readers, 1, form="pytorch-ntm", **options)
        with torch.no_grad():
            module._take(named, order)
        return module

    def _take(self, named: Mapping[str, Tensor], order: list[str]) -> None:
        w = self.width
        lstm = "controller.lstm."
        into = named[lstm + "weight_ih_l0"].split((self.input_size, self.read_heads * w), 1)
        self.weight_ih.copy_(into[0])
        self.weight_rh.copy_(into[1].unflatten(1, (-1, w)))
        self.weight_hh.copy_(named[lstm + "weight_hh_l0"])
        self.bias.copy_(named[lstm + "bias_ih_l0"] + named[lstm + "bias_hh_l0"])
        for i, kind in enumerate(order):
            rows = torch.cat([named[f"heads.{i}.{kind}.weight"], named[f"heads.{i}.{kind}.bias"][:, None]], 1)
            key, strength, gate, taps, sharpen, vectors = rows.split((w, 1, 1, 3, 1, len(rows) - w - 6))
            scalars = torch.cat([strength, gate, sharpen, taps.flip(0)])
            if kind == "fc_write":
                self.write_vectors[:, 0].copy_(vectors.unflatten(0, (2, w)))
            pair = (self.write_key[0], self.write_scalars[0]) if kind == "fc_write" else (self.read_key[i], self.read_scalars[i])
            pair[0].copy_(key)
            pair[1].copy_(scalars)
        self.output.weight.copy_(named["fc.weight"])
        self.output.bias.copy_(named["fc.bias"])
        self.initial_memory.copy_(named["memory.mem_bias"])  # type: ignore[operator, union-attr]
        self.initial_reads.copy_(torch.cat([named[f"read{i}_bias"] for i in range(self.read_heads)]))
        self.initial_hidden.copy_(named["controller.lstm_h_bias"].flatten())
        self.initial_cell.copy_(named["controller.lstm_c_bias"].flatten())

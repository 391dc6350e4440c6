"""`DNC`: a Differentiable Neural Computer, an LSTM that writes and reads a memory with usage and temporal links."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memkernels._checks import check_choice, check_flag, check_number, check_tensor, fail
from memkernels._compat import has_hooks, register_namedtuple
from memkernels.nn._arguments import check_sizes, plain_like, refuse_script, time_first
from memkernels.nn._dnc_interface import Interface, heads_of, oneplus
from memkernels.nn._trace import Trace, stacked
from memkernels.nn.lstm import LSTM
from memkernels.ops.dnc_sequence import DNCController, dnc_sequence
from memkernels.ops.dnc_step import COSINES, DNCState, dnc_step

STRENGTHS: dict[str, Any] = {"oneplus": oneplus, "softplus": F.softplus}


class DNCLayerState(NamedTuple):
    """What is carried from one call to the next: the memory, the controller's h and c "L B H", and what was read last "B R W"."""

    memory: DNCState
    hidden: Tensor
    cell: Tensor
    reads: Tensor

    def detach(self) -> DNCLayerState:
        """The same values without their history: between the windows of truncated back-propagation."""
        return DNCLayerState(self.memory.detach(), self.hidden.detach(), self.cell.detach(), self.reads.detach())


register_namedtuple(DNCLayerState)


class DNC(nn.Module):
    """A Differentiable Neural Computer (Graves et al. 2016).

    At each step ``h, c = LSTM([x_t, r_{t-1}])``; the interface ``W_xi h + b_xi`` is cut into keys, strengths, gates and modes;
    ``r_t`` = `memkernels.dnc_step`; the output is ``W_o [h, r_t] + b_o``.

    Args:
        input_size: features I of the input.
        hidden_size: units H of the controller.
        output_size: features O of the output; `input_size` if None.
        slots: memory rows N.
        width: memory columns W.
        read_heads: read heads R.
        write_heads: write heads.
        num_layers: layers of the controller.
        key_mask: heads say which columns they compare (Csordas and Schmidhuber).
        deallocate: rows lose their content when they are freed (the same).
        sharpen_links: heads sharpen what they get by following links (the same).
        write_gradient: let the gradient of usage through to the write weights.
        strength: "oneplus" (1 + softplus) or "softplus": the activation of the strengths.
        cosine: "roots", "roots_and_product" or "product": where the cosine's epsilon stands, see `memkernels.dnc_step`.
        bounded: keys and what is added go through tanh.
        clip: the controller's output is clamped to [-clip, clip]; None: not.
        clip_all: the controller's state and the output too.
        feedback: the controller sees what was read in the step before; without, it sees what `state` says was read before the first step
            at all steps, and runs over all of them in one call.
        batch_first: input and output are "B T I" and "B T O" (default), else "T B I" and "T B O".
        device, dtype: of the parameters.

    `DNC.deepmind(...)` and `DNC.ixaxaar(...)` set what reproduces google-deepmind/dnc and ixaxaar/pytorch-dnc (`dnc` on PyPI).

    Raises: ValueError for a size that is not positive, an unknown choice, and for an input or state of another size; TypeError for an
        argument of another type.
    Source: Graves et al., Hybrid computing using a neural network with dynamic external memory (2016); Csordas and Schmidhuber 2019.

    Example:
        >>> layer = DNC(8, 32, slots=16, width=4, read_heads=2)
        >>> output, state = layer(torch.randn(3, 5, 8))
        >>> output.shape, state.memory.link.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 1, 16, 16]))
        >>> output, state = layer(torch.randn(3, 5, 8), state.detach())
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        slots: int,
        width: int,
        read_heads: int,
        write_heads: int = 1,
        num_layers: int = 1,
        key_mask: bool = False,
        deallocate: bool = False,
        sharpen_links: bool = False,
        write_gradient: bool = False,
        strength: str = "oneplus",
        cosine: str = "roots",
        bounded: bool = False,
        clip: float | None = None,
        clip_all: bool = False,
        feedback: bool = True,
        batch_first: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        output_size = input_size if output_size is None else output_size
        sizes = dict(input_size=input_size, hidden_size=hidden_size, output_size=output_size, slots=slots, width=width)
        check_sizes("DNC", **sizes, read_heads=read_heads, write_heads=write_heads, num_layers=num_layers)
        check_choice("DNC", "strength", strength, STRENGTHS)
        check_choice("DNC", "cosine", cosine, COSINES)
        flags = dict(key_mask=key_mask, deallocate=deallocate, sharpen_links=sharpen_links, write_gradient=write_gradient)
        flags |= dict(bounded=bounded, clip_all=clip_all, feedback=feedback, batch_first=batch_first)
        for name, flag in flags.items():
            check_flag("DNC", name, flag)
        if clip is not None and not check_number("DNC", "clip", clip) > 0:  # nor NaN
            fail("DNC", "clip", "a positive number or None", clip)
        self.input_size, self.output_size, self.batch_first = input_size, output_size, batch_first
        self.clip, self.clip_all, self.feedback = clip, clip_all, feedback
        self.step_options: dict[str, Any] = dict(deallocate=deallocate, write_gradient=write_gradient, cosine=cosine)
        self.layout = Interface(slots, width, read_heads, write_heads, key_mask, sharpen_links, STRENGTHS[strength], bounded)
        factory = {"device": device, "dtype": dtype}
        self.controller = LSTM(input_size + read_heads * width, hidden_size, num_layers, **factory)
        self.interface = nn.Linear(hidden_size, self.layout.features(), **factory)
        self.output = nn.Linear(hidden_size + read_heads * width, output_size, **factory)

    @classmethod
    def deepmind(cls, input_size: int, hidden_size: int, output_size: int, *, clip_value: float | None = None, **sizes: Any) -> DNC:
        """With the formulas of google-deepmind/dnc: softplus strengths, its cosine, clipping of controller, its state and the output.

        Args: input_size, hidden_size, output_size, clip_value: as there. sizes: slots, width, read_heads, write_heads, and where to put it.
        Its Sonnet LSTM adds 1 to the forget gate: add it to `controller.bias_ih_l0`, whose gate order is i, f, g, o.
        """
        options = dict(strength="softplus", cosine="roots_and_product", clip=clip_value or None, clip_all=True)
        return cls(input_size, hidden_size, output_size, **{**options, **sizes})

    @classmethod
    def ixaxaar(cls, input_size: int, hidden_size: int, *, clip: float | None = 20, num_hidden_layers: int = 2, **sizes: Any) -> DNC:
        """With the formulas of ixaxaar/pytorch-dnc, `DNC(..., rnn_type="lstm", num_layers=1)` of `dnc` on PyPI.

        Its controller does not see what was read within a call, the gradient passes usage, keys and what is added go through tanh.

        Args: input_size, hidden_size, clip, num_hidden_layers: as there. sizes: slots (nr_cells), width (cell_size), read_heads, and where
        to put it. `controller`, `interface` and `output` take the parameters of `lstm_layer_0`, `interface_weights` and `output`.
        """
        options = dict(strength="softplus", cosine="product", bounded=True, write_gradient=True, feedback=False)
        return cls(input_size, hidden_size, clip=clip or None, num_layers=num_hidden_layers, **{**options, **sizes})

    def extra_repr(self) -> str:
        layout = self.layout
        heads = f"read_heads={layout.read_heads}" + ("" if layout.write_heads == 1 else f", write_heads={layout.write_heads}")
        return f"{self.input_size}, {self.controller.hidden_size}, {self.output_size}, slots={layout.slots}, width={layout.width}, {heads}"

    def initial_state(self, batch: int) -> DNCLayerState:
        """The state before the first step, for `batch` sequences: all zeros."""
        like, controller = plain_like(self.interface.weight), self.controller
        hidden = like.new_zeros(controller.num_layers, batch, controller.hidden_size)
        reads = like.new_zeros(batch, self.layout.read_heads, self.layout.width)
        return DNCLayerState(self.layout.nothing(like, batch), hidden, hidden.clone(), reads)

    def forward(self, input: Tensor, state: DNCLayerState | None = None, *, return_trace: bool = False) -> Any:
        """Runs over all steps.

        Args:
            input: "B T I" (`batch_first`) or "T B I".
            state: what the last call returned, or None for zeros.
            return_trace: also return a `Trace`: the weights with which each step read and wrote the rows.

        Returns:
            output "B T O" or "T B O", and the state after the last step; with ``return_trace`` the `Trace` too.

        Gradients: to the input, the state and all parameters.
        """
        check_flag("DNC", "return_trace", return_trace)
        x = time_first("DNC", input, self.input_size, self.batch_first, self.interface.weight)
        state = self.initial_state(x.shape[1]) if state is None else self._checked(state, x.shape[1])
        run = self._without_feedback if not self.feedback else self._in_one_call if self._fits(x, state) else self._by_steps
        hidden, reads, state, weights = run(x, state)
        output = self.output(torch.cat([hidden, reads.to(hidden.dtype)], -1))
        output = self._clipped(output) if self.clip_all else output
        output = output.transpose(0, 1) if self.batch_first else output
        if not return_trace:
            return output, state
        weights = weights.transpose(0, 1) if self.batch_first else weights
        return output, state, Trace(*weights.split((self.layout.read_heads, self.layout.write_heads), 2))

    def _checked(self, state: Any, batch: int) -> DNCLayerState:
        """The state that a caller passes, or one clear error; the sizes inside the memory are checked by each step."""
        if not isinstance(state, (tuple, list)) or len(state) != 4 or not isinstance(state[0], (tuple, list)) or len(state[0]) != 6:
            fail("DNC", "state", "a DNCLayerState or None", type(state).__name__, TypeError)
        found = DNCLayerState(DNCState(*state[0]), *state[1:])
        given, wanted = (s._asdict() | dict(memory=s.memory.memory) for s in (found, self.initial_state(batch)))
        for name, got in given.items():
            check_tensor("DNC", f"state.{name}", got)
            if got.shape != wanted[name].shape:
                fail("DNC", f"state.{name}", f"shape {tuple(wanted[name].shape)}", tuple(got.shape))
        return found

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _fits(self, x: Tensor, state: DNCLayerState) -> bool:
        """Whether `dnc_sequence` computes this call: one layer, whose h no clip reaches, all in one dtype, any step, a kernel.

        Parts with hooks (pruning, spectral_norm, FSDP) or of other classes (parametrizations) must be called as modules.
        """
        plain = type(self.controller) is LSTM and type(self.interface) is nn.Linear and self.controller.num_layers == 1
        plain = plain and not has_hooks(self.controller) and not has_hooks(self.interface)
        clipped = self.clip is not None and self.clip < 1  # |h| < 1
        same = all(t.dtype == x.dtype for t in (*state.memory, *state[1:], self.interface.weight, self.controller.weight_hh_l0))
        return plain and same and not clipped and self.layout.in_one_op(x) and x.shape[0] > 0

    def _in_one_call(self, x: Tensor, state: DNCLayerState) -> tuple[Tensor, Tensor, DNCLayerState, Tensor]:
        lstm: Any = self.controller
        layout = self.layout
        into, from_reads = lstm.weight_ih_l0.split((self.input_size, layout.read_heads * layout.width), 1)
        bias, interface = lstm.bias_ih_l0 + lstm.bias_hh_l0, self.interface
        carried = (state.reads, state.hidden[0], state.cell[0])
        weights = (into, from_reads.unflatten(1, (layout.read_heads, layout.width)), lstm.weight_hh_l0, bias)
        controller = DNCController(*carried, *weights, interface.weight, interface.bias)
        options = self.layout.sequence_options() | self.step_options | dict(clip=self.clip if self.clip_all else None)
        reads, memory, hidden, cell, weights = dnc_sequence(x, state.memory, controller, **options, return_weights=True)
        return hidden, reads.flatten(2), DNCLayerState(memory, hidden[-1:].clone(), cell[None], reads[-1].clone()), weights

    def _by_steps(self, x: Tensor, state: DNCLayerState) -> tuple[Tensor, Tensor, DNCLayerState, Tensor]:
        memory, hidden, cell, reads = state
        controls, read, weights = [], [], []
        for step in x.unbind(0):
            seen = torch.cat([step, reads.flatten(1).to(step.dtype)], -1)
            out, (hidden, cell) = self.controller(seen[None], (hidden, cell))
            if self.clip_all:
                hidden, cell = self._clipped(hidden), self._clipped(cell)
            out = self._clipped(out)
            (ask,) = self.layout.steps(self.interface(out).to(memory.memory.dtype))
            reads, memory = dnc_step(memory, ask, **self.step_options)
            controls.append(out[0])
            read.append(reads.flatten(1))
            weights.append(heads_of(memory))
        nothing = x.new_zeros(0, x.shape[1], hidden.shape[-1]), state.reads.flatten(1)[None][:0], heads_of(state.memory)[None][:0]
        found = [stacked(steps, none) for steps, none in zip((controls, read, weights), nothing)]
        return found[0], found[1], DNCLayerState(memory, hidden, cell, reads), found[2]

    def _without_feedback(self, x: Tensor, state: DNCLayerState) -> tuple[Tensor, Tensor, DNCLayerState, Tensor]:
        memory, hidden, cell, reads = state
        before = reads.flatten(1).to(x.dtype).expand(x.shape[0], -1, -1)
        out, (hidden, cell) = self.controller(torch.cat([x, before], -1), (hidden, cell))
        out = self._clipped(out)
        found, memory, weights = self.layout.run(self.interface(out).to(memory.memory.dtype), memory, **self.step_options)
        reads = found[-1].clone() if found.shape[0] else reads
        return out, found.flatten(2), DNCLayerState(memory, hidden, cell, reads), weights

"""What LSTM, GRU and RNN share: layouts, packed sequences, layers, directions, dropout between layers, parameters of options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter, init
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from memkernels._checks import check_flag, check_number, fail
from memkernels.nn._arguments import check_inputs, check_integers, check_sizes, refuse_script

States = Any  # None or a tuple of tensors, as many as the cell has states


class Segments(NamedTuple):
    """Where the rows of a call start again, with which states, and where they end."""

    reset: Tensor | None
    reset_state: States
    lengths: Tensor | None


class Recurrent(torch.nn.RNNBase):
    """torch.nn.RNNBase with the loops over layers and directions; a module adds `_direction`, one call of its op.

    Inside, a state is a tuple of tensors: (h, c) or (h,). Not derived from torch.nn.LSTM, GRU and RNN: torch.compile refuses those.
    """

    OPTIONS: ClassVar[dict[str, Any]] = {"num_heads": 1, "learned_reset": False}
    num_heads: int
    learned_reset: bool
    weight_ih_l0: Tensor

    __prepare_scriptable__ = refuse_script

    def __init__(self, mode: str, sizes: Sequence[Any], factory: dict[str, Any], options: dict[str, Any]) -> None:
        """sizes: what torch.nn.RNNBase takes after mode, from input_size to proj_size; factory: device and dtype."""
        _, hidden_size, num_layers, _, _, dropout, _, proj_size = sizes
        name = mode.partition("_")[0]
        check_integers(name, num_layers=num_layers, proj_size=proj_size)
        check_number(name, "dropout", dropout)
        super().__init__(mode, *sizes, **factory)
        width = proj_size or hidden_size
        check_sizes(name, num_heads=options["num_heads"])
        if hidden_size % options["num_heads"] or width % options["num_heads"]:
            sizes_named = f"hidden_size={hidden_size}" + (f" and of proj_size={proj_size}" if proj_size else "")
            fail(name, "num_heads", f"a divisor of {sizes_named}", options["num_heads"])
        for option, value in options.items():
            if isinstance(self.OPTIONS[option], bool):
                check_flag(name, option, value)
            setattr(self, option, value)
        shapes = self._option_shapes()
        if options["num_heads"] > 1:
            shapes = {"weight_hh": (self.weight_ih_l0.shape[0], width // options["num_heads"]), **shapes}
        self._add_parameters(shapes, factory)

    def _option_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters that the options add to every layer and direction, by their names without the layer."""
        return {"reset_h": (self.proj_size or self.hidden_size,)} if self.learned_reset else {}

    def _add_parameters(self, shapes: dict[str, tuple[int, ...]], factory: dict[str, Any]) -> None:
        """After torch's own, which keep their order, names and values for the same seed; a name of torch's gets another shape."""
        for names in self._all_weights if shapes else ():
            suffix = names[0].removeprefix("weight_ih")
            for kind, shape in shapes.items():
                parameter = Parameter(torch.empty(shape, **factory))
                self._initialise(kind, parameter)
                self.register_parameter(kind + suffix, parameter)
                if kind + suffix not in names:
                    names.append(kind + suffix)
                    self._flat_weights_names.append(kind + suffix)
        if shapes:
            self._init_flat_weights()

    def _initialise(self, name: str, parameter: Tensor) -> None:
        """The scales of layer norm are 1, its offsets and learned states 0, everything else is torch's."""
        if name.startswith("norm_weight"):
            init.ones_(parameter)
        elif name.startswith(("norm_bias", "reset_")):
            init.zeros_(parameter)
        else:
            bound = 1 / math.sqrt(self.hidden_size)
            init.uniform_(parameter, -bound, bound)

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            self._initialise(name, parameter)

    def flatten_parameters(self) -> None:
        """Does nothing: no kernel here needs the weights in one buffer."""

    def extra_repr(self) -> str:
        given = ((name, getattr(self, name), default) for name, default in self.OPTIONS.items())
        return ", ".join([super().extra_repr(), *(f"{name}={value!r}" for name, value, default in given if value != default)])

    def _refuse(self, argument: str, expected: str, got: Any) -> None:
        fail(self.mode.partition("_")[0], argument, expected, got)

    def _widths(self) -> tuple[int, ...]:
        """Features of every part of the state."""
        return (self.hidden_size,)

    def _direction(
        self, x: Tensor, state: States, weights: dict[str, Tensor], segments: Segments, reverse: bool, cells: bool
    ) -> tuple[Tensor, States, Tensor | None]:
        """One layer in one direction: (output, final state, cells if asked for)."""
        raise NotImplementedError

    def _forward(
        self, input: Any, hx: States, segments: Segments, cells: bool = False
    ) -> tuple[Any, States, Any]:  # (output, final states, cells if asked for), laid out as the input
        if segments.reset is None and segments.reset_state is not None:
            self._refuse("reset_state", "None without reset", type(segments.reset_state).__name__)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, segments, cells)
        name = self.mode.partition("_")[0]
        check_inputs(name, ("reset",), input=input, reset=segments.reset)
        for part in hx or ():
            check_inputs(name, hx=part)
        self._check_ranks(input, hx)
        batched = input.dim() == 3
        self.check_input(input if batched else input.unsqueeze(1), None)
        reset, reset_state, lengths = segments
        if reset is not None and reset.shape != input.shape[:-1]:
            self._refuse("reset", f"shape {tuple(input.shape[:-1])}", tuple(reset.shape))
        if not batched:
            hx, reset_state = (None if s is None else tuple(part.unsqueeze(-2) for part in s) for s in (hx, reset_state))
            segments = Segments(_apply(Tensor.unsqueeze, reset, 1), reset_state, _apply(Tensor.reshape, lengths, 1))
            output, last, seen = self._run(input.unsqueeze(1), hx, segments, cells)
            return output.squeeze(1), tuple(part.squeeze(1) for part in last), _apply(Tensor.squeeze, seen, 1)
        if not self.batch_first:
            return self._run(input, hx, segments, cells)
        segments = Segments(_apply(Tensor.transpose, reset, 0, 1), reset_state, lengths)
        output, last, seen = self._run(input.transpose(0, 1), hx, segments, cells)
        return output.transpose(0, 1), last, _apply(Tensor.transpose, seen, 0, 1)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """torch's check, of the weights of this call: `functional_call` and FSDP replace them behind torch's list of them."""
        listed = self._flat_weights[0]
        if listed is None or (listed.dtype != input.dtype and listed.dtype != self.weight_ih_l0.dtype):
            self._init_flat_weights()
        super().check_input(input, batch_sizes)

    def _check_ranks(self, input: Tensor, hx: States) -> None:
        """torch's errors, word by word."""
        name, rank = self.mode.partition("_")[0], input.dim()
        if rank not in (2, 3):
            kind = "D tensor" if name == "RNN" else "D"
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {rank}{kind} instead")
        if hx is None or all(part.dim() == rank for part in hx):
            return
        states, article, plural = ("hx and cx", "", "s") if len(hx) == 2 else ("hx", "", "")
        ranks = ", ".join(f"{part.dim()}-D" for part in hx)
        ranks = f"({ranks})" if len(hx) == 2 else ranks
        kind = "batched 3-D" if rank == 3 else "unbatched 2-D"
        raise RuntimeError(f"For {kind} input, {states} should also be {rank}-D but got {article}{ranks} tensor{plural}")

    def _forward_packed(self, packed: PackedSequence, hx: States, segments: Segments, cells: bool) -> tuple[Any, States, Any]:
        """Pads once, runs with lengths, packs once; all inside in the packed (sorted) batch order."""
        reset, reset_state, lengths = segments
        if lengths is not None:
            self._refuse("lengths", "None with a PackedSequence, which carries its own", type(lengths).__name__)
        data, batch_sizes, order, back = packed
        self.check_input(data, batch_sizes)
        steps, sorted_lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        if reset is not None:
            reset = reset.transpose(0, 1) if self.batch_first else reset
            if reset.shape != steps.shape[:2]:
                self._refuse("reset", f"shape {tuple(steps.shape[:2])} as T B", tuple(reset.shape))
            reset = reset if order is None else reset.index_select(1, order)
        if order is not None:
            hx, reset_state = (None if s is None else tuple(part.index_select(-2, order) for part in s) for s in (hx, reset_state))
        output, last, seen = self._run(steps, hx, Segments(reset, reset_state, sorted_lengths.to(data.device)), cells)
        if back is not None:
            last = tuple(part.index_select(1, back) for part in last)
        output, seen = (
            None if t is None else PackedSequence(pack_padded_sequence(t, sorted_lengths).data, batch_sizes, order, back)
            for t in (output, seen)
        )
        return output, last, seen

    def _run(self, x: Tensor, hx: States, segments: Segments, cells: bool) -> tuple[Any, States, Any]:
        """All layers and directions over "T B I"."""
        directions = 2 if self.bidirectional else 1
        self._check_states(hx, segments.reset_state, x.shape[0], x.shape[1])
        last: list[States] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs: list[Tensor] = []
            seen: list[Any] = []
            for direction in range(directions):
                index = layer * directions + direction
                state = None if hx is None else tuple(part[index] for part in hx)
                weights = {name.partition("_l")[0]: getattr(self, name) for name in self._all_weights[index]}
                here = segments._replace(reset_state=self._reset_state(segments, weights, index))
                asked = cells and layer == self.num_layers - 1
                output, state, cell = self._direction(x, state, weights, here, direction == 1, asked)
                outputs.append(output)
                last.append(state)
                seen.append(cell)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        found = None if seen[0] is None else torch.cat(seen, -1) if directions == 2 else seen[0]
        return x, tuple(torch.stack(part) for part in zip(*last)), found

    def _reset_state(self, segments: Segments, weights: dict[str, Tensor], index: int) -> States:
        """What this layer and direction is reset to: what the call says, else what was learned, else None for zeros."""
        if segments.reset is None:
            return None
        if segments.reset_state is not None:
            return tuple(part[index] for part in segments.reset_state)
        return tuple(weights[kind] for kind in ("reset_h", "reset_c") if kind in weights) or None

    def _check_states(self, hx: States, reset_state: States, steps: int, batch: int) -> None:
        count, widths = self.num_layers * (2 if self.bidirectional else 1), self._widths()
        for index, width in enumerate(widths if hx is not None else ()):
            which = f"[{index}]" if len(widths) == 2 else ""
            self.check_hidden_size(hx[index], (count, batch, width), f"Expected hidden{which} size {{}}, got {{}}")
        for index, width in enumerate(widths if reset_state is not None else ()):
            got, each_row, each_step = tuple(reset_state[index].shape), (count, batch, width), (count, steps, batch, width)
            if got not in (each_row, each_step):
                which = f"reset_state[{index}]" if len(widths) == 2 else "reset_state"
                self._refuse(which, f"shape {each_row} as L*D B H or {each_step} as L*D T B H", got)


def _apply(change: Callable[..., Tensor], tensor: Tensor | None, *args: int) -> Tensor | None:
    return None if tensor is None else change(tensor, *args)

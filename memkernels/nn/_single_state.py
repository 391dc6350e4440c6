"""What GRU and RNN share: recurrent layers whose state is one tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memkernels.nn._recurrent import Recurrent, Segments, States


class SingleState(Recurrent):
    """The state is h alone; a module adds `_layer`, the call of its op."""

    def forward(
        self,
        input,
        hx: Tensor | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """Runs all layers over all steps; the arguments mean what they mean in `memkernels.nn.LSTM`, with h alone as the state.

        Args:
            input: "T B I", "B T I" with `batch_first`, "T I" without a batch, or a PackedSequence.
            hx: h_0 "L*D B H", without B for unbatched input; zeros if None.
            reset: bool, as the input without its feature dimension: an episode starts at this step of this row.
            lengths: int64 "B": valid steps of every row. A PackedSequence carries its own.
            reset_state: what reset replaces the state by, shaped like hx or "L*D T B H"; None: what was learned, or zero.

        Returns:
            output "T B D*H" (or "B T D*H", "T D*H", PackedSequence, as the input), h_n shaped like hx.

        Gradients: to the input, all states and all parameters; twice differentiable. Gradients do not cross a reset.
        Raises: ValueError, RuntimeError as torch.nn.GRU and torch.nn.RNN do for a wrong rank, size or dtype.
        """
        state, starts = (None if given is None else (given,) for given in (hx, reset_state))
        output, (h_n,), _ = self._forward(input, state, Segments(reset, starts, lengths))
        return output, h_n

    def _direction(
        self, x: Tensor, state: States, weights: dict[str, Tensor], segments: Segments, reverse: bool, cells: bool
    ) -> tuple[Tensor, States, Tensor | None]:
        output, h_n = self._layer(
            x,
            None if state is None else state[0],
            *(weights.get(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
            reset=segments.reset,
            reset_state=None if segments.reset_state is None else segments.reset_state[0],
            lengths=segments.lengths,
            reverse=reverse,
            num_heads=self.num_heads,
        )
        return output, (h_n,), None

    def _layer(self, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def refuse_unknown(name: str, unknown: dict[str, Any]) -> None:
    """torch's errors: of proj_size, and of any other keyword."""
    if "proj_size" in unknown:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for keyword in unknown:
        raise TypeError(f"{name}.__init__() got an unexpected keyword argument {keyword!r}")

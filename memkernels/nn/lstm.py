"""`LSTM`: torch.nn.LSTM's parameters, arguments and meaning, every layer one call of `memkernels.lstm`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from memkernels._checks import check_number
from memkernels.nn._arguments import check_integers
from memkernels.ops.lstm import lstm
from memkernels.ops.lstm_gates import lstm_gates

State = tuple[Tensor, Tensor]


class LSTM(torch.nn.RNNBase):
    """Drop-in for `torch.nn.LSTM`, plus `reset` and `lengths`.

    ``i, f, g, o = W_ih x + b_ih + W_hh h + b_hh``;  ``c = sigmoid(f) c' + sigmoid(i) tanh(g)``;  ``h = sigmoid(o) tanh(c)``, and
    ``h = W_hr h`` when `proj_size` is given. Parameters have the names, order, shapes and initial distribution of torch.nn.LSTM, so
    state_dicts load both ways. It derives from `torch.nn.RNNBase`, not from `torch.nn.LSTM`, because torch.compile refuses instances of
    the latter; this one compiles into one graph, trains in eval mode, and has double backward.

    Args:
        input_size: features I of the input.
        hidden_size: features H of the cell.
        num_layers: stacked layers.
        bias: whether the layers have `bias_ih` and `bias_hh`.
        batch_first: input and output are "B T I" instead of "T B I"; states are never affected.
        dropout: probability of zeroing an output element of every layer but the last, in training mode.
        bidirectional: a second set of weights runs from the end to the start; outputs are concatenated.
        proj_size: if positive, h has this many features P: a projection of the cell output. Runs step by step.
        device, dtype: of the parameters.

    Source: Hochreiter and Schmidhuber 1997; projection: Sak, Senior and Beaufays 2014 (arXiv 1402.1128).

    Example:
        >>> layer = LSTM(10, 20, num_layers=2, batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(3, 5, 10))
        >>> output.shape, h_n.shape
        (torch.Size([3, 5, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
    ) -> None:
        check_integers("LSTM", num_layers=num_layers, proj_size=proj_size)
        check_number("LSTM", "dropout", dropout)
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype)

    def flatten_parameters(self) -> None:
        """Does nothing: no kernel here needs the weights in one buffer."""

    def forward(self, input, hx: State | None = None, *, reset: Tensor | None = None, lengths: Tensor | None = None):
        """Runs all layers over all steps.

        Args:
            input: "T B I", "B T I" with `batch_first`, "T I" without a batch, or a PackedSequence.
            hx: (h_0 "L*D B P or H", c_0 "L*D B H"), without B for unbatched input; zeros if None.
            reset: bool, laid out as the input without its feature dimension (for a PackedSequence: as its padded form, in the caller's
                batch order). Where True, the state that enters this step of this row, in every layer and direction, is zero.
            lengths: int64 "B": valid steps of every row; on any device, never synchronised. Outputs past the end are 0, and the final
                state is the one at the end. A PackedSequence carries its own.

        Returns:
            output "T B D*H" (or "B T D*H", "T D*H", PackedSequence, as the input), (h_n, c_n) shaped like hx.

        Gradients: to the input, both states and all parameters; twice differentiable. Gradients do not cross a reset.
        Raises: ValueError, RuntimeError as torch.nn.LSTM does for a wrong rank, size or dtype.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, reset, lengths)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None and not hx[0].dim() == hx[1].dim() == input.dim():
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {input.dim()}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
        self.check_input(input if batched else input.unsqueeze(1), None)
        swap = self.batch_first and batched
        steps = input.transpose(0, 1) if swap else input if batched else input.unsqueeze(1)
        if hx is not None and not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if reset is not None:
            if reset.shape != input.shape[:-1]:
                raise ValueError(f"LSTM: reset: expected shape {tuple(input.shape[:-1])}, got {tuple(reset.shape)}")
            reset = reset.transpose(0, 1) if swap else reset if batched else reset.unsqueeze(1)
        if lengths is not None and not batched:
            lengths = lengths.reshape(1)
        output, (h_n, c_n) = self._run(steps, hx, reset, lengths)
        if not batched:
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return output.transpose(0, 1) if swap else output, (h_n, c_n)

    def _forward_packed(self, packed: PackedSequence, hx: State | None, reset: Tensor | None, lengths: Tensor | None):
        """Pads once, runs with lengths, packs once; all inside in the packed (sorted) batch order."""
        if lengths is not None:
            raise ValueError("LSTM: lengths: expected None with a PackedSequence, which carries its own lengths")
        data, batch_sizes, order, back = packed
        self.check_input(data, batch_sizes)
        steps, sorted_lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
        if reset is not None:
            reset = reset.transpose(0, 1) if self.batch_first else reset
            if reset.shape != steps.shape[:2]:
                raise ValueError(f"LSTM: reset: expected shape {tuple(steps.shape[:2])} as T B, got {tuple(reset.shape)}")
            reset = reset if order is None else reset.index_select(1, order)
        if hx is not None and order is not None:
            hx = (hx[0].index_select(1, order), hx[1].index_select(1, order))
        output, (h_n, c_n) = self._run(steps, hx, reset, sorted_lengths.to(data.device))
        if back is not None:
            h_n, c_n = h_n.index_select(1, back), c_n.index_select(1, back)
        return PackedSequence(pack_padded_sequence(output, sorted_lengths).data, batch_sizes, order, back), (h_n, c_n)

    def _run(self, x: Tensor, hx: State | None, reset: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        """All layers and directions over "T B I"."""
        directions = 2 if self.bidirectional else 1
        if hx is not None:
            sizes = (self.num_layers * directions, x.shape[1])
            self.check_hidden_size(hx[0], (*sizes, self.proj_size or self.hidden_size), "Expected hidden[0] size {}, got {}")
            self.check_hidden_size(hx[1], (*sizes, self.hidden_size), "Expected hidden[1] size {}, got {}")
        last_h, last_c = [], []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                state = None if hx is None else (hx[0][index], hx[1][index])
                output, (h, c) = self._direction(x, state, self._all_weights[index], reset, lengths, direction == 1)
                outputs.append(output)
                last_h.append(h)
                last_c.append(c)
            x = torch.cat(outputs, -1) if directions == 2 else outputs[0]
        return x, (torch.stack(last_h), torch.stack(last_c))

    def _direction(self, x, state, names, reset, lengths, reverse) -> tuple[Tensor, State]:
        """One layer in one direction."""
        weight_ih, weight_hh, *rest = (getattr(self, name) for name in names)
        bias_ih, bias_hh = rest[:2] if self.bias else (None, None)
        if self.proj_size == 0:
            return lstm(x, state, weight_ih, weight_hh, bias_ih, bias_hh, reset=reset, lengths=lengths, reverse=reverse)
        return _projected_lstm(x, state, (weight_ih, weight_hh, bias_ih, bias_hh, rest[-1]), reset, lengths, reverse)


def _projected_lstm(x: Tensor, state: State | None, weights, reset, lengths, reverse: bool) -> tuple[Tensor, State]:
    """A layer whose recurrent state is projected, step by step, with the input's share of the gates computed at once."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
    gates_input = F.linear(x, weight_ih, None if bias_ih is None else bias_ih + bias_hh)
    if state is None:
        state = gates_input.new_zeros(x.shape[1], weight_hr.shape[0]), gates_input.new_zeros(x.shape[1], weight_hr.shape[1])
    h, c = (part.to(gates_input.dtype) for part in state)
    outputs: list[Tensor] = []
    for t in reversed(range(x.shape[0])) if reverse else range(x.shape[0]):
        if reset is not None:
            h, c = h.masked_fill(reset[t, :, None], 0), c.masked_fill(reset[t, :, None], 0)
        cell_output, c_new = lstm_gates(gates_input[t] + F.linear(h, weight_hh), c)
        h_new = F.linear(cell_output, weight_hr)
        if lengths is None:
            outputs.append(h_new)
            h, c = h_new, c_new
        else:
            valid = (t < lengths)[:, None]
            outputs.append(torch.where(valid, h_new, 0))
            h, c = torch.where(valid, h_new, h), torch.where(valid, c_new, c)
    if not outputs:
        return gates_input.new_zeros(0, *h.shape), (h, c)
    return torch.stack(outputs[::-1] if reverse else outputs), (h, c)

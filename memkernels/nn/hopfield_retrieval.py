"""`HopfieldRetrieval`: a layer that retrieves from stored patterns by the update rule of modern Hopfield networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memkernels._checks import check_dtype, check_finite, check_floating, check_number, fail
from memkernels.nn._arguments import check_inputs, check_sizes, refuse_script
from memkernels.ops.hopfield_retrieve import hopfield_retrieve


class HopfieldRetrieval(nn.Module):
    """Queries made from the input are associated with stored patterns, `steps` times, in each head, and what is read is projected.

    With heads h and projections W: ``xi = W_q x``, ``k = W_k y``, ``v = W_v y``, ``xi <- softmax(beta xi k^T) k`` (all but the last step),
    ``out = W_o [softmax(beta xi k^T) v]_h + b_o``. One step is attention; more of them move the query to a fixed point near a pattern.

    Args:
        input_size: features I of the input.
        stored_size: features S of the stored patterns; `input_size` if None.
        patterns: N: the layer stores N patterns of its own, learned; None: they are passed to each call.
        num_heads: heads NH.
        head_size: features of a head's patterns; input_size // num_heads if None.
        output_size: features O of the output; `input_size` if None.
        beta: inverse temperature; 1 / sqrt(head_size) if None. A large one retrieves single patterns, a small one means of many.
        steps: how many times weights are computed.
        tolerance: a query that a step moves by less moves no more; None: all steps are taken.
        bias: whether the projections have one.
        device, dtype: of the parameters.

    Raises: ValueError for a size that is not positive, for patterns that are missing or not wanted, and for tensors of another size.
    Source: Ramsauer et al. 2021 (arXiv 2008.02217), section 3: Hopfield and, with `patterns`, HopfieldLayer.

    Example:
        >>> layer = HopfieldRetrieval(8, num_heads=2, steps=3)
        >>> layer(torch.randn(3, 5, 8), torch.randn(3, 20, 8)).shape
        torch.Size([3, 5, 8])
        >>> HopfieldRetrieval(8, patterns=100)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        stored_size: int | None = None,
        *,
        patterns: int | None = None,
        num_heads: int = 1,
        head_size: int | None = None,
        output_size: int | None = None,
        beta: float | None = None,
        steps: int = 1,
        tolerance: float | None = None,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_sizes("HopfieldRetrieval", input_size=input_size, num_heads=num_heads, steps=steps)
        stored_size = input_size if stored_size is None else stored_size
        output_size = input_size if output_size is None else output_size
        head_size = max(input_size // num_heads, 1) if head_size is None else head_size
        check_sizes("HopfieldRetrieval", stored_size=stored_size, head_size=head_size, output_size=output_size)
        if patterns is not None:
            check_sizes("HopfieldRetrieval", patterns=patterns)
        if tolerance is not None and not check_number("HopfieldRetrieval", "tolerance", tolerance) >= 0:
            fail("HopfieldRetrieval", "tolerance", "a number from 0 on, or None", tolerance)
        self.input_size, self.stored_size, self.output_size = input_size, stored_size, output_size
        self.num_heads, self.head_size, self.steps, self.tolerance = num_heads, head_size, steps, tolerance
        self.beta = head_size**-0.5 if beta is None else float(check_finite("HopfieldRetrieval", "beta", beta))
        factory, inner = {"device": device, "dtype": dtype}, num_heads * head_size
        self.query = nn.Linear(input_size, inner, bias, **factory)
        self.key = nn.Linear(stored_size, inner, bias, **factory)
        self.value = nn.Linear(stored_size, inner, bias, **factory)
        self.output = nn.Linear(inner, output_size, bias, **factory)
        self.patterns = None if patterns is None else nn.Parameter(torch.empty(patterns, stored_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layers as torch does, patterns with normal values, so that each differs from the others."""
        for layer in (self.query, self.key, self.value, self.output):
            layer.reset_parameters()
        if self.patterns is not None:
            nn.init.normal_(self.patterns)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.stored_size}, num_heads={self.num_heads}, beta={self.beta:.4g}, steps={self.steps}"

    def forward(
        self, input: Tensor, stored: Tensor | None = None, mask: Tensor | None = None, *, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Retrieves for every position of the input.

        Args:
            input: "B T I".
            stored: "B N S"; None for a layer that has patterns of its own.
            mask: bool "B N" (own patterns: "N"), True = the pattern takes part.
            return_weights: also return the weights of the last step, "B NH T N": which patterns an output came from.

        Returns:
            output "B T O", or (output, weights).
        """
        self._check(input, stored, mask)
        batch, steps = input.shape[:2]
        query = self.query(input).unflatten(-1, (self.num_heads, self.head_size))
        rows = self.patterns[None] if stored is None else stored  # type: ignore[index]
        key, value = (f(rows).unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2).flatten(0, 1) for f in (self.key, self.value))
        # Patterns of the layer are shared: its heads are the batch of the op, and all sequences are queries of them.
        query = query.permute(2, 0, 1, 3).flatten(1, 2) if stored is None else query.transpose(1, 2).flatten(0, 1)
        if mask is not None:
            mask = mask.expand(self.num_heads, -1) if stored is None else mask.repeat_interleave(self.num_heads, 0)
        options = dict(beta=self.beta, steps=self.steps, tolerance=self.tolerance, return_weights=return_weights)
        found = hopfield_retrieve(query, key, value=value, mask=mask, **options)  # type: ignore[arg-type]
        parts: list[Tensor] = [self._positions(t, stored is None, batch, steps) for t in (found if return_weights else (found,))]
        output = self.output(parts[0].transpose(1, 2).flatten(2))
        return (output, parts[1]) if return_weights else output

    def _positions(self, t: Any, shared: bool, batch: int, steps: int) -> Tensor:
        """What the op returned, as "B NH T ..."."""
        return t.unflatten(1, (batch, steps)).transpose(0, 1) if shared else t.unflatten(0, (batch, self.num_heads))

    def _check(self, input: Tensor, stored: Tensor | None, mask: Tensor | None) -> None:
        check_inputs("HopfieldRetrieval", ("stored", "mask"), input=input, stored=stored, mask=mask, parameters=self.query.weight)
        if input.dim() != 3 or input.shape[-1] != self.input_size:
            fail("HopfieldRetrieval", "input", f"[B T I] with I={self.input_size}", f"shape {tuple(input.shape)}")
        if (stored is None) != (self.patterns is not None):
            fail("HopfieldRetrieval", "stored", "None: the layer has patterns" if stored is not None else "patterns", type(stored).__name__)
        if stored is not None:
            if stored.dim() != 3 or stored.shape[::2] != (input.shape[0], self.stored_size):
                wanted = f"[B N S] with B={input.shape[0]}, S={self.stored_size}"
                fail("HopfieldRetrieval", "stored", wanted, f"shape {tuple(stored.shape)}")
        check_floating("HopfieldRetrieval", parameters=self.query.weight, input=input, stored=stored)
        if mask is not None:
            check_dtype("HopfieldRetrieval", "mask", mask, torch.bool, input)
            rows: Any = self.patterns if stored is None else stored
            if mask.shape != rows.shape[:-1]:
                fail("HopfieldRetrieval", "mask", f"shape {tuple(rows.shape[:-1])}, one element a pattern", f"shape {tuple(mask.shape)}")

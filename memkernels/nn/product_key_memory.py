"""`ProductKeyMemory`: a layer that reads a few of very many learned values, found by product keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memkernels._checks import check_choice, check_flag, check_floating
from memkernels.nn._arguments import check_inputs, check_sizes, refuse_script
from memkernels.ops.product_key_search import product_key_search
from memkernels.ops.weighted_bag import weighted_bag

NORMS = (None, "batch", "layer")


class ProductKeyMemory(nn.Module):
    """S * S learned values, of which each head of each position reads the k best.

    ``q = norm(W_q x + b_q)``, for each head two halves; ``scores, index = product_key_search(q, subkeys, k)``;
    ``y = sum over heads and k of softmax(scores) values[index]``. The heads share the values and have their own subkeys.

    Args:
        input_size: features I of the input.
        output_size: features O of a value and of the output; `input_size` if None.
        heads: heads NH.
        subkeys: subkeys S of each half; there are S * S values.
        k: values that each head reads, at most S * S.
        key_size: features of a key, even: two halves of key_size / 2.
        query_norm: "batch" (BatchNorm over all positions, as published: more of the values are used), "layer" (LayerNorm) or None.
        device, dtype: of the parameters.

    Shapes: input "... I" -> "... O"; with ``return_weights=True`` (output, weights "... NH k", index int64 "... NH k"): which values an
        output came from, and how much of each.
    Gradients: to the input and all parameters; the gradient of the values is dense.
    Raises: ValueError for a size that does not fit; TypeError for an argument of another type.
    Source: Lample et al., Large Memory Layers with Product Keys (2019).

    Example:
        >>> layer = ProductKeyMemory(8, 6, heads=2, subkeys=16, k=4, key_size=12)
        >>> layer(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 6])
        >>> output, weights, index = layer(torch.randn(7, 8), return_weights=True)
        >>> weights.shape, bool((index < 16 * 16).all())
        (torch.Size([7, 2, 4]), True)
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        input_size: int,
        output_size: int | None = None,
        *,
        heads: int = 4,
        subkeys: int = 512,
        k: int = 32,
        key_size: int = 256,
        query_norm: str | None = "batch",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        output_size = input_size if output_size is None else output_size
        check_sizes(
            "ProductKeyMemory", input_size=input_size, output_size=output_size, heads=heads, subkeys=subkeys, k=k, key_size=key_size
        )
        check_choice("ProductKeyMemory", "query_norm", query_norm, NORMS)
        if key_size % 2:
            raise ValueError(f"ProductKeyMemory: key_size: expected an even number, got {key_size}")
        if k > subkeys * subkeys:
            raise ValueError(f"ProductKeyMemory: k: expected at most subkeys * subkeys = {subkeys * subkeys}, got {k}")
        self.input_size, self.output_size, self.heads, self.k, self.key_size = input_size, output_size, heads, k, key_size
        factory = {"device": device, "dtype": dtype}
        self.query = nn.Linear(input_size, heads * key_size, **factory)
        self.norm: nn.Module = nn.Identity()
        if query_norm is not None:
            self.norm = (nn.BatchNorm1d if query_norm == "batch" else nn.LayerNorm)(heads * key_size, **factory)
        self.subkeys = nn.Parameter(torch.empty(heads, 2, subkeys, key_size // 2, **factory))
        self.values = nn.Parameter(torch.empty(subkeys * subkeys, output_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: subkeys uniform within 1 / sqrt(half a key), values normal with standard deviation 1 / sqrt(O)."""
        self.query.reset_parameters()
        if not isinstance(self.norm, nn.Identity):
            self.norm.reset_parameters()  # type: ignore[operator]
        bound = (self.key_size // 2) ** -0.5
        nn.init.uniform_(self.subkeys, -bound, bound)
        nn.init.normal_(self.values, std=self.output_size**-0.5)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.output_size}, heads={self.heads}, subkeys={self.subkeys.shape[2]}, k={self.k}"

    def forward(self, input: Tensor, return_weights: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        check_inputs("ProductKeyMemory", input=input, parameters=self.query.weight)
        check_flag("ProductKeyMemory", "return_weights", return_weights)
        if input.dim() < 1 or input.shape[-1] != self.input_size:
            raise ValueError(f"ProductKeyMemory: input: expected [... I] with I={self.input_size}, got shape {tuple(input.shape)}")
        check_floating("ProductKeyMemory", parameters=self.query.weight, input=input)
        query = self.norm(self.query(input.reshape(-1, self.input_size)))
        scores, index = product_key_search(query.to(self.subkeys.dtype).unflatten(-1, (self.heads, 2, -1)), self.subkeys, self.k)
        weights = torch.softmax(scores, -1)
        # An absent key (-1: its score is -inf) has weight 0.
        output = weighted_bag(self.values, index.clamp(min=0).flatten(1), weights.flatten(1))
        output = output.view(*input.shape[:-1], self.output_size)
        if not return_weights:
            return output
        shape = (*input.shape[:-1], self.heads, self.k)
        return output, weights.view(shape), index.view(shape)

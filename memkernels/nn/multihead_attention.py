"""`MultiheadAttention`: torch.nn.MultiheadAttention's parameters, arguments and meaning around one call of `memkernels.attention`."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memkernels._checks import check_tensor
from memkernels.nn._arguments import check_integers, check_probability, check_sizes, refuse_script
from memkernels.ops.attention import attention


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`.

    ``concat_h(softmax(Q_h K_h^T / sqrt(D)) V_h) W_o^T + b_o`` with ``Q, K, V = x W_q^T + b_q, ...``. Without the weights
    (``need_weights=False``) heads are attended by the fused op, which never holds a Q x K matrix; with them, by plain torch ops.

    Differences: a query whose keys are all masked gets weight 0 everywhere (torch: NaN); ``is_causal=True`` needs no `attn_mask`.

    Args:
        embed_dim: features E of the query and the output; `num_heads` must divide it.
        num_heads: heads NH, each with E / NH features.
        dropout: probability of dropping an attention weight, in training mode.
        bias: biases in the input and output projections.
        add_bias_kv: one learned key and value are appended to every sequence.
        add_zero_attn: one zero key and value are appended to every sequence.
        kdim, vdim: features of key and value; E by default.
        batch_first: "B T E" instead of "T B E".
        device, dtype: of the parameters.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.

    Example:
        >>> layer = MultiheadAttention(16, 4, batch_first=True)
        >>> x = torch.randn(2, 5, 16)
        >>> output, weights = layer(x, x, x, need_weights=False)
        >>> output.shape, weights
        (torch.Size([2, 5, 16]), None)
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        check_integers("MultiheadAttention", embed_dim=embed_dim, num_heads=num_heads)
        check_sizes("MultiheadAttention", 0, **{n: size for n, size in (("kdim", kdim), ("vdim", vdim)) if size is not None})
        check_probability("MultiheadAttention", "dropout", dropout)
        super().__init__(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends.

        Args:
            query: "Q B E", "B Q E" with `batch_first`, "Q E" without a batch; key "K B kdim", value "K B vdim" likewise.
            key_padding_mask: "B K" ("K"): bool, True = ignore this key; or float, added to the scores.
            need_weights: also return the attention weights.
            attn_mask: "Q K" or "B*NH Q K": bool, True = do not attend; or float, added to the scores (differentiable).
            average_attn_weights: weights are the mean over heads.
            is_causal: query i attends keys 0..i; `attn_mask`, if given, must then be the causal mask.

        Returns:
            output like query, and weights "B Q K", "B NH Q K" if not averaged, without B for unbatched input, or None.

        Gradients: to query, key, value, float masks and all parameters; twice differentiable.
        Raises: AssertionError, RuntimeError as torch.nn.MultiheadAttention does.
        """
        for name, got in (("query", query), ("key", key), ("value", value)):
            check_tensor("MultiheadAttention", name, got)
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        batched = _check_shapes(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _transposed(query, key, value)
        self._check_sizes(query, key, value, key_padding_mask, attn_mask)
        appended = (self.bias_k is not None) + self.add_zero_attn
        causal = is_causal and not need_weights and not appended
        if causal:
            attn_mask = None
        elif is_causal and attn_mask is None:
            steps = torch.arange(max(query.shape[1], key.shape[1]), device=query.device)
            attn_mask = steps[: query.shape[1], None] < steps[: key.shape[1]]
        q, k, v = self._project(query, key, value)
        mask = _merge_masks(attn_mask, key_padding_mask, self.num_heads, appended, q.dtype)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            heads, weights = _attend_with_weights(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            attended: Any = attention(q, k, v, mask, dropout, causal)
            heads, weights = attended, None
        output = F.linear(heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        output = output if batched and self.batch_first else output.transpose(0, 1) if batched else output.squeeze(0)
        return output, weights

    def _check_sizes(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None) -> None:
        (batch, n_queries, width), n_keys = query.shape, key.shape[1]
        if width != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {width}")
        if self._qkv_same_embed_dim and key.shape != value.shape:
            raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
        if key.shape[:2] != value.shape[:2]:
            raise AssertionError(f"key's batch and sequence dims {key.shape[:2]} do not match value's {value.shape[:2]}")
        if padding is not None and padding.shape != (batch, n_keys):
            raise AssertionError(f"key_padding_mask: expected shape {(batch, n_keys)}, got {tuple(padding.shape)}")
        if mask is not None:
            expected = (n_queries, n_keys) if mask.dim() == 2 else (batch * self.num_heads, n_queries, n_keys)
            if mask.shape != expected:
                raise RuntimeError(f"The shape of the {mask.dim()}D attn_mask is {mask.shape}, but should be {expected}.")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Heads "B NH T D" of query, key and value, with the learned and the zero row appended to the last two."""
        width = self.embed_dim
        if self._qkv_same_embed_dim and query is key and key is value:
            projected = list(F.linear(query, self.in_proj_weight, self.in_proj_bias).split(width, -1))
        else:
            weights = self.in_proj_weight.split(width) if self._qkv_same_embed_dim else None
            weights = weights or (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(width)
            projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        for index, bias in ((1, self.bias_k), (2, self.bias_v)):
            rows = projected[index]
            extra = [] if bias is None else [bias.expand(rows.shape[0], 1, width).to(rows.dtype)]
            extra += [rows.new_zeros(rows.shape[0], 1, width)] if self.add_zero_attn else []
            projected[index] = torch.cat([rows, *extra], 1) if extra else rows
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Swaps the first two dimensions and keeps `query is key is value`, which lets one matmul project all three."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)


def _check_shapes(query, key, value, padding, mask, heads: int) -> bool:
    """Ranks and mask dtypes as torch.nn.MultiheadAttention wants them; returns whether the input is batched."""
    if query.dim() not in (2, 3):
        raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {query.dim()}-D query tensor")
    rank, kind = query.dim(), "batched (3-D)" if query.dim() == 3 else "unbatched (2-D)"
    if key.dim() != rank or value.dim() != rank:
        found = f"{key.dim()}-D and {value.dim()}-D tensors respectively"
        raise AssertionError(f"For {kind} `query`, expected `key` and `value` to be {rank}-D but found {found}")
    if padding is not None and padding.dim() != rank - 1:
        raise AssertionError(
            f"For {kind} `query`, expected `key_padding_mask` to be `None` or {rank - 1}-D but found {padding.dim()}-D tensor instead"
        )
    if mask is not None and mask.dim() not in (2, 3):
        raise AssertionError(f"For {kind} `query`, expected `attn_mask` to be `None`, 2-D or 3-D but found {mask.dim()}-D tensor instead")
    if mask is not None and rank == 2 and mask.dim() == 3 and mask.shape != (heads, query.shape[0], key.shape[0]):
        raise AssertionError(f"Expected `attn_mask` shape to be {(heads, query.shape[0], key.shape[0])} but got {mask.shape}")
    for name, m in (("key_padding_mask", padding), ("attn_mask", mask)):
        if m is not None and m.dtype != torch.bool and not m.is_floating_point():
            raise AssertionError(f"only bool and floating types of {name} are supported")
    if mask is not None and padding is not None and mask.dtype != padding.dtype:
        warnings.warn("Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.", stacklevel=3)
    return rank == 3


def _merge_masks(mask: Tensor | None, padding: Tensor | None, heads: int, appended: int, dtype: torch.dtype) -> Tensor | None:
    """One mask "B|1 NH|1 Q|1 K" for `attention`: bool (True = attend) if all masks are bool, else additive."""
    parts = [] if mask is None else [mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))]
    parts += [] if padding is None else [padding[:, None, None, :]]
    if not parts:
        return None
    if all(part.dtype == torch.bool for part in parts):
        merged = ~(parts[0] | parts[1] if len(parts) == 2 else parts[0])
        return F.pad(merged, (0, appended), value=True) if appended else merged
    additive = [torch.zeros_like(p, dtype=dtype).masked_fill(p, -math.inf) if p.dtype == torch.bool else p.to(dtype) for p in parts]
    merged = additive[0] + additive[1] if len(parts) == 2 else additive[0]
    return F.pad(merged, (0, appended)) if appended else merged


def _attend_with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        # A row without keys is given finite scores first, so that neither its weights nor its gradients become NaN.
        weights = torch.softmax(scores.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    else:
        weights = torch.softmax(scores, -1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return weights.to(v.dtype) @ v, weights

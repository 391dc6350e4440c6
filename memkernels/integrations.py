"""Ops under the names and with the meaning that other libraries call: `attention` as an attention function of Hugging Face transformers."""

from __future__ import annotations

from typing import Any

import torch

from memkernels._checks import fail
from memkernels.ops.attention import attention

__all__ = ["huggingface_attention", "register_huggingface"]


def register_huggingface(name: str = "memkernels") -> str:
    """Makes `huggingface_attention` known to transformers: models are then built or loaded with ``attn_implementation=name``.

    Masks come as transformers makes them for "sdpa": boolean, or none at all where ``is_causal`` says enough.

    Returns:
        name.

    Raises:
        ImportError: transformers is not installed, or older than its AttentionInterface (4.48).
    """
    from transformers import AttentionInterface  # type: ignore[import-not-found]

    AttentionInterface.register(name, huggingface_attention)
    try:
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask  # type: ignore[import-not-found]
    except ImportError:  # versions whose models make their masks themselves
        return name
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def huggingface_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`attention` with the arguments of transformers' attention functions.

    A query without a key (a padded one) gets 0, where "eager" attends all keys evenly.

    Args:
        module: the calling layer; its ``is_causal`` (default True) counts where the argument is None.
        query: "B NH Q D". key: "B NHk K D", NHk a divisor of NH. value: "B NHk K V".
        attention_mask: broadcastable to "B NH Q K": bool (True = attend) or added to the scores; None with more than one query: causal
            if the layer is, query i at key i.
        dropout: of the weights, 0 outside of training. scaling: of the scores, default 1 / sqrt(D).
        position_bias: broadcastable to "B NH Q K", added to the scores; differentiable.
        options: ``softcap`` and ``s_aux`` (a sink logit a head) go to `attention`; what else transformers passes changes nothing here.

    Returns:
        (out "B Q NH V", contiguous; None for the weights, which are never made).

    Raises:
        ValueError: a paged cache, or what `attention` refuses.
    """
    if options.get("cache") is not None:
        fail("huggingface_attention", "cache", "None (continuous batching is not supported)", type(options["cache"]).__name__)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    mask = None if attention_mask is None else attention_mask[..., : key.shape[2]]  # a static cache may hold more columns than keys
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        if mask is None:
            mask = position_bias
        else:
            mask = torch.where(mask, position_bias, -torch.inf) if mask.dtype == torch.bool else position_bias + mask
    grouped = query.shape[1] != key.shape[1]
    out = attention(query, key, value, mask, dropout, causal, scaling, grouped, **_further(options))
    return out.transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


NAMES = {"softcap": "softcap", "s_aux": "sink"}  # what transformers calls options of `attention`


def _further(options: dict[str, Any]) -> dict[str, Any]:
    return {ours: options[theirs] for theirs, ours in NAMES.items() if options.get(theirs) is not None}

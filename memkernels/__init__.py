"""Fused, differentiable memory mechanisms for PyTorch: recurrent state, attention, external memory.

Every op runs on several backends (CUDA C++, Triton, C++ for the CPU, plain torch) behind one name; `explain` tells which and why.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from memkernels._backends import backend, cpu_level, empty_cache
from memkernels._checks import BackendError
from memkernels._registry import explain
from memkernels.ops import (
    DNCController,
    DNCInterface,
    DNCState,
    NTMState,
    SparseMemory,
    allocation,
    attention,
    attention_varlen,
    content_address,
    content_read,
    dnc_sequence,
    dnc_step,
    gru,
    gru_gates,
    hopfield_retrieve,
    link_read,
    link_step,
    link_update,
    location_address,
    lstm,
    lstm_gates,
    memory_read,
    memory_write,
    memory_write_,
    merge_attention,
    ntm_sequence,
    paged_attention,
    product_key_search,
    quantize_rows,
    quantized_attention,
    retrieval_attention,
    rnn,
    segment_attention,
    sparse_read,
    sparse_write,
    topk_read,
    usage,
    weighted_bag,
)

if TYPE_CHECKING:
    from memkernels._backends import backends
    from memkernels.store import KeyValueStore
else:
    from memkernels import backends  # the package, which is callable

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "DNCController",
    "DNCInterface",
    "DNCState",
    "KeyValueStore",
    "NTMState",
    "SparseMemory",
    "allocation",
    "attention",
    "attention_varlen",
    "backend",
    "backends",
    "content_address",
    "content_read",
    "cpu_level",
    "dnc_sequence",
    "dnc_step",
    "empty_cache",
    "explain",
    "gru",
    "gru_gates",
    "hopfield_retrieve",
    "link_read",
    "link_step",
    "link_update",
    "location_address",
    "lstm",
    "lstm_gates",
    "memory_read",
    "memory_write",
    "memory_write_",
    "merge_attention",
    "ntm_sequence",
    "paged_attention",
    "product_key_search",
    "quantize_rows",
    "quantized_attention",
    "retrieval_attention",
    "rnn",
    "segment_attention",
    "sparse_read",
    "sparse_write",
    "topk_read",
    "usage",
    "weighted_bag",
]

_LAZY = ("bench", "distributed", "integrations", "models", "nn", "plots", "store", "testing")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_module(f"memkernels.{name}")
    if name == "KeyValueStore":
        return import_module("memkernels.store").KeyValueStore
    raise AttributeError(f"module 'memkernels' has no attribute {name!r}")

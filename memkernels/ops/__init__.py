"""One file per op: the public function, its checks and its declaration."""

from memkernels.ops._store import ByteKeys
from memkernels.ops.allocation import allocation
from memkernels.ops.attention import attention
from memkernels.ops.attention_varlen import attention_varlen
from memkernels.ops.content_address import content_address
from memkernels.ops.content_read import content_read
from memkernels.ops.dnc_sequence import DNCController, dnc_sequence
from memkernels.ops.dnc_step import DNCInterface, DNCState, dnc_step
from memkernels.ops.gru import gru
from memkernels.ops.gru_gates import gru_gates
from memkernels.ops.hopfield_retrieve import hopfield_retrieve
from memkernels.ops.link_read import link_read
from memkernels.ops.link_step import link_step, link_update
from memkernels.ops.location_address import location_address
from memkernels.ops.lstm import lstm
from memkernels.ops.lstm_gates import lstm_gates
from memkernels.ops.memory_read import memory_read
from memkernels.ops.memory_write import memory_write, memory_write_
from memkernels.ops.merge_attention import merge_attention
from memkernels.ops.ntm_sequence import NTMState, ntm_sequence
from memkernels.ops.paged_attention import paged_attention
from memkernels.ops.product_key_search import product_key_search
from memkernels.ops.quantized_attention import quantize_rows, quantized_attention
from memkernels.ops.retrieval_attention import retrieval_attention
from memkernels.ops.rnn import rnn
from memkernels.ops.segment_attention import segment_attention
from memkernels.ops.sparse_memory import SparseMemory, sparse_read, sparse_write
from memkernels.ops.store_erase_ import store_erase_
from memkernels.ops.store_find import store_find
from memkernels.ops.store_gather import store_gather
from memkernels.ops.store_items import store_items
from memkernels.ops.store_move_ import store_move_
from memkernels.ops.store_scatter_ import store_scatter_
from memkernels.ops.store_upsert_ import store_upsert_
from memkernels.ops.topk_read import topk_read
from memkernels.ops.usage import usage
from memkernels.ops.weighted_bag import weighted_bag

__all__ = [
    "ByteKeys",
    "DNCController",
    "DNCInterface",
    "DNCState",
    "NTMState",
    "SparseMemory",
    "allocation",
    "attention",
    "attention_varlen",
    "content_address",
    "content_read",
    "dnc_sequence",
    "dnc_step",
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
    "store_erase_",
    "store_find",
    "store_gather",
    "store_items",
    "store_move_",
    "store_scatter_",
    "store_upsert_",
    "topk_read",
    "usage",
    "weighted_bag",
]

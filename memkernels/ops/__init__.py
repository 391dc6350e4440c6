"""One file per op: the public function, its checks and its declaration."""

from memkernels.ops.attention import attention
from memkernels.ops.content_address import content_address
from memkernels.ops.content_read import content_read
from memkernels.ops.gru import gru
from memkernels.ops.gru_gates import gru_gates
from memkernels.ops.lstm import lstm
from memkernels.ops.lstm_gates import lstm_gates
from memkernels.ops.memory_read import memory_read
from memkernels.ops.memory_write import memory_write, memory_write_
from memkernels.ops.quantized_attention import quantize_rows, quantized_attention
from memkernels.ops.rnn import rnn

__all__ = [
    "attention",
    "content_address",
    "content_read",
    "gru",
    "gru_gates",
    "lstm",
    "lstm_gates",
    "memory_read",
    "memory_write",
    "memory_write_",
    "quantize_rows",
    "quantized_attention",
    "rnn",
]

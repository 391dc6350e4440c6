"""Modules on top of the ops: drop-in where torch.nn has the module."""

from memkernels.nn.external_memory import ExternalMemory, ExternalMemoryState
from memkernels.nn.lstm import LSTM
from memkernels.nn.lstm_cell import LSTMCell
from memkernels.nn.multihead_attention import MultiheadAttention

__all__ = ["LSTM", "ExternalMemory", "ExternalMemoryState", "LSTMCell", "MultiheadAttention"]

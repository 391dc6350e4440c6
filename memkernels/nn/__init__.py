"""Modules on top of the ops: drop-in where torch.nn has the module."""

from memkernels.nn.external_memory import ExternalMemory, ExternalMemoryState
from memkernels.nn.graph_attention import GraphAttention, csr_from_edges
from memkernels.nn.gru import GRU
from memkernels.nn.gru_cell import GRUCell
from memkernels.nn.lstm import LSTM
from memkernels.nn.lstm_cell import LSTMCell
from memkernels.nn.multihead_attention import MultiheadAttention
from memkernels.nn.product_key_memory import ProductKeyMemory
from memkernels.nn.rnn import RNN
from memkernels.nn.rnn_cell import RNNCell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "ExternalMemory",
    "ExternalMemoryState",
    "GRUCell",
    "GraphAttention",
    "LSTMCell",
    "MultiheadAttention",
    "ProductKeyMemory",
    "RNNCell",
    "csr_from_edges",
]

"""Modules on top of the ops: drop-in where torch.nn has the module."""

from memkernels.nn._store_memory import StoreState
from memkernels.nn._trace import SparseTrace, Trace
from memkernels.nn.dnc import DNC, DNCLayerState
from memkernels.nn.external_memory import ExternalMemory, ExternalMemoryState
from memkernels.nn.graph_attention import GraphAttention, csr_from_edges
from memkernels.nn.gru import GRU
from memkernels.nn.gru_cell import GRUCell
from memkernels.nn.hopfield_retrieval import HopfieldRetrieval
from memkernels.nn.lstm import LSTM
from memkernels.nn.lstm_cell import LSTMCell
from memkernels.nn.multihead_attention import MultiheadAttention
from memkernels.nn.ntm import NTM
from memkernels.nn.product_key_memory import ProductKeyMemory
from memkernels.nn.rnn import RNN
from memkernels.nn.rnn_cell import RNNCell
from memkernels.nn.sam import SAM, SAMState

__all__ = [
    "DNC",
    "GRU",
    "LSTM",
    "NTM",
    "RNN",
    "SAM",
    "DNCLayerState",
    "ExternalMemory",
    "ExternalMemoryState",
    "GRUCell",
    "GraphAttention",
    "HopfieldRetrieval",
    "LSTMCell",
    "MultiheadAttention",
    "ProductKeyMemory",
    "RNNCell",
    "SAMState",
    "SparseTrace",
    "StoreState",
    "Trace",
    "csr_from_edges",
]

"""Whole models of the memory literature, built on `memkernels.nn`."""

from memkernels.models.knn_lm import KnnLM
from memkernels.models.memory_lm import MemoryLM, MemoryLMConfig
from memkernels.models.vocabulary import Vocabulary

__all__ = ["KnnLM", "MemoryLM", "MemoryLMConfig", "Vocabulary"]

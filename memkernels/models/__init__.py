"""Whole models of the memory literature, built on `memkernels.nn`."""

from memkernels.models.memory_lm import MemoryLM, MemoryLMConfig
from memkernels.models.vocabulary import Vocabulary

__all__ = ["MemoryLM", "MemoryLMConfig", "Vocabulary"]

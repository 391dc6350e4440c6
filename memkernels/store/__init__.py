"""The exact key-value store: an index in memory and, with a path, a log on disk."""

from memkernels.store.errors import StoreError, StoreFormatError
from memkernels.store.inmemory import ADDED, KEPT, NEW, REPLACED
from memkernels.store.keys import KeyBatch
from memkernels.store.store import KeyValueStore
from memkernels.store.text import text_of, text_rows
from memkernels.store.use import Evicted

__all__ = [
    "ADDED",
    "KEPT",
    "NEW",
    "REPLACED",
    "Evicted",
    "KeyBatch",
    "KeyValueStore",
    "StoreError",
    "StoreFormatError",
    "text_of",
    "text_rows",
]

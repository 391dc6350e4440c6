"""What the store raises beyond ValueError, TypeError and IndexError of its arguments, and OSError of the disk."""

from __future__ import annotations


class StoreError(RuntimeError):
    """The store cannot do this now: someone else writes to it, the disk failed before, it is closed, the place is not fit for it."""


class StoreFormatError(StoreError):
    """What lies on disk is not a store, is damaged, or was written by a newer memkernels."""

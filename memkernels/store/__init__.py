"""The exact key-value store: an index in memory and, with a path, a log on disk."""

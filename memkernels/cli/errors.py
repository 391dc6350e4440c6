"""What a user did wrong, as one line."""

from __future__ import annotations


class UserError(Exception):
    """Its message is all that the command line prints."""

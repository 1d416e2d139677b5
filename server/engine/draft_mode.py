"""What may draft for a request."""

from typing import Literal

DraftMode = Literal["private", "shared", "lookup", "none"]
"""A fine-tune's private module, the shared draft alone, the sequence's own earlier tokens, or nothing."""

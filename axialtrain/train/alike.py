"""Errors that every rank raises with the same words, so that rank 0 alone says them."""

from __future__ import annotations


class AlikeError(Exception):
    """Raised on all ranks."""


class RefusedError(AlikeError, ValueError):
    """What a user asked for cannot be had; rank 0 has found out, and told the others."""


class NotSavedError(AlikeError, OSError):
    """A checkpoint could not be written, on some rank."""


class BadStepError(AlikeError, FloatingPointError):
    """A step that should not count, and is to end the run."""


class DamagedError(AlikeError, ValueError):
    """More of the data is damaged than the run may leave out."""

"""The error of everything that is wrong with a data folder."""

from __future__ import annotations


class DataError(ValueError):
    """A data folder that cannot be used as it stands; the message says what to do."""

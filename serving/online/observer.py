"""Callbacks for metrics; the default does nothing."""

from __future__ import annotations

from typing import Literal, get_args

Fallback = Literal["cold_user", "unknown_items", "store_unavailable"]
FALLBACKS: tuple[Fallback, ...] = get_args(Fallback)


class Observer:
    """Does nothing by itself."""

    def batch_ran(self, searches: int, beam_rows: int, seconds: dict[str, float]) -> None:
        """seconds: of the stages encode, reason and decode."""

    def searched(self, steps: int, seconds: dict[str, float]) -> None:
        """A search was answered. seconds: of the stages queue and, if it was asked, cache."""

    def answered(self, version: str, source: str, steps: int, seconds: float) -> None:
        """A query was answered by this version of the model, or by popularity; seconds: in all."""

    def shadowed(self, version: str, overlap: float) -> None:
        """The shadow found this share of the answer's items."""

    def shadow_failed(self, version: str, reason: str) -> None:
        """The shadow was not asked, or found nothing."""

    def fell_back(self, reason: Fallback) -> None:
        """The answer, or the history behind it, did not come from where it should."""

    def dropped_invalid_items(self, count: int) -> None:
        """The search returned items that do not exist or are not permitted. Stays at zero."""

"""Where the time of an epoch goes: to the loader, or to the steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["StepClock"]

T = TypeVar("T")


class StepClock:
    """Adds up the time that a loop waits for its loader and the time that it works.

    On an accelerator the work runs on while the loop asks for the next batch: a share of the
    loader near 0 says that the device never waits for images.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.loading = 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, the waits for them noted."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.loading += time.perf_counter() - asked
            yield batch

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.started

    @property
    def loader_share(self) -> float:
        """Share of the time that went into waiting, 0..1."""
        return self.loading / max(self.seconds, 1e-9)

"""The conditions of a latency benchmark, shared by its conftest and its test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

#: Rows without a figure: what was to be measured, and the reason.
EMPTY_ROWS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()


@dataclass(frozen=True)
class LatencyOptions:
    """What `pytest bench` was asked for; see `pytest bench --help`."""

    model: str
    counts: tuple[int, ...]
    batches: tuple[int, ...]
    img_size: int
    rounds: int
    warmup: int
    device: str
    precision: str
    channels_last: bool
    compiled: bool

    KEY: ClassVar[pytest.StashKey[LatencyOptions]] = pytest.StashKey()

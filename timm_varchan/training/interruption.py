"""Stopping well: signals that ask for it, and losses that are no numbers."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

__all__ = ["Interrupted", "NonFiniteLossError", "StepWatch"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 - not an error
    """Training was asked to stop and has saved a checkpoint."""


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN."""


class StepWatch:
    """Hears SIGTERM and SIGINT while it is entered, and looks at every loss.

    What one process hears or sees, all of them act on at the same step. Losses are looked at one
    step late, when the device has them anyway, so that it never waits.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.stop = False
        self._accelerator = accelerator
        self._heard = False
        self._pending: tuple[Tensor, str] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StepWatch:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._heard:  # the second time: at once
            raise KeyboardInterrupt
        self._heard = True

    def after_step(self, loss: Tensor, where: str) -> None:
        """Note a step's loss; look at that of the step before.

        Args:
            loss: The loss on this process.
            where: The step and its channels, for the error.

        Raises:
            NonFiniteLossError: The step before had a loss that is no number.
        """
        heard = torch.full_like(loss.detach(), float(self._heard), dtype=torch.float32)
        flags = torch.stack([(~loss.detach().isfinite()).float(), heard])
        if self._accelerator.num_processes > 1:
            flags = self._accelerator.reduce(flags)
        previous, self._pending = self._pending, (flags, where)
        self._look(previous)
        if self._accelerator.num_processes == 1:
            self.stop |= self._heard

    def flush(self) -> None:
        """Look at the last step too: before anything is saved."""
        pending, self._pending = self._pending, None
        self._look(pending)

    def _look(self, pending: tuple[Tensor, str] | None) -> None:
        if pending is None:
            return
        is_bad, heard = pending[0].tolist()
        self.stop |= heard > 0
        if is_bad:
            raise NonFiniteLossError(
                f"The loss is not a finite number at {pending[1]}. Lower --lr, set --clip-grad 1, "
                f"or look for values in the data that are not finite"
            )

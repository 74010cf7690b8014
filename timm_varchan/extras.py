"""What `pip install timm-varchan` leaves out, and what to say where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MissingExtraError", "needs"]


class MissingExtraError(ModuleNotFoundError):
    """A package is not there that an extra of this one installs."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports that an extra of this package installs.

    Raises:
        MissingExtraError: One of them is missing; names the command that installs them all.
    """
    try:
        yield
    except MissingExtraError:
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("timm_varchan"):
            raise
        raise MissingExtraError(
            f'{error.name} is not installed. It comes with: pip install "timm-varchan[{extra}]"',
            name=error.name,
        ) from None

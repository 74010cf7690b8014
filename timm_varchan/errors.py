"""The exceptions that mean: you can cure this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ImageError", "MissingExtraError", "ToolError", "UserError", "needs"]


class UserError(ValueError):
    """What a user can cure: data, flags, files. One line that says what came and the cure.

    Commands print it and stop; anything else that is raised is a fault of ours and keeps its
    traceback.
    """


class ImageError(UserError):
    """One image that cannot be read, or not as the data set needs it; the text is the reason."""


class ToolError(UserError, RuntimeError):
    """Another program or service does not do its part: the hub, an exporter, a missing package."""


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

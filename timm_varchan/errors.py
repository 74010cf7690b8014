"""The exceptions that mean: you can cure this."""

from __future__ import annotations

__all__ = ["ImageError", "ToolError", "UserError"]


class UserError(ValueError):
    """What a user can cure: data, flags, files. One line that says what came and the cure.

    Commands print it and stop; anything else that is raised is a fault of ours and keeps its
    traceback.
    """


class ImageError(UserError):
    """One image that cannot be read, or not as the data set needs it; the text is the reason."""


class ToolError(UserError, RuntimeError):
    """Another program or service does not do its part: the hub, an exporter, a missing package."""

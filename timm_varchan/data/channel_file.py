"""Channel sets with their means and deviations, kept in a file."""

from __future__ import annotations

import json
from pathlib import Path

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError

__all__ = ["read_channels", "write_channels"]


def write_channels(channels: ChannelSet, path: str | Path) -> Path:
    """Write a channel set with its means and deviations as JSON."""
    Path(path).write_text(json.dumps(channels.to_config(), indent=2) + "\n", encoding="utf-8")
    return Path(path)


def read_channels(spec: ChannelSetLike) -> ChannelSet:
    """A channel set as `ChannelSet.parse` takes it, or the path of a JSON file.

    Args:
        spec: Text that ends in `.json` is a file of `write_channels`.

    Returns:
        The channel set.

    Raises:
        UserError: No such file, another content, or what `ChannelSet.parse` refuses.
    """
    if not (isinstance(spec, str) and spec.endswith(".json")):
        return ChannelSet.parse(spec)
    try:
        config = json.loads(Path(spec).read_text(encoding="utf-8"))
        if not isinstance(config, list) or not config:
            raise UserError(f"it needs a list of channels, not {str(config)[:40]!r}")
        return ChannelSet.from_config(config)
    except (OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{spec} holds no channels ({error}). Make it with: python -m "
            f"timm_varchan.data.measure DATA --output {spec}"
        ) from error

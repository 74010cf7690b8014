"""Small trained weights that come with the package, so that `pretrained=True` needs no network."""

import json
from pathlib import Path
from typing import Any

__all__ = ["shipped_cfg", "shipped_note"]

FOLDER = Path(__file__).parents[1] / "weights"


def shipped_note(name: str) -> dict[str, Any] | None:
    """What lies beside the weights of an architecture.

    Args:
        name: Of the architecture.

    Returns:
        `tag`, `pretrained_cfg` (timm's fields), `data`, `licence`, `results` by channel set, in
        words and figures; None if no weights come with the package.
    """
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def shipped_cfg(name: str) -> tuple[str, dict[str, Any]]:
    """The tag and the fields of timm's configuration of an architecture.

    Args:
        name: Of the architecture.

    Returns:
        `"untrained"` and nothing if no weights come with the package.
    """
    note = shipped_note(name)
    if note is None:
        return "untrained", {}
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in note["pretrained_cfg"].items()}
    return note["tag"], {**fields, "file": str(FOLDER / f"{name}.safetensors")}

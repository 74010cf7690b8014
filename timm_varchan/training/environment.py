"""What a run ran with: versions, commit, machine; and strict JSON."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from timm_varchan.version import __version__

__all__ = ["environment", "processor", "write_json"]

_PACKAGES = ("timm", "torch", "accelerate", "datasets", "evaluate", "numpy")


def environment() -> dict[str, Any]:
    """Versions of the packages that decide about results, and the commit of the code."""
    return {
        "versions": {
            "python": platform.python_version(),
            "timm_varchan": __version__,
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "git_commit": _git_commit(),
    }


def processor() -> str:
    """The processor's name; Linux keeps it in a file."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the code that ran, if it runs from a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def write_json(values: Mapping[str, Any], path: Path) -> None:
    """Write strict JSON: what is no number becomes null. Infinity and NaN are not JSON."""
    text = json.dumps(_without_nan(values), indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

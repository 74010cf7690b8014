"""The form of result files: what is in them, and reading them with a check.

Every file is `{"schema": {"kind", "version"}, "package", "machine", "settings", ...}`; what follows
depends on the kind. `FIELDS` is the whole definition; README.md explains the fields.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import timm
import torch

import timm_varchan

#: Raised when a field changes its meaning or goes; readers refuse every other version.
VERSION = 1

NUMBER = (int, float)
OPTIONAL_INT = (int, type(None))
ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
PAIRED = {
    "difference": NUMBER, "low": NUMBER, "high": NUMBER, "p": NUMBER,
    "only_a": int, "only_b": int, "num_images": int,
}  # fmt: skip
SPREAD = dict.fromkeys(("median", "q25", "q75", "low", "high"), NUMBER)
SERIES = {"mode": str, "order": str}
HEAD = {
    "schema": {"kind": str, "version": int},
    "package": str,
    "machine": {"system": str, "cpu_count": OPTIONAL_INT, "threads": int, "torch": str,
                "timm": str, "accelerator": (str, type(None))},
    "settings": dict,
}  # fmt: skip
#: What a file of each kind holds: a type, several types, a dictionary of fields, or a list of them.
FIELDS: dict[str, dict[str, Any]] = {
    "complexity": HEAD
    | {
        "rows": [
            {
                "model": str, "channels": str, "num_channels": int, "img_size": int,
                "batch_size": int, "params": int, "stem_params": OPTIONAL_INT, "macs": int,
                "flops": int, "stem_macs": OPTIONAL_INT, "macs_per_added_channel": OPTIONAL_INT,
                "forward_backward_mb": NUMBER, "params_mb": NUMBER,
            }
        ]
    },
    "accuracy": HEAD
    | {
        "models": [
            {
                "name": str, "source": str, "channels": str,
                "sets": [SERIES | {"channels": str, "indices": list, "size": int,
                                   "num_images": int, "accuracy": ESTIMATE,
                                   "precision_macro": ESTIMATE, "recall_macro": ESTIMATE,
                                   "f1_macro": ESTIMATE}],
                "sizes": [SERIES | {"size": int, "num_sets": int, "mean": NUMBER, "std": NUMBER,
                                    "worst": NUMBER, "worst_set": str}],
                "series": [SERIES | {"full": NUMBER, "uniform_mean": NUMBER, "worst": NUMBER,
                                     "worst_set": str}],
                "leave_one_out": [SERIES | {"left_out": str, "paired": PAIRED}],
                "flips": [{"channels": str, "mode": str, "change": str, "rate": ESTIMATE}],
                "latency": [{"num_channels": int, "batch_size": int, "rounds": int, "ms": SPREAD}],
                "experts": [SERIES | {"channels": str, "expert": str, "paired": PAIRED}],
            }
        ],
        "pairs": [{"a": str, "b": str, "channels": str, "mode_a": str, "mode_b": str,
                   "order": str, "paired": PAIRED}],
    },
}  # fmt: skip


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def problems(value: Any, form: Any, where: str = "result") -> list[str]:
    """Where a value differs from a form of `FIELDS`, one text each."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        found = [f"{where}.{name} is missing" for name in form if name not in value]
        found += [f"{where}.{name} is not known" for name in value if name not in form]
        shared = [name for name in form if name in value]
        return found + [p for n in shared for p in problems(value[n], form[n], f"{where}.{n}")]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [p for i, v in enumerate(value) for p in problems(v, form[0], f"{where}[{i}]")]
    is_bool_for_number = isinstance(value, bool) and form is not bool
    if is_bool_for_number or not isinstance(value, form):
        return [f"{where} is {type(value).__name__}"]
    return []


def write(path: Path, kind: str, settings: dict[str, Any], **content: Any) -> dict[str, Any]:
    """Write a result file.

    Raises:
        AssertionError: The content does not have the form of its kind.
    """
    result = {
        "schema": {"kind": kind, "version": VERSION},
        "package": timm_varchan.__version__,
        "machine": machine(),
        "settings": settings,
        **content,
    }
    found = problems(result, FIELDS[kind])
    assert not found, found[:5]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def read(path: Path, kind: str) -> dict[str, Any]:
    """Read a result file.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is no result of this kind and version.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}. bench/README.md has the command that makes it."
        )
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}). Make it again.") from error
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != {"kind": kind, "version": VERSION}:
        raise ValueError(
            f"{path} has the schema {schema}; needed is {kind!r}, version {VERSION}. Make it again "
            f"with this version's command in bench/README.md."
        )
    found = problems(result, FIELDS[kind])
    if found:
        raise ValueError(f"{path} does not have the form of {kind!r}: {'; '.join(found[:5])}.")
    return result

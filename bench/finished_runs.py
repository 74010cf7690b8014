"""Finished runs on disk: predictions, history and settings of each arm and seed in one `.npz`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        arm: Its name.
        seed: Its seed.
        meta: The settings that all runs of a folder share, as JSON.
        details: What is its own: learning rate, time.
        history: One entry an epoch.
        labels: True class of every test image.
        predictions: Predicted classes by what was tested.
    """

    arm: str
    seed: int
    meta: str
    details: dict[str, Any]
    history: list[dict[str, float]]
    labels: np.ndarray
    predictions: dict[str, np.ndarray]

    def correct(self, key: str) -> np.ndarray:
        """Whether each image was classified correctly."""
        return self.predictions[key] == self.labels


def run_path(folder: Path, arm: str, seed: int) -> Path:
    """Where a run is written."""
    return folder / f"{arm}-seed{seed}.npz"


def write_run(
    path: Path,
    *,
    meta: Mapping[str, Any],
    history: list[dict[str, float]],
    labels: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    details: Mapping[str, Any] | None = None,
) -> None:
    """Print its accuracies; write it under another name first, so that it is never half there."""
    for key, predicted in predictions.items():
        print(f"  {key}: {100 * (predicted == labels).mean():.1f}", flush=True)
    part = path.with_suffix(".part")
    texts = {"meta": meta, "history": history, "details": details or {}}
    content = {name: np.array(json.dumps(text)) for name, text in texts.items()}
    classes = {key: value.astype(np.uint8) for key, value in predictions.items()}
    with part.open("wb") as file:
        np.savez_compressed(file, **content, labels=labels.astype(np.uint8), **classes)
    os.replace(part, path)


def read_runs(folder: Path, arms: Iterable[str]) -> dict[str, dict[int, Run]]:
    """All finished runs by arm, in this order, and seed.

    Raises:
        SystemExit: None, or runs of different settings.
    """
    runs: dict[str, dict[int, Run]] = {}
    for path in sorted(folder.glob("*-seed*.npz")):
        arm, _, seed = path.stem.rpartition("-seed")
        with np.load(path) as file:
            content = {key: file[key] for key in file.files}
        meta, history = (str(content.pop(key)) for key in ("meta", "history"))
        details = json.loads(str(content.pop("details", "{}")))
        labels = content.pop("labels")
        one = Run(arm, int(seed), meta, details, json.loads(history), labels, content)
        runs.setdefault(arm, {})[one.seed] = one
    settings = {one.meta for arm in runs.values() for one in arm.values()}
    if len(settings) != 1:
        raise SystemExit(f"{folder} holds runs of {len(settings)} settings; one is needed.")
    return {arm: runs[arm] for arm in arms if arm in runs}

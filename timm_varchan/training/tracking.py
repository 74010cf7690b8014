"""Where the course of a run is written: CSV, picture, trackers."""

from __future__ import annotations

import csv
import importlib.util
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from timm_varchan.errors import UserError
from timm_varchan.plots import plot_curves
from timm_varchan.training.configuration import TrainConfig

__all__ = ["RunLog", "check_trackers"]

logger = logging.getLogger(__name__)

#: The picture is drawn at most so often, in seconds.
_DRAW_EVERY = 30.0


def check_trackers(config: TrainConfig) -> None:
    """Refuse trackers whose package is not there.

    Raises:
        UserError: Names the package to install.
    """
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--trackers {name} needs a package: pip install {name}.")


class RunLog:
    """Writes every epoch to `summary.csv`, `curves.png`, the trackers and the log.

    Args:
        accelerator: Holds the trackers; only the main process writes.
        folder: Of the run.
        config: Goes to the trackers.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, config: TrainConfig) -> None:
        self._accelerator, self._folder, self._drawn = accelerator, folder, -_DRAW_EVERY
        self._config = config

    def start(self) -> None:
        """Begin the trackers; the folder is the run's own by now."""
        if self._config.trackers:
            values = {k: v if _is_plain(v) else str(v) for k, v in self._config.to_json().items()}
            self._accelerator.init_trackers(
                "timm_varchan", config=values, init_kwargs={"wandb": {"dir": str(self._folder)}}
            )

    def epoch(self, history: Sequence[Mapping[str, Any]], num_epochs: int) -> None:
        """Write the epochs so far; the last of them is new."""
        newest = flat(history[-1])
        self._accelerator.log(
            {f"{_group(k)}/{k}": v for k, v in newest.items() if k != "epoch"},
            step=history[-1]["epoch"] + 1,
        )
        if not self._accelerator.is_main_process:
            return
        self._write_csv(history)
        if len(history) == num_epochs or time.monotonic() - self._drawn > _DRAW_EVERY:
            plot_curves(history, self._folder / "curves.png")
            self._drawn = time.monotonic()
        logger.info(
            "epoch %d/%d: loss %.4f, validation %.1f %%, %.0f images/s, loader %.0f %% of the time",
            len(history), num_epochs, newest["train_loss"], 100 * newest["eval_accuracy"],
            newest["images_per_second"], 100 * newest["loader_share"],
        )  # fmt: skip

    def _write_csv(self, history: Sequence[Mapping[str, Any]]) -> None:
        """One line an epoch, counted from 1 as the log counts them."""
        rows = [{**flat(entry), "epoch": entry["epoch"] + 1} for entry in history]
        with (self._folder / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the history with a column for every channel set."""
    columns = {key: value for key, value in entry.items() if key != "eval_sets"}
    sets = entry.get("eval_sets", {})
    return columns | {f"eval_accuracy_{name}": value for name, value in sets.items()}


def _group(name: str) -> str:
    head = name.split("_")[0]
    return head if head in ("train", "eval") else "run"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool))

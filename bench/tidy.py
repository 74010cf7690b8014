"""What the predictions of a benchmark's runs say: tidy rows with intervals, paired comparisons."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from arms import Arm, Benchmark

from timm_varchan.evaluation import classification_metrics, paired_difference, wilson_interval

__all__ = ["COLUMNS", "Runs", "set_key", "tidy", "write_csv"]

COLUMNS = (
    "benchmark", "arm", "way", "question", "channels", "seed", "folds", "images",
    "accuracy", "low", "high", "sd_seeds", "precision", "recall", "f1", "reference",
    "reference_accuracy", "difference", "difference_low", "difference_high", "sd_difference", "p",
    "epochs", "train_images", "train_seconds", "version", "commit",
)  # fmt: skip


def set_key(way: str, indices: Sequence[int]) -> str:
    """What the predictions on a channel set, by positions in the data, are saved under."""
    return f"{way}|{'.'.join(map(str, indices))}"


@dataclass(frozen=True)
class Cell:
    """Runs of an arm on the sets of a question.

    Args:
        right: `(seeds, images)`, the share of the sets on which an image was right.
        classes: `(seeds, sets, images)`.
        labels: `(images,)`.
    """

    right: np.ndarray
    classes: np.ndarray
    labels: np.ndarray


class Runs:
    """All predictions of a benchmark that lie in a folder.

    Args:
        benchmark: Whose.
        folder: With `fold-SEED-FOLD-ARM.npz`.
    """

    def __init__(self, benchmark: Benchmark, folder: Path) -> None:
        self.benchmark = benchmark
        self.found: dict[tuple[str, int, int], dict[str, np.ndarray]] = {}
        for file in sorted(folder.glob("fold-*-*-*.npz")):
            _, seed, fold, arm = file.stem.split("-", 3)
            self.found[arm, int(seed), int(fold)] = dict(np.load(file))

    def seeds(self, arm: str) -> list[int]:
        """The seeds that an arm was trained with."""
        return sorted({seed for name, seed, _ in self.found if name == arm})

    def folds(self, arm: str, seeds: Sequence[int]) -> tuple[int, ...]:
        """The folds that each of these seeds has."""
        of = [{f for name, s, f in self.found if (name, s) == (arm, seed)} for seed in seeds]
        return tuple(sorted(set.intersection(*of))) if of else ()

    def cell(
        self, name: str, question: str, seeds: Sequence[int], folds: Sequence[int]
    ) -> Cell | None:
        """An arm on a question; None unless every set of every run is there.

        Args:
            name: `ARM` or `ARM|WAY`; `{set}` in it is the channel set.
            question: Of the benchmark.
            seeds: Which runs.
            folds: Of each seed, one after the other.
        """
        channels, by_seed = self.benchmark.channel_set(), []
        labels: list[np.ndarray] = []
        for seed in seeds:
            by_set = []
            for indices in self.benchmark.questions[question]:
                arm, _, way = name.replace("{set}", str(channels.take(indices))).partition("|")
                runs = [self.found.get((arm, seed, fold), {}) for fold in folds]
                key = set_key(way or "trained", indices)
                if not runs or not all(key in run for run in runs):
                    return None
                by_set.append(np.concatenate([run[key] for run in runs]))
                labels.append(np.concatenate([run["labels"] for run in runs]))
            by_seed.append(np.stack(by_set))
        if any(not np.array_equal(labels[0], other) for other in labels):
            return None  # other images for each seed: there is no mean of an image
        classes = np.stack(by_seed)
        return Cell((classes == labels[0]).mean(1), classes, labels[0])


def tidy(benchmark: Benchmark, name: str, folder: Path) -> pd.DataFrame:
    """One row for each arm, way, question, reference and seed, and one for all whole seeds."""
    runs, rows = Runs(benchmark, folder), []
    for arm_name, arm in benchmark.arms.items():
        training = training_of(folder, arm_name)
        rows += [{"benchmark": name, **row, **training} for row in rows_of(runs, arm_name, arm)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def rows_of(runs: Runs, name: str, arm: Arm) -> Iterator[dict[str, Any]]:
    """The rows of an arm; a comparison is over the seeds that both have."""
    seeds = runs.seeds(name)
    whole = [seed for seed in seeds if runs.folds(name, [seed]) == runs.folds(name, seeds[:1])]
    groups = [[seed] for seed in seeds] + ([whole] if len(whole) > 1 else [])
    for way, question, group in itertools.product(arm.ways, runs.benchmark.questions, groups):
        folds = runs.folds(name, group)
        if runs.cell(f"{name}|{way}", question, group, folds) is None:
            continue
        sizes = {len(indices) for indices in runs.benchmark.questions[question]}
        about = {
            "arm": name, "way": way, "question": question,
            "channels": sizes.pop() if len(sizes) == 1 else "", "folds": len(folds),
        }  # fmt: skip
        for reference in arm.against or ("",):
            both = [s for s in group if reference and runs.cell(reference, question, [s], folds)]
            compares = bool(both) and (both == group or len(both) > 1)
            cell = runs.cell(f"{name}|{way}", question, both if compares else group, folds)
            assert cell is not None
            row = {**about, "seed": "+".join(map(str, both if compares else group)),
                   **figures(cell), "reference": reference}  # fmt: skip
            other = runs.cell(reference, question, both, folds) if compares else None
            yield {**row, **(compared(cell, other) if other else {})}


def figures(cell: Cell) -> dict[str, Any]:
    """Accuracy with its interval; macro metrics where there is one set and one seed.

    The mean over sets or seeds has the interval of as many images, which is the widest that it
    can be: Wilson's for one set.
    """
    right, count = cell.right.mean(0), len(cell.labels)
    low, high = wilson_interval(round(float(right.sum())), count)
    row = {"images": count, "accuracy": right.mean(), "low": low, "high": high,
           "sd_seeds": deviation(cell.right.mean(1))}  # fmt: skip
    if cell.classes.shape[:2] == (1, 1):
        metrics = classification_metrics(
            cell.classes[0, 0], cell.labels, int(cell.labels.max()) + 1
        )
        row |= {key.removesuffix("_macro"): metrics[key].value for key in metrics}
    return row


def compared(cell: Cell, other: Cell) -> dict[str, Any]:
    """The paired difference over images, and the deviation of the difference between seeds."""
    gap = paired_difference(cell.right.mean(0), other.right.mean(0))
    return {
        "reference_accuracy": other.right.mean(), "difference": gap.difference,
        "difference_low": gap.low, "difference_high": gap.high, "p": gap.p,
        "sd_difference": deviation(cell.right.mean(1) - other.right.mean(1)),
    }  # fmt: skip


def deviation(values: np.ndarray) -> Any:
    """The standard deviation between seeds, empty for one."""
    return np.std(values, ddof=1) if len(values) > 1 else ""


def training_of(folder: Path, arm: str) -> dict[str, Any]:
    """What the first run of an arm took, from the reports that training left, and all commits."""
    files = sorted(folder.glob(f"fold-*-*-{arm}/results.json"))
    files = [file for file in files if file.parent.name.split("-", 3)[3] == arm]
    if not files:
        return {}
    each = [json.loads(file.read_text()) for file in files]
    results, commits = each[0], {(found.get("git_commit") or "")[:7] for found in each}
    return {
        "epochs": results["training"]["epochs"],
        "train_images": results["data"]["num_images"]["train"],
        "train_seconds": round(results["training"]["seconds"]),
        "version": results["versions"]["timm_varchan"],
        "commit": "+".join(sorted(commits)),
    }


def write_csv(table: pd.DataFrame, file: Path) -> None:
    """Five digits of each number; counts are whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = table.copy()
    for column in shown.columns:
        shown[column] = [_text(value) for value in shown[column]]
    shown.to_csv(file, index=False, lineterminator="\n")


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) and abs(value) > 1 else f"{value:.5g}"
    return str(value)

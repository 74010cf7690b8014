"""What `bench/task1.py report` writes: accuracies, paired differences, the table."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from arms_cli import machine, write_report
from finished_runs import Run, read_runs
from small_images import BATCH, SMOOTHING, WEIGHT_DECAY, interval
from tables import table
from task1_arms import ARCHITECTURE, ARMS, LR, SINGLES, TEST_SETS, WARMUP_EPOCHS, WIDTHS

from timm_varchan.evaluation import METRICS, classification_metrics

#: The arm that others are compared with, told the channels, and over which sets.
REFERENCE, TOLD = "dwg-hcs-sample", "named|in order|running"
GROUPS = {"RGB": ("RGB",), "pairs": TEST_SETS[1:4], "singles": SINGLES, "all sets": TEST_SETS}


def gap(own: dict[int, Run], runs: dict[str, dict[int, Run]], sets: tuple[str, ...],
        condition: str) -> dict[str, object] | None:  # fmt: skip
    """Mean loss to the experts over some sets, in points, on the same images and seeds."""
    experts = [runs.get(f"expert-{name}", {}) for name in sets]
    seeds = sorted(set(own).intersection(*experts))
    if not seeds:
        return None
    differences = [
        expert[seed].correct(f"{name}|mask|in order|running").astype(float)
        - own[seed].correct(f"{name}|{condition}")
        for name, expert in zip(sets, experts, strict=True) for seed in seeds
    ]  # fmt: skip
    by_seed = np.array(differences).reshape(len(sets), len(seeds), -1).mean((0, 2))
    return interval(np.mean(differences, axis=0)) | {
        "seeds": seeds, "by_seed": (100 * by_seed).tolist()
    }  # fmt: skip


def versus(own: dict[int, Run], other: dict[int, Run]) -> dict[str, dict[str, float]] | None:
    """Mean difference between two arms that are told the channels, on the same images and seeds.

    Returns:
        By group of sets own minus other in points; None where they have no seed in common or one
        cannot be told.
    """
    seeds = sorted(set(own) & set(other))
    keys = [f"{name}|{TOLD}" for name in TEST_SETS]
    if not seeds or any(k not in arm[s].predictions for arm in (own, other) for s in seeds
                        for k in keys):  # fmt: skip
        return None
    return {
        group: interval(np.mean(
            [own[s].correct(f"{n}|{TOLD}").astype(float) - other[s].correct(f"{n}|{TOLD}")
             for n in names for s in seeds], axis=0))
        for group, names in GROUPS.items()
    }  # fmt: skip


def summarise(
    arm: dict[int, Run], runs: dict[str, dict[int, Run]], num_classes: int
) -> list[dict[str, Any]]:
    """A row for each mode, order and kind of statistics of one arm."""
    conditions = {key.partition("|")[2] for key in next(iter(arm.values())).predictions}
    rows = []
    for condition in sorted(conditions, key=lambda c: [c.split("|")[i] for i in (0, 2, 1)][::-1]):
        mode, order, statistics = condition.split("|")
        sets: dict[str, object] = {}
        for name in TEST_SETS:
            key = f"{name}|{condition}"
            present = [one for one in arm.values() if key in one.predictions]
            if not present:
                continue
            metrics = [
                classification_metrics(one.predictions[key], one.labels, num_classes, seed=0)
                for one in present
            ]
            sets[name] = {
                "accuracy": interval(np.mean([one.correct(key) for one in present], axis=0)),
                "accuracy_by_seed": [100 * m["accuracy"].value for m in metrics],
                **{
                    m: 100 * float(np.mean([one[m].value for one in metrics]))
                    for m in METRICS
                    if m != "accuracy"
                },
            }
        row: dict[str, Any] = {"mode": mode, "order": order, "statistics": statistics, "sets": sets}
        if len(sets) == len(TEST_SETS):
            row["loss_rgb"] = gap(arm, runs, ("RGB",), condition)
            row["loss_singles"] = gap(arm, runs, SINGLES, condition)
        rows.append(row)
    return rows


def report(args: argparse.Namespace) -> None:
    """Write accuracies and paired gaps of all finished runs as JSON and print the table."""
    runs = read_runs(args.output, ARMS)
    settings = json.loads(next(iter(next(iter(runs.values())).values())).meta)
    arms = {
        name: {
            "seeds": sorted(arm),
            "results": summarise(arm, runs, settings["num_classes"]),
            "history": {str(seed): one.history for seed, one in arm.items()},
            "reference_minus_it": versus(runs.get(REFERENCE, {}), arm),
        }
        for name, arm in runs.items()
    }
    summary = {
        "settings": settings
        | {"architecture": ARCHITECTURE, **WIDTHS, "batch_size": BATCH, "lr": LR,
           "warmup_epochs": WARMUP_EPOCHS, "weight_decay": WEIGHT_DECAY, "smoothing": SMOOTHING},
        "machine": machine(args),
        "arms": arms,
    }  # fmt: skip
    write_report(args.json, summary, markdown(arms))


def markdown(arms: dict[str, dict[str, Any]]) -> str:
    """The table of all arms, in per cent, losses in points with 95 % intervals."""
    header = ("trained as", "seeds", "tested", "statistics", *TEST_SETS, "loss on RGB",
              "mean loss on R, G, B")  # fmt: skip
    rows = []
    for name, arm in arms.items():
        for row in arm["results"]:
            sets = row["sets"]
            cells = [f"{sets[s]['accuracy']['mean']:.1f}" if s in sets else "" for s in TEST_SETS]
            cells += [
                f"{g['mean']:.1f} ({g['low']:.1f} to {g['high']:.1f})" if g else ""
                for g in (row.get("loss_rgb"), row.get("loss_singles"))
            ]
            tested = f"{row['mode']}, {row['order']}"
            rows.append((name, len(arm["seeds"]), tested, row["statistics"], *cells))
    return table(header, rows)

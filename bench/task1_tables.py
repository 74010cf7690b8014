"""Tables and the picture of Task I, from the result of `task1.py report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pictures import draw_curves
from tables import REPORT, beside, table
from task1_arms import ARMS, TEST_SETS, build
from task1_report import GROUPS, REFERENCE

from timm_varchan.complexity import count_complexity

#: Conditions of the short table: told in order, and not told in unknown order.
CONDITIONS = (("named", "in order"), ("anonymous", "shuffled"), ("mask", "in order"))
#: Arms beside the report's, where they were run.
BESIDE = ("expert-RGB", "dwg-none", "dwg-shuffle", "dwg-hcs-sample", "zero_fill-hcs-sample")


def _rows(result: Mapping[str, Any], statistics: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Every arm in the conditions of `CONDITIONS`."""
    return [
        (name, ", ".join(map(str, arm["seeds"])), f"{row['mode']}, {row['order']}", row)
        for name, arm in result["arms"].items() for row in arm["results"]
        if (row["mode"], row["order"]) in CONDITIONS and row["statistics"] in statistics
    ]  # fmt: skip


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row["sets"]:
        return ""
    accuracy = row["sets"][name]["accuracy"]
    return f"{accuracy['mean']:.1f} ± {accuracy['high'] - accuracy['mean']:.1f}"


def _gap(gap: Mapping[str, Any] | None) -> str:
    if not gap:
        return ""
    text = f"{gap['mean']:+.1f} ({gap['low']:+.1f} to {gap['high']:+.1f})"
    if len(gap.get("seeds", ())) > 1:
        text += "; seeds " + ", ".join(f"{value:+.1f}" for value in gap["by_seed"])
    return text


def task1_table(result: Mapping[str, Any]) -> str:
    """Accuracy of every arm on every set, BatchNorm's running statistics, 95 % intervals."""
    return table(
        ("trained as", "seeds", "tested", *TEST_SETS, "expert minus it: RGB", "R, G, B (mean)"),
        [
            (name, seeds, tested, *(_cell(row, s) for s in TEST_SETS), _gap(row.get("loss_rgb")),
             _gap(row.get("loss_singles")))
            for name, seeds, tested, row in _rows(result, ("running",))
        ],
    )  # fmt: skip


def versus_table(result: Mapping[str, Any]) -> str:
    """How far `REFERENCE` is ahead of every other arm that is told the channels."""
    rows = [
        (name, *(_gap(differences[group]) for group in GROUPS))
        for name, arm in result["arms"].items()
        if name != REFERENCE and (differences := arm.get("reference_minus_it"))
    ]
    return table((f"{REFERENCE} minus", *GROUPS), rows)


def batchnorm_table(result: Mapping[str, Any]) -> str:
    """The DWG arms with running statistics and with statistics estimated anew for each set."""
    return table(
        ("trained as", "seeds", "tested", "statistics", *TEST_SETS, "expert minus it: RGB",
         "R, G, B (mean)"),
        [
            (name, seeds, tested, row["statistics"], *(_cell(row, s) for s in TEST_SETS),
             _gap(row.get("loss_rgb")), _gap(row.get("loss_singles")))
            for name, seeds, tested, row in _rows(result, ("running", "estimated"))
            if name.startswith("dwg-")
        ],
    )  # fmt: skip


def beside_report_table(result: Mapping[str, Any]) -> str:
    """The report's columns for our arms on RGB, and the report's own figures beside them."""
    settings = result["settings"]
    columns: dict[str, list[str]] = {}
    for name in BESIDE:
        arm = result["arms"].get(name)
        if arm is None:
            continue
        model = build(ARMS[name], settings["num_classes"])
        cost = count_complexity(model, "RGB", img_size=settings["img_size"])
        wanted = [row for _, _, _, row in _rows({"arms": {name: arm}}, ("running",))]
        figures = wanted[0]["sets"]["RGB"]
        columns[f"{name} ({wanted[0]['mode']}, {wanted[0]['order']})"] = [
            f"{cost.params / 1e6:.2f}", f"{cost.macs / 1e9:.3f}",
            f"{cost.forward_backward_mb:.2f}", f"{cost.flops / 1e9:.3f}",
            _cell(wanted[0], "RGB"),
            *(f"{figures[m]:.1f}" for m in ("precision_macro", "recall_macro", "f1_macro")),
        ]  # fmt: skip
    return beside(columns, REPORT)


def draw_task1(result: Mapping[str, Any], path: Path) -> Path | None:
    """Loss and accuracy with and without channel shuffling, as the report's figure 1."""
    histories = {}
    for name in ("dwg-none", "dwg-shuffle", "dwg-hcs-sample"):
        arm = result["arms"].get(name)
        if arm is not None:
            histories[name] = next(iter(arm["history"].values()))
    return draw_curves(histories, path) if histories else None


TASK1_TABLES = {
    "task1": task1_table,
    "batchnorm": batchnorm_table,
    "task1-beside-report": beside_report_table,
}

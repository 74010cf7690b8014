"""Pictures of the results, drawn without pyplot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_varchan.plots import COLOURS

#: With more channel sets than this their names would hide each other.
MAX_LABELS = 8


def _figure(columns: int) -> Figure:
    figure = Figure(figsize=(4.6 * columns, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # above: "best" is slow with many points
            axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    figure.savefig(path, dpi=150)
    return path


def draw_cost(complexity: Mapping[str, Any], latency: Mapping[str, Any] | None, path: Path) -> Path:
    """Cost against the number of channels: multi-adds, and where it was measured the time."""
    figure = _figure(2 if latency else 1)
    first, *rest = figure.subplots(1, 2 if latency else 1, squeeze=False)[0]
    models: dict[str, list[tuple[int, float]]] = {}
    for row in complexity["rows"]:
        models.setdefault(row["model"], []).append((row["num_channels"], row["macs"] / 1e9))
    shown = [name for name in models if "densenet121" in name and len(models[name]) > 1]
    shown = [n for n in shown if ", stem " not in n or n.endswith(("generator", "hyper"))]
    for colour, name in zip(COLOURS, shown, strict=False):
        label = f"{name}, in_chans=C" if name == "densenet121" else name
        first.plot(*zip(*models[name], strict=True), color=colour, marker="o", label=label)
    first.set(xlabel="number of channels", ylabel="G multi-adds")
    for axes in rest:
        assert latency is not None
        rows = [benchmark["extra_info"] for benchmark in latency["benchmarks"]]
        for colour, batch in zip(COLOURS, sorted({r["batch_size"] for r in rows}), strict=False):
            own = [r for r in rows if r["batch_size"] == batch]
            ratios = [r["ratios"]["timm"] for r in own]
            middle = [ratio["median"] for ratio in ratios]
            ends = [[ratio["median"] - ratio["low"] for ratio in ratios],
                    [ratio["high"] - ratio["median"] for ratio in ratios]]  # fmt: skip
            axes.errorbar([r["num_channels"] for r in own], middle, yerr=ends, color=colour,
                          marker="o", capsize=2, label=f"batch {batch}")  # fmt: skip
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xlabel="number of channels", ylabel="time over plain timm's")
    return _finish(figure, path)


def draw_trade(accuracy: Mapping[str, Any], path: Path) -> Path:
    """Accuracy against latency, a point for each channel set of each model."""
    figure = _figure(1)
    axes = figure.subplots()
    for colour, model in zip(COLOURS, accuracy["models"], strict=False):
        times = {row["num_channels"]: row["ms"]["median"] for row in model["latency"]}
        mode = model["sets"][0]["mode"]
        rows = [r for r in model["sets"] if (r["mode"], r["order"]) == (mode, "in order")]
        rows = [r for r in rows if r["size"] in times]
        axes.errorbar(
            [times[r["size"]] for r in rows], [100 * r["accuracy"]["value"] for r in rows],
            yerr=[[100 * (r["accuracy"]["value"] - r["accuracy"]["low"]) for r in rows],
                  [100 * (r["accuracy"]["high"] - r["accuracy"]["value"]) for r in rows]],
            color=colour, marker="o", linestyle="", capsize=2, label=f"{model['name']}, {mode}",
        )  # fmt: skip
        for row in rows if len(rows) <= MAX_LABELS else ():
            place = (times[row["size"]], 100 * row["accuracy"]["value"])
            axes.annotate(row["channels"], place, fontsize="xx-small", xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
    axes.set(xlabel="median latency of a batch (ms)", ylabel="accuracy (%), 95 % intervals")
    return _finish(figure, path)


def draw_sizes(accuracy: Mapping[str, Any], path: Path) -> Path:
    """Mean accuracy over the sets of each size, and the spread between them (not seeds)."""
    figure = _figure(1)
    axes = figure.subplots()
    for number, (colour, model) in enumerate(zip(COLOURS, accuracy["models"], strict=False)):
        mode = model["sets"][0]["mode"]
        rows = [r for r in model["sizes"] if (r["mode"], r["order"]) == (mode, "in order")]
        axes.errorbar(
            [r["size"] + 0.04 * number for r in rows], [100 * r["mean"] for r in rows],
            yerr=[100 * r["std"] for r in rows], color=colour, marker="o", capsize=2,
            label=f"{model['name']}, {mode}",
        )  # fmt: skip
    axes.set(xlabel="number of channels", ylabel="accuracy (%), deviation between sets")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, path)


def draw_curves(histories: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> Path:
    """Loss and accuracy over the epochs, a colour for each run; dashed: training.

    Args:
        histories: By label: entries with `epoch`, `train_loss`, and `train_accuracy` and
            `test_accuracy` in per cent.
        path: Picture to write.
    """
    figure = _figure(2)
    loss, accuracy = figure.subplots(1, 2)
    for colour, (label, history) in zip(COLOURS, histories.items(), strict=False):
        epochs = [entry["epoch"] for entry in history]
        loss.plot(epochs, [e["train_loss"] for e in history], color=colour, label=label)
        for key, style in (("train_accuracy", "--"), ("test_accuracy", "-")):
            axes_label = f"{label}, {'training' if style == '--' else 'test'}"
            values = [entry[key] for entry in history]
            accuracy.plot(epochs, values, style, color=colour, label=axes_label)
    loss.set(xlabel="epoch", ylabel="training loss")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    return _finish(figure, path)

"""Every picture, drawn without pyplot: no global state, no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from timm_varchan.evaluation import SetResult, summarise_sizes

__all__ = ["plot_channel_sets", "plot_curves"]

#: Okabe and Ito's palette: told apart by colour-blind readers too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: With more channel sets than this, the picture shows sizes instead of sets.
MAX_BARS = 40


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_curves(history: Sequence[Mapping[str, float]], path: str | Path) -> Path:
    """Loss and accuracy over the epochs, training and validation.

    Args:
        history: One entry an epoch with `epoch`, `train_loss`, `eval_loss`, `train_accuracy`,
            `eval_accuracy`.
        path: Picture to write.

    Returns:
        The path.

    Raises:
        ValueError: No epochs.
    """
    if not history:
        raise ValueError("There are no epochs to draw.")
    figure = _figure(9, 3.6)
    epochs = [entry["epoch"] + 1 for entry in history]
    for axes, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for colour, (key, label) in zip(
            _COLOURS, (("train", "training"), ("eval", "validation")), strict=False
        ):
            factor = 100 if what == "accuracy" else 1
            values = [factor * entry[f"{key}_{what}"] for entry in history]
            axes.plot(epochs, values, color=colour, label=label, marker="o", markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel("accuracy (%)" if what == "accuracy" else "cross entropy")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_channel_sets(results: Sequence[SetResult], path: str | Path, title: str = "") -> Path:
    """Accuracy on every channel set with its 95 % interval, a colour for each mode and order.

    With more than `MAX_BARS` sets it shows each size instead: mean and spread over the sets.

    Args:
        results: From `evaluate_channel_sets`.
        path: Picture to write.
        title: Above it.

    Returns:
        The path.

    Raises:
        ValueError: No results.
    """
    if not results:
        raise ValueError("There are no channel sets to draw.")
    num_sets = len({result.indices for result in results})
    if num_sets > MAX_BARS:
        figure = _figure(8, 4)
        axes = figure.subplots()
        _draw_sizes(axes, results)
    else:
        num_series = len({(result.mode, result.order) for result in results})
        figure = _figure(7.5, max(2.5, 1 + num_sets * (0.08 + 0.13 * num_series)))
        axes = figure.subplots()
        _draw_sets(axes, results)
    if title:
        axes.set_title(title)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_sets(axes: Axes, results: Sequence[SetResult]) -> None:
    """Horizontal bars, largest sets on top."""
    labels = _by_size(results)
    series = list(dict.fromkeys((result.mode, result.order) for result in results))
    thickness = 0.8 / len(series)
    for number, (mode, order) in enumerate(series):
        chosen = [r for r in results if (r.mode, r.order) == (mode, order)]
        places = [labels.index(r.channels) - 0.4 + thickness * (number + 0.5) for r in chosen]
        estimates = [r.metrics["accuracy"] for r in chosen]
        errors: Any = [
            [100 * (e.value - e.low) for e in estimates],
            [100 * (e.high - e.value) for e in estimates],
        ]
        axes.barh(
            places, [100 * e.value for e in estimates], thickness, xerr=errors,
            color=_COLOURS[number % len(_COLOURS)], label=f"{mode}, {order}",
            error_kw={"elinewidth": 0.8, "capsize": 1.5, "alpha": 0.8},
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%), 95 % intervals")
    axes.grid(axis="x", alpha=0.3)


def _by_size(results: Sequence[SetResult]) -> list[str]:
    """Names of the sets, largest first."""
    sizes = {result.channels: result.size for result in results}
    return sorted(sizes, key=lambda label: -sizes[label])


def _draw_sizes(axes: Axes, results: Sequence[SetResult]) -> None:
    """Mean accuracy over the sets of each size, with the deviation between sets."""
    summaries = summarise_sizes(results)
    series = list(dict.fromkeys((summary.mode, summary.order) for summary in summaries))
    for number, (mode, order) in enumerate(series):
        chosen = [s for s in summaries if (s.mode, s.order) == (mode, order)]
        shift = 0.12 * (number - (len(series) - 1) / 2)
        axes.errorbar(
            [s.size + shift for s in chosen], [100 * s.mean for s in chosen],
            yerr=[100 * s.std for s in chosen], color=_COLOURS[number % len(_COLOURS)],
            marker="o", markersize=4, capsize=2, label=f"{mode}, {order}",
        )  # fmt: skip
    axes.set_xlabel("number of channels")
    axes.set_ylabel("accuracy (%), mean and deviation over sets")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)

"""Every picture, drawn without pyplot: no global state, no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError, needs
from timm_varchan.evaluation import (
    SetResult,
    confusion_counts,
    main_series,
    rank_bands,
    summarise_sizes,
)
from timm_varchan.models import share
from timm_varchan.stems import Stem

with needs("train"):
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

__all__ = [
    "COLOURS",
    "plot_bands",
    "plot_channel_sets",
    "plot_confusion",
    "plot_curves",
    "plot_stem",
]

#: Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")
#: With more channel sets than this, the picture shows sizes instead of sets.
MAX_BARS = 15
#: Channels of a picture of bars, at most.
MAX_BANDS = 20
#: With more classes than this, a confusion matrix has colours without numbers.
_MAX_NUMBERED = 15
_MAX_NAMED = 40
#: Kernels shown of each channel: those with the largest weights in the kernel bank.
NUM_KERNELS = 6


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, path: str | Path) -> Path:
    figure.savefig(path, dpi=150)
    return Path(path)


def plot_curves(history: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Loss and accuracy over the epochs, training and validation, and every channel set's.

    Args:
        history: One entry an epoch with `epoch`, `train_loss`, `eval_loss`, `train_accuracy`,
            `eval_accuracy`, and, where several sets were tested, `eval_sets`: accuracy by set.
        path: Picture to write.

    Returns:
        The path.

    Raises:
        UserError: No epochs.
    """
    if not history:
        raise UserError("There are no epochs to draw.")
    sets = list(history[-1].get("eval_sets", ()))
    sets = sets if len(sets) > 1 else []
    figure = _figure(7.2, 6.4 if sets else 3.2)
    grid = figure.add_gridspec(2 if sets else 1, 2)
    epochs = [entry["epoch"] + 1 for entry in history]
    dots: dict[str, Any] = {"marker": "o", "markersize": 3}
    for column, (what, label, factor) in enumerate(
        (("loss", "cross entropy", 1), ("accuracy", "accuracy (%)", 100))
    ):
        axes = figure.add_subplot(grid[0, column])
        for colour, (key, images) in enumerate((("train", "training"), ("eval", "validation"))):
            values = [factor * entry[f"{key}_{what}"] for entry in history]
            axes.plot(epochs, values, color=COLOURS[colour], label=images, **dots)
        axes.set_ylabel(label)
        axes.legend()
    if sets:
        axes = figure.add_subplot(grid[1, :])
        for number, name in enumerate(sets):
            colour, style = number % len(COLOURS), _STYLES[number // len(COLOURS) % 3]
            values = [100 * entry["eval_sets"][name] for entry in history]
            axes.plot(epochs, values, style, color=COLOURS[colour], label=_short(name), **dots)
        axes.set_ylabel("validation accuracy (%)")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="channels")
    for axes in figure.axes:
        _count_along_x(axes, "epoch")
    return _saved(figure, path)


def _count_along_x(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _short(name: str) -> str:
    """A name that fits a legend."""
    parts = name.split("+")
    few = len(parts) <= 3 or len(name) <= 20
    return name if few else f"{len(parts)}: {parts[0]}+...+{parts[-1]}"


def plot_channel_sets(
    results: Sequence[SetResult],
    path: str | Path,
    title: str = "",
    *,
    baseline: Sequence[SetResult] | None = None,
) -> Path:
    """Accuracy on every channel set with its 95 % interval, a colour for each mode and order.

    With more than `MAX_BARS` sets it shows the number of channels instead: the mean over the sets
    of a size, a band from the worst to the best, a dot for every set, and the sets that have names.

    Args:
        results: From `evaluate_channel_sets`.
        path: Picture to write.
        title: Above it.
        baseline: Of another model on the same sets.

    Returns:
        The path.

    Raises:
        UserError: No results.
    """
    if not results:
        raise UserError("There are no channel sets to draw.")
    num_sets = len({result.indices for result in results})
    if num_sets > MAX_BARS:
        figure = _figure(6.4, 4)
        axes = figure.subplots()
        _draw_sizes(axes, main_series(results), COLOURS[0], "this model")
        if baseline:
            _draw_sizes(axes, main_series(baseline), COLOURS[1], "baseline", dots=False)
        _count_along_x(axes, "number of channels")
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(0, 100)
    else:
        series: dict[str, list[SetResult]] = {}
        for result in results:
            series.setdefault(f"{result.mode}, {result.order}", []).append(result)
        if baseline:
            series["baseline"] = main_series(baseline)
        figure = _figure(6.4, max(2.5, 1 + num_sets * (0.08 + 0.16 * len(series))))
        axes = figure.subplots()
        _draw_sets(axes, series)
    if title:
        axes.set_title(title)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return _saved(figure, path)


def _draw_sets(axes: Axes, series: Mapping[str, Sequence[SetResult]]) -> None:
    """Horizontal bars, largest sets on top."""
    names = {r.indices: r.label for group in series.values() for r in group}
    places = {s: place for place, s in enumerate(sorted(names, key=lambda s: (-len(s), s)))}
    thickness = 0.8 / len(series)
    for number, (label, group) in enumerate(series.items()):
        estimates = [r.metrics["accuracy"] for r in group]
        errors: Any = [
            [100 * (e.value - e.low) for e in estimates],
            [100 * (e.high - e.value) for e in estimates],
        ]
        axes.barh(
            [places[r.indices] - 0.4 + thickness * (number + 0.5) for r in group],
            [100 * e.value for e in estimates], thickness, xerr=errors,
            color=COLOURS[number % len(COLOURS)], label=label,
            error_kw={"elinewidth": 0.8, "capsize": 1.5, "alpha": 0.8},
        )  # fmt: skip
    axes.set_yticks(list(places.values()), [_short(names[s]) for s in places])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 100)
    axes.set_xlabel("accuracy (%), 95 % intervals")
    axes.grid(axis="x", alpha=0.3)


def _draw_sizes(
    axes: Axes, results: Sequence[SetResult], colour: str, label: str, *, dots: bool = True
) -> None:
    """Mean, worst and best of the sets of each size; every set; the names that people know."""
    summaries = sorted(summarise_sizes(results), key=lambda summary: summary.size)
    sizes = [summary.size for summary in summaries]
    ranged = [summary for summary in summaries if summary.num_sets > 1]
    axes.bar(
        [s.size for s in ranged], [100 * (s.best - s.worst) for s in ranged], 0.9,
        bottom=[100 * s.worst for s in ranged], color=colour, alpha=0.18,
        label=f"{label}: worst to best set",
    )  # fmt: skip
    axes.plot(
        sizes, [100 * s.mean for s in summaries], "o-" if dots else "s--", color=colour,
        markersize=4, label=f"{label}: mean",
    )  # fmt: skip
    means, last = {s.size: 100 * s.mean for s in summaries}, sizes[-1]
    axes.set_xlim(0.4, last + 0.6)
    for result in results if dots else ():
        known = result.kind in ("natural", "asked")
        accuracy = 100 * result.accuracy
        axes.plot(
            result.size, accuracy, "D" if known else ".", color=COLOURS[6 if known else 0],
            markersize=5 if known else 3, alpha=1 if known else 0.5,
        )  # fmt: skip
        if known:
            above = accuracy >= means[result.size]
            axes.annotate(
                _short(result.name), (result.size, accuracy), (0, 7 if above else -7), fontsize=9,
                textcoords="offset points", va="bottom" if above else "top",
                ha="left" if result.size < last / 3 else "right" if result.size > 2 * last / 3
                else "center",
            )  # fmt: skip


def plot_bands(results: Sequence[SetResult], path: str | Path, title: str = "") -> Path:
    """Which channels matter: two bars each, what is lost without it and what it does alone.

    Args:
        results: From `evaluate_channel_sets`.
        path: Picture to write.
        title: Above it.

    Returns:
        The path.

    Raises:
        UserError: No channel was evaluated alone or left out.
    """
    bands = rank_bands(results)[:MAX_BANDS]
    if not bands:
        raise UserError("No channel was evaluated alone or left out: there is nothing to rank.")
    figure = _figure(6.4, 1.3 + 0.27 * len(bands))
    left, right = figure.subplots(1, 2, sharey=True)
    lost = [band.loss_without for band in bands]
    alone = [band.alone for band in bands]
    _bars(left, [d and (d.difference, d.low, d.high) for d in lost], COLOURS[1])
    _bars(right, alone, COLOURS[0])
    left.axvline(0, color="black", linewidth=0.8)
    left.set_xlabel("lost without it (points)")
    right.set_xlabel("accuracy of it alone (%)")
    right.set_xlim(0, 100)
    everything = 100 * main_series(results)[0].accuracy
    right.axvline(everything, color="black", linestyle=":", label="all channels")
    right.legend(loc="lower right", fontsize=8)
    left.set_yticks(range(len(bands)), [_short(band.name) for band in bands])
    left.invert_yaxis()
    if title:
        figure.suptitle(title)
    return _saved(figure, path)


def _bars(axes: Axes, values: Sequence[Any], colour: str) -> None:
    """Horizontal bars with intervals; a value is `(value, low, high)` in 0..1, or None."""
    for place, one in enumerate(values):
        if one is not None:
            value, low, high = (100 * part for part in one)
            axes.barh(place, value, 0.7, color=colour, alpha=0.85)
            axes.plot([low, high], [place, place], color="black", linewidth=1, alpha=0.7)
    axes.margins(y=0.01)
    axes.grid(axis="x", alpha=0.3)


def plot_confusion(
    result: SetResult, class_names: Sequence[str], path: str | Path, title: str = ""
) -> Path:
    """The confusion matrix of one channel set, in per cent of each true class.

    Args:
        result: Of `evaluate_channel_sets`; its first is that of all channels.
        class_names: In the order of the labels.
        path: Picture to write.
        title: Above it.

    Returns:
        The path.
    """
    num = len(class_names)
    counts = confusion_counts(result.predictions, result.references, num)
    names = [*class_names, "no answer"] if counts[:, num].any() else list(class_names)
    counts = counts[:, : len(names)]
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 2.2 + 0.38 * min(num, _MAX_NUMBERED)
    figure = _figure(side + 0.6, side)
    axes = figure.subplots()
    axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    if num <= _MAX_NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if share > 0:
                axes.text(
                    column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=9,
                    color="white" if share > 0.55 else "black",
                )  # fmt: skip
    if num <= _MAX_NAMED:
        size = 9 if num <= _MAX_NUMBERED else 5
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axes.set_yticks(range(num), class_names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (rows add up to 100 %)")
    heading = f"{result.label}: {100 * result.accuracy:.1f} %"
    axes.set_title(f"{title}\n{heading}" if title else heading, fontsize=10)
    return _saved(figure, path)


@torch.no_grad()
def plot_stem(
    model: nn.Module,
    images: Tensor,
    channels: ChannelSetLike,
    path: str | Path,
    *,
    sets: Sequence[ChannelSetLike] | None = None,
    names: Sequence[str] = (),
    num_kernels: int = NUM_KERNELS,
) -> Path:
    """What the stem makes of images: a row for each image, a column for each channel set.

    In every cell a line for each channel: how much of it goes to each virtual channel (its mixing
    coefficients), then some of the kernels that it is convolved with (its generated kernels, all
    of a column of cells in one scale: red is positive, blue negative).

    Args:
        model: A model with a stem that mixes; its first stem is shown, and it is not changed.
        images: `(B, C, H, W)`, normalised.
        channels: What the C planes are.
        path: Picture to write.
        sets: Subsets of the channels, one a column; by default all channels and up to three sets
            with one channel less.
        names: A name for each image.
        num_kernels: How many of the generated kernels to show.

    Returns:
        The path.

    Raises:
        UserError: No images, no stem, a stem without mixing coefficients, or channels that are not
            among the images' own.
    """
    whole = ChannelSet.parse(channels)
    if images.dim() != 4 or not len(images) or images.shape[1] != len(whole):
        raise UserError(
            f"The images have shape {tuple(images.shape)}, but the channels are {whole} "
            f"({len(whole)}). Give (B, {len(whole)}, H, W) with at least one image."
        )
    less = whole.subsets(len(whole) - 1)[:3] if len(whole) > 1 else []
    wanted = [ChannelSet.parse(s) for s in sets] if sets else [whole, *less]
    views = [_look(model, images, whole, one, num_kernels) for one in wanted]
    widths = [len(view.coefficients[0, 0]) + view.num_kernels for view in views]
    lines = max(map(len, wanted))
    figure = _figure(2 + 0.42 * sum(widths), 0.5 + len(images) * (0.3 + 0.36 * lines))
    grid = figure.subplots(
        len(images), 1 + len(wanted), squeeze=False, width_ratios=[lines, *widths]
    )
    for number, row in enumerate(grid):
        _draw_image(row[0], images[number], names[number] if names else "")
        for axes, view, one in zip(row[1:], views, wanted, strict=True):
            view.draw(axes, number, one.labels)
            if number == 0:
                axes.set_title(str(one))
    return _saved(figure, path)


def _look(
    model: nn.Module, images: Tensor, whole: ChannelSet, wanted: ChannelSet, num_kernels: int
) -> _StemView:
    """The first stem's coefficients, and its kernels where the bank is one convolution."""
    twin = share(model, wanted).eval()
    stem = next((module for module in twin.modules() if isinstance(module, Stem)), None)
    if stem is None:
        raise UserError(f"{type(model).__name__} has a mixer but no timm_varchan.Stem to look at.")
    planes = list(range(len(whole))) if wanted == whole else list(whole.index(wanted))
    x = images[:, planes].to(next(twin.parameters()))
    coefficients = stem.mixer.coefficients(x).expand(len(x), -1, -1).float().cpu()
    kernels = coefficients.new_zeros(len(x), 0, len(wanted), 1, 1)
    if isinstance(stem.bank, nn.Conv2d):
        chosen = stem.bank.weight.flatten(1).norm(dim=1).argsort(descending=True)[:num_kernels]
        kernels = stem.generated_kernels(x)[:, chosen].expand(len(x), -1, -1, -1, -1).float().cpu()
    virtual = stem.mixer.virtual_channels.labels
    return _StemView(coefficients.numpy(), kernels.numpy(), virtual)


@dataclass(frozen=True)
class _StemView:
    """Coefficients `(B, C, K)`, some kernels `(B, n, C, kh, kw)`, names of the K."""

    coefficients: np.ndarray
    kernels: np.ndarray
    virtual: tuple[str, ...]

    @property
    def num_kernels(self) -> int:
        """How many kernels there are to show, n."""
        return self.kernels.shape[1]

    def draw(self, axes: Axes, number: int, labels: Sequence[str]) -> None:
        """One image's channels, a line each: K numbers, then n kernels, in cells of 1 x 1."""
        num_virtual = len(self.virtual)
        table = self.coefficients[number]
        place: dict[str, Any] = {"interpolation": "nearest", "cmap": "RdBu_r", "aspect": "equal"}
        extent = (0.0, float(num_virtual), float(len(labels)), 0.0)
        axes.imshow(table, vmin=-1, vmax=1, extent=extent, alpha=0.8, **place)
        for (line, column), value in np.ndenumerate(table):
            axes.text(
                column + 0.5, line + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7,
                color="white" if abs(value) > 0.6 else "black",
            )  # fmt: skip
        limit = float(np.abs(self.kernels).max()) if self.num_kernels else 1.0
        for line in range(len(labels)):
            for column in range(self.num_kernels):
                left = num_virtual + column + 0.2
                extent = (left, left + 0.9, line + 0.95, line + 0.05)
                kernel = self.kernels[number, column, line]
                axes.imshow(kernel, vmin=-limit, vmax=limit, extent=extent, **place)
        axes.set_xlim(0, num_virtual + self.num_kernels + 0.2)
        axes.set_ylim(len(labels), 0)
        axes.set_xticks([k + 0.5 for k in range(num_virtual)], [f"to {v}" for v in self.virtual])
        axes.set_yticks([line + 0.5 for line in range(len(labels))], labels)
        axes.tick_params(length=0, labelsize=7)
        axes.spines[:].set_visible(False)
        axes.set_anchor("N")


def _draw_image(axes: Axes, image: Tensor, name: str) -> None:
    """The first three planes as colours, or the first alone, stretched to the visible range."""
    shown = image[: 3 if len(image) > 2 else 1].float().cpu()
    low, high = shown.amin((1, 2), keepdim=True), shown.amax((1, 2), keepdim=True)
    shown = ((shown - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0)
    axes.imshow(shown.numpy(), cmap="gray")
    axes.set_xlabel(name, fontsize=7)
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])

"""Every picture, drawn without pyplot: no global state, no display.

They are narrow, 1,000 to 1,200 pixels, so that their letters can be read on a phone too.
"""

from __future__ import annotations

import logging
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.data.preview import Example, Preview
from timm_varchan.errors import UserError, needs
from timm_varchan.evaluation import (
    Band,
    SetResult,
    confusion_cells,
    main_series,
    rank_bands,
    summarise_sizes,
)
from timm_varchan.models import share
from timm_varchan.models.adapt import parse_channels
from timm_varchan.products import plane_near
from timm_varchan.stems import Stem

with needs("train"):
    from matplotlib import colormaps, font_manager
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font
    from matplotlib.text import Text
    from matplotlib.ticker import MaxNLocator

logger = logging.getLogger(__name__)

__all__ = [
    "class_colours",
    "picture_of",
    "plot_bands",
    "plot_channel_sets",
    "plot_classes",
    "plot_confusion",
    "plot_curves",
    "plot_preview",
    "plot_stem",
]

#: Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
#: With more channel sets than this, the picture shows sizes instead of sets.
MAX_BARS = 15
#: Channels of a picture of bars, at most.
MAX_BANDS = 20
#: With more classes than this, a confusion matrix has colours without numbers.
_MAX_NUMBERED = 15
_MAX_NAMED = 40
#: Pictures beside each other in a preview.
_TILES = 4
#: Kernels shown of each channel: those with the largest weights in the kernel bank.
NUM_KERNELS = 4
_WIDTH, _DPI = 5.0, 200

Box = tuple[float, float, float, float]
#: Accuracies to draw a line at, 0..1, by what has them: chance, the most frequent class.
Levels = Mapping[str, float]


def _figure(height: float, width: float = _WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _saved(figure: Figure, path: str | Path, dpi: int = _DPI) -> Path:
    """Write a figure, its texts in fonts that have their letters."""
    for axes in figure.axes:  # tick labels are made when they are asked for
        axes.get_xticklabels(), axes.get_yticklabels()
    texts = figure.findobj(Text)
    fonts, missing = _fonts_for("".join(text.get_text() for text in texts))
    table = {ord(c): c.encode("ascii", "backslashreplace").decode() for c in missing}
    for text in texts:
        text.set_parse_math(False)  # a dollar in a name is a dollar
        text.set_text(text.get_text().translate(table))
        if fonts:
            text.set_fontfamily(["DejaVu Sans", *fonts])
    figure.savefig(path, dpi=dpi)
    return Path(path)


# Letters ------------------------------------------------------------------------------------------


def _fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Fonts of this machine with the letters that matplotlib's own lacks; those that none has."""
    missing = set(text) - _letters(None)
    found: list[str] = []
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name):
        # The last resort has a box with a name of the script for every letter.
        has = _letters(font.fname) & missing if missing and "Last Resort" not in font.name else None
        if has:
            found.append(font.name)
            missing -= has
    return found, missing


@cache
def _letters(path: str | None) -> frozenset[str]:
    """The letters of a font file, by default of matplotlib's own."""
    try:
        font = FT2Font(path or font_manager.findfont("DejaVu Sans"))
    except (OSError, RuntimeError):  # a broken file, or a format that it does not read
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) | {"\n"}


def _class_labels(names: Sequence[str]) -> list[str]:
    """The names of classes, or their numbers where no font of this machine has the letters."""
    if not _fonts_for("".join(names))[1]:
        return list(names)
    logger.warning("No font of this machine has the letters of all class names; numbers stand in.")
    return [str(number) for number in range(len(names))]


# Training -----------------------------------------------------------------------------------------


def plot_curves(
    history: Sequence[Mapping[str, Any]], path: str | Path, *, levels: Levels | None = None
) -> Path:
    """Loss and accuracy over the epochs, and a small panel for each channel set.

    Args:
        history: One entry an epoch with `epoch`, `train_loss`, `eval_loss`, `train_accuracy`,
            `eval_accuracy`, and, where several sets were tested, `eval_sets`: accuracy by set.
        path: Picture to write.
        levels: Accuracies to draw a line at.

    Raises:
        UserError: No epochs.
    """
    if not history:
        raise UserError("There are no epochs to draw.")
    sets = list(history[-1].get("eval_sets", ()))
    rows = (len(sets) + 1) // 2 if len(sets) > 1 else 0
    figure = _figure(2.8 + 1.15 * rows)
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[2.4] + [1.0] * rows)
    epochs = [entry["epoch"] + 1 for entry in history]
    dots: dict[str, Any] = {"marker": "o", "markersize": 2.5 if len(epochs) < 40 else 0}
    for column, (what, label, factor) in enumerate(
        (("loss", "cross entropy", 1), ("accuracy", "accuracy (%)", 100))
    ):
        axes = figure.add_subplot(grid[0, column])
        for colour, (key, images) in enumerate((("train", "training"), ("eval", "validation"))):
            values = [factor * entry[f"{key}_{what}"] for entry in history]
            axes.plot(epochs, values, color=COLOURS[colour], label=images, **dots)
        if factor == 100:
            _draw_levels(axes, levels, axes.axhline)
            axes.set_ylim(0, 100)
        _count_along_x(axes, "epoch")
        axes.set_title(label, fontsize=10)
        axes.legend(fontsize=8)
    curves = {name: [100 * entry["eval_sets"][name] for entry in history] for name in sets}
    for number, name in enumerate(sets if rows else ()):
        axes = figure.add_subplot(grid[1 + number // 2, number % 2])
        for other in curves.values():
            axes.plot(epochs, other, color="#bbbbbb", linewidth=0.7)
        axes.plot(epochs, curves[name], color=COLOURS[1], linewidth=2, **dots)
        _draw_levels(axes, levels, axes.axhline)
        axes.set_title(f"{_short(name)}: {curves[name][-1]:.1f} %", fontsize=9)
        axes.set_ylim(0, 100)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return _saved(figure, path)


def _count_along_x(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)


def _draw_levels(axes: Axes, levels: Levels | None, line: Any) -> None:
    """Dotted lines at accuracies that knowing nothing gives."""
    for name, value in (levels or {}).items():
        line(100 * value, color="#555555", linestyle=":", linewidth=1.2, label=name)


def _short(name: str) -> str:
    """A name that fits a legend."""
    parts = name.split("+")
    few = len(parts) <= 3 or len(name) <= 20
    return name if few else f"{len(parts)}: {parts[0]}+...+{parts[-1]}"


# Channel sets -------------------------------------------------------------------------------------


def plot_channel_sets(
    results: Sequence[SetResult],
    path: str | Path,
    title: str = "",
    *,
    baseline: Mapping[tuple[int, ...], Mapping[str, float]] | None = None,
    levels: Levels | None = None,
) -> Path:
    """Accuracy on every channel set with its 95 % interval, a colour for each mode and order.

    With more than `MAX_BARS` sets it shows the number of channels instead: the mean over the sets
    of a size (hollow where there is a single one), a band from the worst to the best, a dot for
    every set, and the sets that have names.

    Args:
        results: From `evaluate_channel_sets`.
        path: The picture, as in all functions of this file; they return it.
        title: Above it.
        baseline: Accuracy of another model (`value`, `low`, `high`) by the positions of a set.
        levels: Accuracies to draw a line at.

    Raises:
        UserError: No results.
    """
    if not results:
        raise UserError("There are no channel sets to draw.")
    num_sets = len({result.indices for result in results})
    if num_sets > MAX_BARS:
        figure = _figure(4.4)
        axes = figure.subplots()
        _draw_sizes(axes, main_series(results), baseline or {})
        _draw_levels(axes, levels, axes.axhline)
        _count_along_x(axes, "number of channels")
        axes.set_ylabel("accuracy (%)")
        axes.set_ylim(0, 101)
    else:
        series: dict[str, list[SetResult]] = {}
        for result in results:
            series.setdefault(f"{result.mode}, {result.order}", []).append(result)
        lines = len(series) + bool(baseline)
        figure = _figure(max(2.5, 1.3 + num_sets * (0.12 + 0.16 * lines)))
        axes = figure.subplots()
        _draw_sets(axes, series, baseline or {})
        _draw_levels(axes, levels, axes.axvline)
    _entitle(figure, title, results[0].num_images)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return _saved(figure, path)


def _entitle(figure: Figure, title: str, num_images: int, note: str = "") -> None:
    first = f"{title}\n" if title else ""
    figure.suptitle(f"{first}{num_images:,} images{note}", fontsize=10)


def _draw_sets(
    axes: Axes,
    series: Mapping[str, Sequence[SetResult]],
    baseline: Mapping[tuple[int, ...], Mapping[str, float]],
) -> None:
    """Horizontal bars, largest sets on top."""
    names = {r.indices: r.name for group in series.values() for r in group}
    places = {s: place for place, s in enumerate(sorted(names, key=lambda s: (-len(s), s)))}
    rows: dict[str, Mapping[tuple[int, ...], Mapping[str, float]]] = {
        label: {r.indices: r.metrics["accuracy"]._asdict() for r in group}
        for label, group in series.items()
    }
    rows |= {"baseline": baseline} if baseline else {}
    thickness = 0.8 / len(rows)
    for number, (label, group) in enumerate(rows.items()):
        errors: Any = [
            [100 * (e["value"] - e["low"]) for e in group.values()],
            [100 * (e["high"] - e["value"]) for e in group.values()],
        ]
        axes.barh(
            [places[indices] - 0.4 + thickness * (number + 0.5) for indices in group],
            [100 * e["value"] for e in group.values()], thickness, xerr=errors,
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
    axes: Axes,
    results: Sequence[SetResult],
    baseline: Mapping[tuple[int, ...], Mapping[str, float]],
) -> None:
    """Mean, worst and best of the sets of each size; every set; the names that people know."""
    summaries = sorted(summarise_sizes(results), key=lambda summary: summary.size)
    ranged = [summary for summary in summaries if summary.num_sets > 1]
    axes.bar(
        [s.size for s in ranged], [100 * (s.best - s.worst) for s in ranged], 0.9,
        bottom=[100 * s.worst for s in ranged], color=COLOURS[0], alpha=0.18,
        label="worst to best set",
    )  # fmt: skip
    means = {s.size: 100 * s.mean for s in summaries}
    axes.plot(list(means), list(means.values()), "-", color=COLOURS[0], linewidth=1.5)
    for several, face, label in ((True, COLOURS[0], "mean"), (False, "white", "a single set")):
        sizes = [s.size for s in summaries if (s.num_sets > 1) == several]
        axes.plot(
            sizes, [means[size] for size in sizes], "o", color=COLOURS[0], markerfacecolor=face,
            markersize=6, label=label, zorder=3,
        )  # fmt: skip
    _draw_baseline(axes, results, baseline)
    last = max(means)
    axes.set_xlim(0.4, last + 0.6)
    for result in results:
        if result.kind not in ("natural", "asked"):
            axes.plot(result.size, 100 * result.accuracy, ".", color=COLOURS[0], alpha=0.5,
                      markersize=4)  # fmt: skip
    _draw_named(axes, [r for r in results if r.kind in ("natural", "asked")], last)


def _draw_baseline(
    axes: Axes,
    results: Sequence[SetResult],
    baseline: Mapping[tuple[int, ...], Mapping[str, float]],
) -> None:
    values: dict[int, list[float]] = {}
    for result in results:
        if result.indices in baseline:
            values.setdefault(result.size, []).append(100 * baseline[result.indices]["value"])
    if values:
        sizes = sorted(values)
        axes.plot(sizes, [np.mean(values[size]) for size in sizes], "s--", color=COLOURS[1],
                  markersize=4, label="baseline: mean")  # fmt: skip


def _draw_named(axes: Axes, named: Sequence[SetResult], last: int) -> None:
    """Sets that people know by name, the names beside the curve, below all of its points."""
    for number, result in enumerate(sorted(named, key=lambda r: r.size)):
        accuracy = 100 * result.accuracy
        axes.plot(result.size, accuracy, "D", color=COLOURS[6], markersize=5, zorder=4)
        right = result.size > 0.6 * last
        axes.annotate(
            _short(result.name), (result.size, accuracy),
            (-14 if right else 14, -26 - 13 * (number % 3)), textcoords="offset points",
            fontsize=9, ha="right" if right else "left", va="center",
            arrowprops={"arrowstyle": "-", "color": "#555555", "linewidth": 0.7},
            bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
        )  # fmt: skip


def plot_bands(
    results: Sequence[SetResult],
    path: str | Path,
    title: str = "",
    *,
    levels: Levels | None = None,
) -> Path:
    """Which channels matter: what is lost without each, and what each does alone.

    Above stand only channels without which the accuracy certainly changes (the 95 % interval leaves
    out 0), gains in a colour of their own; a line counts the others.

    Raises:
        UserError: No channel was evaluated alone or left out.
    """
    bands = rank_bands(results)
    if not bands:
        raise UserError("No channel was evaluated alone or left out: there is nothing to rank.")
    tested = [band for band in bands if band.loss_without is not None]
    certain = [band for band in tested if band.certain][:MAX_BANDS]
    alone = [(band, band.alone) for band in bands if band.alone is not None]
    alone = sorted(alone, key=lambda pair: (-pair[1].value, pair[0].index))[:MAX_BANDS]
    heights = [1.0 + 0.22 * len(rows) for rows in (certain, alone) if rows]
    figure = _figure(0.9 + sum(heights))
    if heights:
        grid = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)
        panels = list(grid[:, 0])
    if certain:
        _draw_losses(panels.pop(0), certain)
    if alone:
        axes = panels.pop(0)
        _bars(
            axes,
            [band for band, _ in alone],
            [value for _, value in alone],
            [COLOURS[0]] * len(alone),
        )
        axes.set_xlabel("accuracy of it alone (%)", fontsize=9)
        axes.set_xlim(0, 100)
        full = main_series(results)[0].accuracy
        _draw_levels(axes, {**(levels or {}), "all channels": full}, axes.axvline)
        axes.lines[-1].set(color=COLOURS[0], linestyle="--")
        axes.legend(fontsize=8, loc="lower right")
    rest = len(tested) - len(certain)
    note = f"\nwithout any one of {rest}{' others' if certain else ''}: no certain change"
    _entitle(figure, title, results[0].num_images, note if rest else "")
    return _saved(figure, path)


def _draw_losses(axes: Axes, bands: Sequence[Band]) -> None:
    """What is lost or gained without each of some channels."""
    lost = [d for band in bands if (d := band.loss_without)]
    values = [(d.difference, d.low, d.high) for d in lost]
    _bars(axes, bands, values, [COLOURS[1] if d.difference > 0 else COLOURS[2] for d in lost])
    for colour, label, sign in ((COLOURS[1], "lost without it", 1), (COLOURS[2], "gained", -1)):
        if any(sign * d.difference > 0 for d in lost):
            axes.bar(0, 0, color=colour, label=label)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("points of accuracy", fontsize=9)
    axes.legend(fontsize=8)


def _bars(axes: Axes, bands: Sequence[Any], values: Sequence[Any], colours: Sequence[str]) -> None:
    """Horizontal bars with intervals; a value is `(value, low, high)` in 0..1."""
    for place, (estimate, colour) in enumerate(zip(values, colours, strict=True)):
        value, low, high = (100 * part for part in estimate)
        axes.barh(place, value, 0.7, color=colour, alpha=0.85)
        axes.plot([low, high], [place, place], color="black", linewidth=1, alpha=0.7)
    axes.set_yticks(range(len(bands)), [_short(band.name) for band in bands], fontsize=9)
    axes.set_ylim(len(bands) - 0.4, -0.6)
    axes.tick_params(labelsize=9)
    axes.grid(axis="x", alpha=0.3)


def plot_confusion(
    result: SetResult, class_names: Sequence[str], path: str | Path, title: str = ""
) -> Path:
    """The confusion matrix of one channel set: counts, coloured by fraction of the true class."""
    num = len(class_names)
    shown = min(num, _MAX_SHOWN)
    true, predicted, numbers = confusion_cells(result.predictions, result.references, num).T
    bins = (np.arange(shown + 1) * num / shown).round().astype(int)
    counts = np.zeros((shown, shown + 1), int)
    place = np.searchsorted(bins, true, "right") - 1
    np.add.at(counts, (place, np.searchsorted(bins, predicted, "right") - 1), numbers)
    labels = _class_labels(class_names)
    columns = [*labels, "no answer"] if counts[:, shown].any() else labels
    counts = counts[:, : len(columns)] if num == shown else counts[:, :shown]
    fractions = counts / counts.sum(1, keepdims=True).clip(min=1)
    side = 2.4 + 0.36 * min(num, _MAX_NUMBERED)
    figure = _figure(min(side, 7.5) + 0.3, min(side, 7.5))
    axes = figure.subplots()
    extent = (-0.5, num - 0.5 + fractions.shape[1] - shown, num - 0.5, -0.5)
    axes.imshow(fractions, vmin=0, vmax=1, cmap="Blues", extent=extent)
    if num <= _MAX_NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    column, row, str(count), ha="center", va="center", fontsize=9,
                    color="white" if fractions[row, column] > 0.55 else "black",
                )  # fmt: skip
    if num <= _MAX_NAMED:
        size, totals = 9 if num <= _MAX_NUMBERED else 6, counts.sum(1)
        axes.set_xticks(range(len(columns)), map(_short, columns), rotation=90, fontsize=size)
        rows = [f"{_short(name)} ({n})" for name, n in zip(labels, totals, strict=True)]
        axes.set_yticks(range(num), rows, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (images)")
    heading = f"{result.name}: accuracy {result.metrics['accuracy']} %"
    axes.set_title(f"{title}\n{heading}" if title else heading, fontsize=9)
    return _saved(figure, path)


#: Rows of a confusion matrix that a picture can show; of more classes, neighbours are summed.
_MAX_SHOWN = 500


# Maps ---------------------------------------------------------------------------------------------


#: A gray that is no class's.
_NO_ANSWER = 225


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours for so many classes (red, green, blue, each to 255), far apart for few."""
    tables = {10: "tab10", 20: "tab20"}
    name = next((name for most, name in tables.items() if count <= most), None)
    # the golden ratio keeps neighbours apart
    hues = [i if name else i * 0.618034 % 1 for i in range(count)]
    colours = [colormaps[name or "hsv"](hue, bytes=True) for hue in hues]
    return [(int(r), int(g), int(b)) for r, g, b, _ in colours]


def plot_classes(
    cells: np.ndarray, labels: Mapping[int, str], num_classes: int, path: str | Path
) -> Path:
    """A map of classes with a legend.

    Args:
        cells: The class of every cell `(rows, columns)`, NaN where there is no answer.
        labels: What the legend says of the classes that it names, by their number.
        num_classes: How many there are; each has its colour of `class_colours`.
        path: Picture to write.
    """
    step = max(1, max(cells.shape) // 1000)
    shown = cells[::step, ::step]
    has_answer = ~np.isnan(shown)
    table = np.array(class_colours(num_classes), np.uint8)
    picture = np.full((*shown.shape, 3), _NO_ANSWER, np.uint8)
    picture[has_answer] = table[shown[has_answer].astype(int)]
    height = _WIDTH * shown.shape[0] / shown.shape[1]
    figure = _figure(min(max(height, 0.5), 9.0) + 0.4 + 0.21 * len(labels))
    axes = figure.subplots()
    axes.imshow(picture, interpolation="nearest")
    axes.set_axis_off()
    for number, text in labels.items():
        axes.bar(0, 0, color=table[number] / 255, label=text)
    if not has_answer.all():
        axes.bar(0, 0, color=[_NO_ANSWER / 255] * 3, label="no answer")
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    return _saved(figure, path)


# Stems --------------------------------------------------------------------------------------------


@torch.no_grad()
def plot_stem(
    model: nn.Module,
    images: Tensor,
    channels: ChannelSetLike,
    path: str | Path,
    *,
    sets: Sequence[Sequence[int]] | None = None,
    names: Sequence[str] = (),
) -> Path:
    """What the stem makes of images: a block for each image and channel set, below each other.

    In a block a line for each channel: how much of it goes to each virtual channel (its mixing
    coefficients; those under 0.005 are left blank), then some of the kernels that it is convolved
    with (its generated kernels, all of a block in one scale: red is positive, blue negative).

    Args:
        model: A model with a stem that mixes; its first stem is shown, and it is not changed.
        images: `(B, C, H, W)`, normalised.
        channels: What the C planes are.
        path: Picture to write.
        sets: Positions of the channels of each set; by default all channels, and all but the first.
        names: A name for each image.

    Raises:
        UserError: No images, no stem, a stem without mixing coefficients.
    """
    whole = parse_channels(model, channels)
    if images.dim() != 4 or not len(images) or images.shape[1] != len(whole):
        raise UserError(
            f"The images have shape {tuple(images.shape)}, but the channels are {whole} "
            f"({len(whole)}). Give (B, {len(whole)}, H, W) with at least one image."
        )
    every = tuple(range(len(whole)))
    wanted = [tuple(places) for places in sets or dict.fromkeys((every, every[1:] or every))]
    views = [_look(model, images, whole, places) for places in wanted]
    lines = [len(places) for _ in images for places in wanted]
    widest = max(len(view.virtual) + len(view.filters) for view in views)
    width = min(max(3.0 + 0.38 * widest, 4.0), 8.0)
    figure = _figure(0.4 + sum(0.6 + 0.24 * n for n in lines), width)
    grid = figure.subplots(
        len(lines), 2, squeeze=False, height_ratios=[n + 1.5 for n in lines],
        width_ratios=[1.2, width - 1.6],
    )  # fmt: skip
    for row, (left, right) in enumerate(grid):
        number, view = row // len(wanted), views[row % len(wanted)]
        shown = wanted[row % len(wanted)]
        left.imshow(picture_of(images[number], whole))
        left.set_xlabel(_clipped(names[number], 22) if names else "", fontsize=7)
        left.set_anchor("N")
        left.set_xticks([])
        left.set_yticks([])
        _draw_stem(right, view, number, whole.take(shown).labels)
        right.set_title(f"{len(shown)} of {len(whole)} channels", fontsize=9, loc="left")
    return _saved(figure, path, 150)


def _look(model: nn.Module, images: Tensor, whole: ChannelSet, planes: Sequence[int]) -> _StemView:
    """The first stem's coefficients, and its kernels where the bank is one convolution."""
    twin = share(model, whole.take(planes)).eval()
    stem = next((module for module in twin.modules() if isinstance(module, Stem)), None)
    if stem is None:
        raise UserError(f"{type(model).__name__} has a mixer but no timm_varchan.Stem to look at.")
    x = images[:, list(planes)].to(next(twin.parameters()))
    coefficients = stem.mixer.coefficients(x).expand(len(x), -1, -1).float().cpu()
    kernels, chosen = coefficients.new_zeros(len(x), 0, len(planes), 1, 1), torch.zeros(0).long()
    if isinstance(stem.bank, nn.Conv2d):
        chosen = stem.bank.weight.flatten(1).norm(dim=1).argsort(descending=True)[:NUM_KERNELS]
        kernels = stem.generated_kernels(x)[:, chosen].expand(len(x), -1, -1, -1, -1).float().cpu()
    virtual = stem.mixer.virtual_channels.labels
    return _StemView(coefficients.numpy(), kernels.numpy(), virtual, tuple(chosen.tolist()))


class _StemView(NamedTuple):
    """Coefficients `(B, C, K)`, n kernels `(B, n, C, kh, kw)`, names of the K, numbers of the n."""

    coefficients: np.ndarray
    kernels: np.ndarray
    virtual: tuple[str, ...]
    filters: tuple[int, ...]


def _draw_stem(axes: Axes, view: _StemView, number: int, labels: Sequence[str]) -> None:
    """One image's channels, a line each: K numbers, then n kernels, in cells of 1 x 1."""
    num_virtual, num_kernels = len(view.virtual), len(view.filters)
    table = view.coefficients[number]
    place: dict[str, Any] = {"interpolation": "nearest", "cmap": "RdBu_r", "aspect": "auto"}
    extent = (0.0, float(num_virtual), float(len(labels)), 0.0)
    axes.imshow(table, vmin=-1, vmax=1, extent=extent, alpha=0.8, **place)
    for (line, column), value in np.ndenumerate(table):
        if abs(value) >= 0.005:
            axes.text(
                column + 0.5, line + 0.5, f"{value:.2f}", ha="center", va="center",
                fontsize=7, color="white" if abs(value) > 0.6 else "black",
            )  # fmt: skip
    limit = float(np.abs(view.kernels).max()) if num_kernels else 1.0
    for line in range(len(labels)):
        for column in range(num_kernels):
            left = num_virtual + column + 0.2
            extent = (left, left + 0.9, line + 0.95, line + 0.05)
            kernel = view.kernels[number, column, line]
            axes.imshow(kernel, vmin=-limit, vmax=limit, extent=extent, **place)
    axes.set_xlim(0, num_virtual + num_kernels + 0.2)
    axes.set_ylim(len(labels), 0)
    ticks = [*np.arange(num_virtual) + 0.5, *np.arange(num_kernels) + num_virtual + 0.65]
    texts = [*(f"to {v}" for v in view.virtual), *(f"kernel {k}" for k in view.filters)]
    axes.set_xticks(ticks, texts, rotation=0 if len(ticks) < 8 else 90)
    axes.set_yticks([line + 0.5 for line in range(len(labels))], labels)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def picture_of(image: Tensor, channels: ChannelSet) -> np.ndarray:
    """What people see of an image: red, green and blue where it has them, else its first planes.

    Args:
        image: `(C, H, W)` of any type and scale.
        channels: What its planes are.

    Returns:
        `(H, W, 3)`, uint8, every plane stretched from its 2nd to its 98th percentile.
    """
    found = [plane_near(channels.wavelengths_nm, role) for role in ("red", "green", "blue")]
    planes = [plane for plane in found if plane is not None]
    if len(planes) < 3:
        planes = [0, 1, 2] if len(image) == 3 else [0, 0, 0]
    shown = image[planes].float().cpu().numpy()
    finite = np.nan_to_num(shown, posinf=0, neginf=0)
    low, high = np.percentile(finite, (2, 98), axis=(1, 2), keepdims=True)
    scaled = ((finite - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    return np.ascontiguousarray((255 * scaled).astype(np.uint8).transpose(1, 2, 0))


# Data ---------------------------------------------------------------------------------------------


def plot_preview(preview: Preview, path: str | Path) -> Path:
    """What is to be said, images of every split, the planes of one of them, classes.

    Args:
        preview: From `timm_varchan.data.preview_data`.
        path: Picture to write.
    """
    rows = [
        (split, [_seen(example, preview.channels) for example in examples])
        for split, examples in preview.examples.items()
    ]
    every = [example for examples in preview.examples.values() for example in examples]
    if every and len(preview.channels) > 1:
        clearest = max(every, key=lambda e: float(np.nanstd(e.image.numpy()[0])))
        shown = [_plane(clearest.image, i, c.label) for i, c in enumerate(preview.channels)]
        title = f"planes of {Path(clearest.name).name}, lowest to highest number"
        rows += [
            (title if not i else "", shown[i : i + _TILES]) for i in range(0, len(shown), _TILES)
        ]
    counts = sum(preview.counts.values(), Counter[str]())
    classes = [name for name, _ in counts.most_common(MAX_BARS)]
    text = "\n".join(textwrap.fill(line, 76) for line in (preview.title, *preview.lines))
    top, tile = 0.16 + 0.123 * (text.count("\n") + 1), (_WIDTH - 0.1) / _TILES
    heights = [tile + 0.24 + (0.16 if title else 0) for title, _ in rows]
    total = top + sum(heights) + 0.6 + 0.17 * len(classes)
    figure = Figure(figsize=(_WIDTH, total))
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.08 / total, text, fontsize=7.5, va="top")
    for (title, tiles), height in zip(rows, heights, strict=True):
        figure.text(0.02, 1 - (top + 0.1) / total, title, fontsize=7.5, va="center")
        top += height
        for place, (image, caption) in enumerate(tiles):
            box = (0.05 + place * tile + 0.04, total - top + 0.28, tile - 0.08, tile - 0.08)
            axes = figure.add_axes(_inches(box, total))
            axes.set_axis_off()
            axes.imshow(image, cmap="gray", interpolation="nearest", aspect="equal")
            axes.set_title(caption, fontsize=7, y=-0.02, va="top", pad=0)
    height = 0.17 * len(classes)
    axes = figure.add_axes(_inches((1.3, 0.4, _WIDTH - 1.4, height), total))
    _count_bars(axes, preview, classes)
    return _saved(figure, path)


def _inches(box: Box, height: float) -> Box:
    left, bottom, wide, high = box
    return left / _WIDTH, bottom / height, wide / _WIDTH, high / height


def _seen(example: Example, channels: ChannelSet) -> tuple[np.ndarray, str]:
    caption = f"{_clipped(example.class_name)}\n{_clipped(Path(example.name).name)}"
    return picture_of(example.image, channels), caption


def _clipped(text: str, most: int = 20) -> str:
    half = most // 2 - 1
    return text if len(text) <= most else f"{text[:half]}..{text[-half:]}"


def _plane(image: Tensor, place: int, label: str) -> tuple[np.ndarray, str]:
    plane, name = image[place].numpy(), f"{place + 1} {label}"
    if np.isnan(plane).all():
        return np.zeros_like(plane), f"{name}\nabsent"
    return plane, f"{name}\n{np.nanmin(plane):.3g} to {np.nanmax(plane):.3g}"


def _count_bars(axes: Axes, preview: Preview, classes: Sequence[str]) -> None:
    left, labels = np.zeros(len(classes)), [_clipped(name) for name in _class_labels(classes)]
    for colour, (split, counts) in zip(COLOURS, preview.counts.items(), strict=False):
        widths = np.array([counts[name] for name in classes])
        axes.barh(range(len(classes)), widths, left=left, color=colour, label=split)
        left += widths
    axes.set_yticks(range(len(classes)), labels)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, loc="lower right")
    axes.set_xlabel("images of a class", fontsize=7)

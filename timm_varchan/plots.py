"""Every picture, drawn without pyplot: no global state, no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.evaluation import SetResult, summarise_sizes
from timm_varchan.models import share
from timm_varchan.stems import Stem

__all__ = ["COLOURS", "plot_channel_sets", "plot_curves", "plot_stem"]

#: Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")
#: With more channel sets than this, the picture shows sizes instead of sets.
MAX_BARS = 40
#: Kernels shown of each channel: those with the largest weights in the kernel bank.
NUM_KERNELS = 6


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
    figure = _figure(13.5 if len(sets) > 1 else 9, 3.6)
    epochs = [entry["epoch"] + 1 for entry in history]
    panels = figure.subplots(1, 3 if len(sets) > 1 else 2)
    for axes, what in zip(panels, ("loss", "accuracy"), strict=False):
        for colour, (key, label) in zip(
            COLOURS, (("train", "training"), ("eval", "validation")), strict=False
        ):
            factor = 100 if what == "accuracy" else 1
            values = [factor * entry[f"{key}_{what}"] for entry in history]
            axes.plot(epochs, values, color=colour, label=label, marker="o", markersize=3)
        axes.set_ylabel("accuracy (%)" if what == "accuracy" else "cross entropy")
    for number, name in enumerate(sets if len(sets) > 1 else ()):
        colour, style = COLOURS[number % len(COLOURS)], _STYLES[number // len(COLOURS) % 3]
        values = [100 * entry["eval_sets"][name] for entry in history]
        panels[2].plot(epochs, values, style, color=colour, label=name, marker="o", markersize=3)
        panels[2].set_ylabel("validation accuracy by channels (%)")
    for axes in panels:
        axes.set_xlabel("epoch")
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
        UserError: No results.
    """
    if not results:
        raise UserError("There are no channel sets to draw.")
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
            color=COLOURS[number % len(COLOURS)], label=f"{mode}, {order}",
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
            yerr=[100 * s.std for s in chosen], color=COLOURS[number % len(COLOURS)],
            marker="o", markersize=4, capsize=2, label=f"{mode}, {order}",
        )  # fmt: skip
    axes.set_xlabel("number of channels")
    axes.set_ylabel("accuracy (%), mean and deviation over sets")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)


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
    wanted = [ChannelSet.parse(s) for s in sets] if sets else _default_sets(whole)
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
    figure.savefig(path, dpi=150)
    return Path(path)


def _default_sets(whole: ChannelSet) -> list[ChannelSet]:
    """All channels, and up to three sets with one less."""
    return [whole, *(whole.subsets(len(whole) - 1)[:3] if len(whole) > 1 else [])]


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

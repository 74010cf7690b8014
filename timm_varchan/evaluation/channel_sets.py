"""What a classifier keeps on every subset of the channels, named and anonymous, in any order."""

from __future__ import annotations

import statistics as stdlib_statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import unwrap_model
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.evaluation.metrics import Estimate, classification_metrics
from timm_varchan.models import has_stems, set_channels, share, stems
from timm_varchan.views import MAX_SETS, MODES, ORDERS, SetView, choose_sets

__all__ = [
    "SetResult",
    "SizeSummary",
    "default_modes",
    "evaluate_channel_sets",
    "has_stems",
    "predict_channel_sets",
    "summarise_sizes",
]


@dataclass(frozen=True)
class SetResult:
    """The metrics on one channel set.

    Args:
        channels: The set as text, such as `RG`.
        indices: Positions of its planes in the data.
        mode: Key of `MODES`.
        order: One of `ORDERS`.
        num_images: How many images.
        metrics: By name, with 95 % intervals.
        predictions: Predicted class of every image, for `paired_difference`; not in `to_json`.
        references: True class of every image; not in `to_json`.
    """

    channels: str
    indices: tuple[int, ...]
    mode: str
    order: str
    num_images: int
    metrics: Mapping[str, Estimate]
    predictions: np.ndarray = field(repr=False, compare=False)
    references: np.ndarray = field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """How many channels."""
        return len(self.indices)

    @property
    def correct(self) -> np.ndarray:
        """Whether each image was classified correctly."""
        return self.predictions == self.references

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return {
            "channels": self.channels,
            "indices": list(self.indices),
            "size": self.size,
            "mode": self.mode,
            "order": self.order,
            "num_images": self.num_images,
            **{name: estimate._asdict() for name, estimate in self.metrics.items()},
        }


@dataclass(frozen=True)
class SizeSummary:
    """Accuracy over all evaluated sets of one size.

    Args:
        size: How many channels.
        mode: Key of `MODES`.
        order: One of `ORDERS`.
        num_sets: Sets of this size that were evaluated.
        mean: Mean accuracy over them.
        std: Standard deviation over them: the spread between channels, not between seeds.
        worst: Lowest accuracy.
        worst_set: Where it is.
    """

    size: int
    mode: str
    order: str
    num_sets: int
    mean: float
    std: float
    worst: float
    worst_set: str


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode and channels of before."""
    training = model.training
    channels = stems(model)[0].channels if has_stems(model) else None
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if has_stems(model):
            set_channels(model, channels)


def _predict(
    model: nn.Module,
    x: Tensor,
    views: Sequence[SetView],
    positions: range,
    own: Mapping[tuple[str, str], nn.Module],
) -> list[Tensor]:
    """The predicted classes `(B,)` of each view of a batch."""
    done: dict[tuple[tuple[int, ...], str, str], Tensor] = {}
    rows = []
    for view in views:
        # A single plane has one order: not computed twice.
        key = (view.indices, view.mode, view.order if len(view.indices) > 1 else "any")
        if key not in done:
            target = own.get((str(view.channel_set), view.mode), model)
            done[key] = MODES[view.mode](target, x, view, positions).argmax(-1)
        rows.append(done[key])
    return rows


def predict_channel_sets(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    views: Sequence[SetView],
    *,
    accelerator: Accelerator | None = None,
    statistics: Mapping[tuple[str, str], Mapping[str, Tensor]] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The predictions of every view, with every batch loaded once.

    Args:
        model: As `evaluate_channel_sets` takes it.
        loader: Likewise.
        views: What to predict.
        accelerator: Gathers over the processes.
        statistics: BatchNorm buffers by channel set and mode.

    Returns:
        Predicted classes `(images, views)` and true classes `(images,)`, on every process.

    Raises:
        UserError: No batches.
    """
    rank, num_ranks = (
        (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    )
    device = next(model.parameters()).device
    own = {
        key: share(unwrap_model(model), statistics=buffers)
        for key, buffers in (statistics or {}).items()
    }
    gathered: list[Tensor] = []
    batch_size = 0
    with _as_it_was(model), torch.no_grad():
        for twin in own.values():
            twin.eval()
        for number, (x, labels) in enumerate(loader):
            batch_size = batch_size or len(x)
            start = (number * num_ranks + rank) * batch_size
            positions = range(start, start + len(x))
            x = x.to(device)
            rows = _predict(model, x, views, positions, own)
            table = torch.stack([*rows, labels.to(device)], dim=1)
            gathered.append((accelerator.gather_for_metrics(table) if accelerator else table).cpu())
    if not gathered:
        raise UserError("There are no images to evaluate on: the loader is empty.")
    whole = torch.cat(gathered).numpy()
    return whole[:, :-1], whole[:, -1]


def default_modes(model: nn.Module, channels: ChannelSet) -> tuple[str, ...]:
    """The modes in which a model can meet these channels."""
    if not has_stems(model):
        return ("mask",)
    return ("anonymous",) if channels.is_anonymous else ("named", "anonymous")


def evaluate_channel_sets(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    channels: ChannelSet,
    *,
    num_classes: int,
    accelerator: Accelerator | None = None,
    modes: Sequence[str] | None = None,
    orders: Sequence[str] = ORDERS,
    max_sets: int = MAX_SETS,
    seed: int = 0,
    statistics: Mapping[tuple[str, str], Mapping[str, Tensor]] | None = None,
) -> list[SetResult]:
    """Evaluate a classifier on every subset of the channels.

    Args:
        model: `(B, C, H, W) -> (B, num_classes)`, prepared or not; its channels and mode are the
            same afterwards.
        loader: Yields normalised batches with all channels, and labels; not shuffled. Several
            processes need it prepared by the accelerator, in batches of one size.
        channels: What the planes are.
        num_classes: How many classes there are.
        accelerator: Gathers over the processes, so that each returns the result of one.
        modes: Keys of `MODES`; by default `named` (where the channels have identity) and
            `anonymous` for a model with stems, else `mask`.
        orders: Which of `ORDERS`.
        max_sets: See `choose_sets`.
        seed: Of permutations, sampled sets and intervals.
        statistics: BatchNorm buffers for some sets: by `(str(set), mode)`, from
            `channel_statistics`.

    Returns:
        A result for every set, mode and order, largest sets first.

    Raises:
        UserError: Unknown modes or orders, no images.
    """
    modes = default_modes(model, channels) if modes is None else modes
    for given, known, what in ((modes, MODES, "mode"), (orders, ORDERS, "order")):
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise UserError(f"Unknown {what} {unknown}. Choose from: {', '.join(known)}.")
    views = [
        SetView(channels, indices, mode, order, seed)
        for indices in choose_sets(channels, max_sets=max_sets, seed=seed)
        for mode in modes
        for order in orders
    ]
    predictions, references = predict_channel_sets(
        model, loader, views, accelerator=accelerator, statistics=statistics
    )
    return [
        SetResult(
            channels=str(view.channel_set),
            indices=view.indices,
            mode=view.mode,
            order=view.order,
            num_images=len(references),
            metrics=classification_metrics(predicted, references, num_classes, seed=seed),
            predictions=predicted,
            references=references,
        )
        for view, predicted in zip(views, predictions.T, strict=True)
    ]


def summarise_sizes(results: Sequence[SetResult]) -> list[SizeSummary]:
    """Mean and spread of the accuracy over the sets of each size, for each mode and order."""
    groups: dict[tuple[int, str, str], list[SetResult]] = {}
    for result in results:
        groups.setdefault((result.size, result.mode, result.order), []).append(result)
    summaries = []
    for (size, mode, order), group in groups.items():
        values = [result.metrics["accuracy"].value for result in group]
        worst = min(group, key=lambda result: result.metrics["accuracy"].value)
        summaries.append(
            SizeSummary(
                size, mode, order, len(group), stdlib_statistics.fmean(values),
                stdlib_statistics.pstdev(values), min(values), worst.channels,
            )
        )  # fmt: skip
    return summaries

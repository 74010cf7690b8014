"""How a classifier does on channel sets: after every epoch, and at the end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import unwrap_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from timm_varchan.channels import ANONYMOUS, ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.evaluation.metrics import NO_CLASS, Estimate
from timm_varchan.evaluation.sets import DEFAULT_BUDGET, PlannedSet, plan_sets, set_label
from timm_varchan.models import has_stems, set_channels, share, stems
from timm_varchan.views import MODES, ORDERS, SetView

#: BatchNorm buffers for some sets, by the positions of their planes and the mode.
BatchNormBuffers = Mapping[tuple[tuple[int, ...], str], Mapping[str, Tensor]]
Loader = Iterable[tuple[Tensor, Tensor]]

#: All subsets of so many channels are also evaluated shuffled, of a model of a fixed count.
_FEW_CHANNELS = 3
#: Images that one forward pass on an accelerator may take, over several sets of a batch.
STACKED_IMAGES = 1024
#: Images of the first batch that the equality of all orders is checked on.
_CHECKED_IMAGES = 16
#: Largest difference between orders, relative to the largest logit, that counts as rounding.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class SetResult:
    """The metrics on one channel set.

    Args:
        channels: The set as text, such as `RG`; no other set of the data has it.
        indices: Positions of its planes in the data.
        mode: Key of `MODES`.
        order: One of `ORDERS`.
        num_images: How many images.
        metrics: By name, with 95 % intervals.
        predictions: Predicted class of every image; `NO_CLASS` where its logits are not finite.
        probabilities: Of the predicted classes, 0..1; NaN likewise.
        references: True class of every image. None of these three is in `to_json`.
        name: What people call the set: `RGB`, `without B10`.
        kind: Why it is evaluated; see `PlannedSet`.
    """

    channels: str
    indices: tuple[int, ...]
    mode: str
    order: str
    num_images: int
    metrics: Mapping[str, Estimate]
    predictions: np.ndarray = field(repr=False, compare=False)
    probabilities: np.ndarray = field(repr=False, compare=False)
    references: np.ndarray = field(repr=False, compare=False)
    name: str
    kind: str

    @property
    def size(self) -> int:
        """How many channels."""
        return len(self.indices)

    @property
    def accuracy(self) -> float:
        """Fraction of the images that were classified correctly."""
        return self.metrics["accuracy"].value

    @property
    def correct(self) -> np.ndarray:
        """Whether each image was classified correctly."""
        return self.predictions == self.references

    @property
    def num_not_finite(self) -> int:
        """Images of which a logit is not finite; they count as wrong."""
        return int((self.predictions == NO_CLASS).sum())

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        plain = (
            "name",
            "channels",
            "size",
            "kind",
            "mode",
            "order",
            "num_images",
            "num_not_finite",
        )
        metrics = {name: estimate._asdict() for name, estimate in self.metrics.items()}
        values = {name: getattr(self, name) for name in plain}
        return {**metrics, **values, "indices": list(self.indices)}


class OrderCheck(NamedTuple):
    """How far the logits of some images move when their planes come in another order.

    Args:
        num_images: How many images were checked, with all channels.
        difference: Largest absolute difference of a logit.
        scale: Largest absolute logit.
    """

    num_images: int
    difference: float
    scale: float

    @property
    def equal(self) -> bool:
        """Whether there is no difference but rounding."""
        return self.difference <= _ROUNDING * self.scale


class Evaluation(tuple[SetResult, ...]):
    """The results of all sets, largest sets first."""

    #: Forward passes over the data that they took.
    num_passes: int = 0
    #: For a model with a stem, in place of shuffled results.
    order_check: OrderCheck | None = None


class Validation(NamedTuple):
    """What an epoch came to.

    Args:
        loss: Mean cross entropy on all channels, of the images whose logits are finite.
        accuracy: On all channels; logits that are not finite are wrong.
        sets: Accuracy by the name of the set, all channels first.
        num_not_finite: Images by the name of the set, of which a logit is not finite; only sets
            that have some.
    """

    loss: float = math.nan
    accuracy: float = math.nan
    sets: Mapping[str, float] = {}
    num_not_finite: Mapping[str, int] = {}


def default_modes(model: nn.Module, channels: ChannelSet) -> tuple[str, ...]:
    """How a model meets these channels: as it was told last, which is how training left it."""
    if not has_stems(model):
        return ("mask",)
    current = stems(model)[0].channels
    return ("anonymous",) if channels.is_anonymous or current == ANONYMOUS else ("named",)


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


class _Predictor:
    """Predicts the views of a batch, as many of a mode in one forward pass as memory allows."""

    def __init__(
        self, model: nn.Module, views: Sequence[SetView], bn_buffers: BatchNormBuffers
    ) -> None:
        self.model = model
        self.stacked = _stack_size(next(model.parameters()).device)
        self.own = {
            key: share(unwrap_model(model), bn_buffers=buffers).eval()
            for key, buffers in bn_buffers.items()
        }
        # A single plane has one order: not computed twice.
        self.keys = [(v.indices, v.mode, v.order if len(v.indices) > 1 else "any") for v in views]
        self.views = dict(zip(self.keys, views, strict=True))
        runs = itertools.groupby(self.views.items(), lambda item: self._stack(*item))
        self.runs = [list(run) for _, run in runs]

    def _stack(self, key: Any, view: SetView) -> Any:
        """What is equal for neighbours that one forward pass can take."""
        alone = (view.indices, view.mode) in self.own or view.order != "in order"
        return key if alone or view.mode not in ("named", "anonymous") else view.mode

    def __call__(self, x: Tensor, positions: range, bar: Any) -> list[Tensor]:
        """The logits `(B, classes)` of each view."""
        done: dict[Any, Tensor] = {}
        for waiting in self.runs:
            while waiting:
                part = waiting[: max(1, self.stacked // len(x))]
                try:
                    logits = self._forward(x, [view for _, view in part], positions)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                    self.stacked = len(part) // 2 * len(x)
                    continue
                done |= zip((key for key, _ in part), logits, strict=True)
                waiting = waiting[len(part) :]
                bar.update(len(part))
        return [done[key] for key in self.keys]

    def _forward(self, x: Tensor, views: list[SetView], positions: range) -> list[Tensor]:
        view = views[0]
        if len(views) == 1:
            target = self.own.get((view.indices, view.mode), self.model)
            return [MODES[view.mode](target, x, view, positions)]
        channels = view.channels
        present = torch.zeros(len(views), len(channels), dtype=torch.bool, device=x.device)
        for row, part in enumerate(views):
            present[row, list(part.indices)] = True
        channels_of_view = channels if view.mode == "named" else ChannelSet.anonymous(len(channels))
        set_channels(self.model, channels_of_view, present=present.repeat_interleave(len(x), 0))
        return list(self.model(x.repeat(len(views), 1, 1, 1)).split(len(x)))


def _stack_size(device: torch.device) -> int:
    """Images of several sets in one forward pass: on a CPU a larger batch is not faster."""
    return 0 if device.type == "cpu" else STACKED_IMAGES


class _Predictions(NamedTuple):
    """Predicted classes, their probabilities `(N, views)`; true classes, losses `(N,)`."""

    classes: np.ndarray
    probabilities: np.ndarray
    references: np.ndarray
    losses: np.ndarray
    num_passes: int
    order_check: OrderCheck | None


def predicted_classes(logits: Tensor) -> Tensor:
    """The predicted classes `(B,)` of logits `(B, classes)`, `NO_CLASS` where one is not finite."""
    return logits.argmax(-1).masked_fill(~logits.isfinite().all(-1), NO_CLASS)


@torch.no_grad()
def _predict(
    model: nn.Module,
    loader: Loader,
    views: Sequence[SetView],
    *,
    accelerator: Accelerator | None = None,
    bn_buffers: BatchNormBuffers | None = None,
    validating: bool = False,
    check_order: bool = False,
    progress: str | None = None,
) -> _Predictions:
    """Predict every view, with every batch loaded once; the same on every process.

    Validating, the forward passes are in the precision of training.
    """
    rank, num_ranks = (
        (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    )
    device = next(model.parameters()).device
    precision = accelerator.autocast if accelerator and validating else nullcontext
    tables: list[tuple[Tensor, Tensor]] = []
    checked: OrderCheck | None = None
    batch_size = 0
    predictor = _Predictor(model, views, bn_buffers or {})
    with _as_it_was(model), _bar(loader, len(predictor.views), progress) as bar:
        for number, (x, labels) in enumerate(loader):
            batch_size = batch_size or len(x)
            start = (number * num_ranks + rank) * batch_size
            x, labels = x.to(device), labels.to(device)
            with precision():
                logits = predictor(x, range(start, start + len(x)), bar)
                if check_order and not number:
                    checked = _check_order(model, x[:_CHECKED_IMAGES], views[0])
            found = _table(logits, labels, validating)
            tables.append(accelerator.gather_for_metrics(found) if accelerator else found)
    if not tables:
        raise UserError("There are no images to evaluate on: the loader is empty.")
    classes, numbers = (torch.cat(parts).cpu().numpy() for parts in zip(*tables, strict=True))
    return _Predictions(
        classes[:, 1:], numbers[:, 1:], classes[:, 0], numbers[:, 0], len(predictor.views), checked
    )


def _table(logits: Sequence[Tensor], labels: Tensor, loss: bool) -> tuple[Tensor, Tensor]:
    """Labels and predicted classes; loss of the first view (or its class) and probabilities."""
    classes = [labels, *map(predicted_classes, logits)]
    first = logits[0].float()
    numbers = [F.cross_entropy(first, labels, reduction="none") if loss else classes[1].float()]
    numbers += [view.float().softmax(-1).amax(-1) for view in logits]
    return torch.stack(classes, 1), torch.stack(numbers, 1)


def _bar(loader: Loader, views: int, progress: str | None) -> Any:
    """A bar of the sets done; each batch does a part of every set. None hides it."""
    batches = len(loader) if isinstance(loader, Sized) else 0
    done = "{n:.0f}/{total:.0f} [{bar}] {elapsed}, {remaining} left" if batches else "{elapsed}"
    return tqdm(
        total=views * batches or None, desc=progress, disable=progress is None, leave=False,
        unit_scale=1 / batches if batches else False, bar_format="{desc}: " + done,
    )  # fmt: skip


def _check_order(model: nn.Module, x: Tensor, view: SetView) -> OrderCheck:
    """Compare the logits of some images with those of their planes in the reverse order."""
    channels_in = view.channels.take if view.mode == "named" else lambda order: ANONYMOUS
    answers = []
    for order in (view.indices, view.indices[::-1]):
        set_channels(model, channels_in(order))
        answers.append(model(x[:, order]).float())
    finite = answers[0].isfinite().all(-1)
    if not finite.any():
        return OrderCheck(0, 0.0, 0.0)
    expected, other = (answer[finite] for answer in answers)
    gap = (other - expected).abs().max().nan_to_num(math.inf)
    return OrderCheck(len(expected), float(gap), float(expected.abs().max()))


def predict_channel_sets(
    model: nn.Module,
    loader: Loader,
    views: Sequence[SetView],
    bn_buffers: BatchNormBuffers | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The predictions of every view, with every batch loaded once.

    The arguments are those of `evaluate_channel_sets`.

    Returns:
        Predicted classes `(images, views)`, `NO_CLASS` where a logit is not finite, and true
        classes `(images,)`.
    """
    found = _predict(model, loader, views, bn_buffers=bn_buffers)
    return found.classes, found.references


def validate_channel_sets(
    model: nn.Module,
    loader: Loader,
    channels: ChannelSet,
    sets: Sequence[PlannedSet],
    mode: str,
    *,
    accelerator: Accelerator | None = None,
) -> Validation:
    """Loss and accuracies of a model in training; its channels and mode are the same afterwards.

    The arguments are those of `evaluate_channel_sets`, all channels first in `sets`; the forward
    passes are in the accelerator's precision.
    """
    views = [SetView(channels, planned.indices, mode, "in order") for planned in sets]
    found = _predict(model, loader, views, accelerator=accelerator, validating=True)
    right = (found.classes == found.references[:, None]).mean(0)
    missing = (found.classes == NO_CLASS).sum(0)
    finite = found.losses[found.classes[:, 0] != NO_CLASS]
    names = [planned.name for planned in sets]
    return Validation(
        loss=float(finite.mean()) if len(finite) else math.nan,
        accuracy=float(right[0]),
        sets={name: float(value) for name, value in zip(names, right, strict=True)},
        num_not_finite={n: int(count) for n, count in zip(names, missing, strict=True) if count},
    )


def evaluate_channel_sets(
    model: nn.Module,
    loader: Loader,
    channels: ChannelSet,
    *,
    num_classes: int,
    accelerator: Accelerator | None = None,
    modes: Sequence[str] | None = None,
    orders: Sequence[str] | None = None,
    sets: str | int | Sequence[PlannedSet] = "default",
    seed: int = 0,
    bn_buffers: BatchNormBuffers | None = None,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a classifier on channel sets.

    Args:
        model: `(B, C, H, W) -> (B, num_classes)`, prepared or not; its channels and mode are the
            same afterwards.
        loader: Yields normalised batches with all channels, and labels; not shuffled. Several
            processes need it prepared by the accelerator, in batches of one size.
        channels: What the planes are.
        num_classes: How many classes there are.
        accelerator: Gathers over the processes, so that each returns the result of one.
        modes: Keys of `MODES`; by default as the model was told its channels last (`named` or
            `anonymous`), and `mask` for a model without a stem.
        orders: Which of `ORDERS`. By default in order; a model of a fixed count is also given all
            channels shuffled (up to three channels: every set), and for a stem, which is equal in
            any order by construction, the first batch checks that it is.
        sets: What `plan_sets` takes, or its answer.
        seed: Of permutations, sampled sets and intervals.
        bn_buffers: BatchNorm's buffers for some sets, from `estimate_bn_buffers`: by the positions
            of their planes and the mode.
        progress: Whether to show a bar.

    Returns:
        A result for every set, mode and order, largest sets first.

    Raises:
        UserError: Unknown modes or orders, no images.
    """
    modes = default_modes(model, channels) if modes is None else modes
    for given, choices, what in ((modes, MODES, "mode"), (orders, ORDERS, "order")):
        unknown = [name for name in given or () if name not in choices]
        if unknown or (given is not None and not given):
            raise UserError(f"Unknown {what} {unknown}. Choose from: {', '.join(choices)}.")
    fixed = not has_stems(model)
    if isinstance(sets, (str, int)):
        sets = plan_sets(channels, sets, seed=seed, budget=DEFAULT_BUDGET - int(fixed))
    rows = [
        (planned, SetView(channels, planned.indices, mode, order, seed))
        for planned in sets
        for mode in modes
        for order in (_orders(planned, len(channels), fixed) if orders is None else orders)
    ]
    found = _predict(
        model, loader, [view for _, view in rows],
        accelerator=accelerator, bn_buffers=bn_buffers,
        check_order=not fixed and orders is None and len(channels) > 1,
        progress=f"evaluating {len(sets)} channel sets" if progress else None,
    )  # fmt: skip
    from timm_varchan.evaluation.evaluate_module import ChannelSetMetrics  # slow to import

    metrics = ChannelSetMetrics()
    results = []
    for (planned, view), classes, probabilities in zip(
        rows, found.classes.T, found.probabilities.T, strict=True
    ):
        values = metrics.compute(
            predictions=classes, references=found.references, num_classes=num_classes, seed=seed
        )
        results.append(
            SetResult(
                set_label(channels, view.indices), view.indices, view.mode, view.order,
                len(classes), values, classes, probabilities, found.references,
                planned.name, planned.kind,
            )
        )  # fmt: skip
    evaluation = Evaluation(results)
    evaluation.num_passes, evaluation.order_check = found.num_passes, found.order_check
    return evaluation


def _orders(planned: PlannedSet, count: int, fixed: bool) -> tuple[str, ...]:
    """The orders that tell something of a set: a stem gives the same answer in any."""
    has_orders = planned.kind == "all" or count <= _FEW_CHANNELS
    return ORDERS if fixed and has_orders else ORDERS[:1]

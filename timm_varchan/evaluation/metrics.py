"""Classification metrics that work offline, with 95 % intervals, and paired comparisons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse, stats
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from timm_varchan.errors import UserError

__all__ = [
    "METRICS",
    "NO_CLASS",
    "Difference",
    "Estimate",
    "classification_metrics",
    "confusion_counts",
    "metric_values",
    "paired_difference",
    "wilson_interval",
]

#: The metrics of every result, in the order of the tables.
METRICS = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
#: In place of a predicted class where a logit is not a finite number: wrong, whatever the label.
NO_CLASS = -100
NUM_BOOTSTRAP_DRAWS = 1000
_BOOTSTRAP_CHUNK = 100  # draws at once: bounds the memory with many classes


class Estimate(NamedTuple):
    """A metric in 0..1 and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """Accuracy of a minus accuracy of b on the same images, its 95 % interval, and a p-value."""

    difference: float
    low: float
    high: float
    p: float


def metric_values(
    predictions: Sequence[int] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    num_classes: int,
) -> dict[str, float]:
    """The metrics of `METRICS` by name, without intervals."""
    precision, recall, f1, _ = precision_recall_fscore_support(
        references, predictions, labels=range(num_classes), average="macro", zero_division=0
    )
    values = (accuracy_score(references, predictions), precision, recall, f1)
    return {name: float(value) for name, value in zip(METRICS, values, strict=True)}


def confusion_counts(
    predictions: np.ndarray, references: np.ndarray, num_classes: int
) -> np.ndarray:
    """Images by true and predicted class, `(classes, classes + 1)`: the last have no answer."""
    labels = [*range(num_classes), NO_CLASS]
    return np.asarray(confusion_matrix(references, predictions, labels=labels)[:-1])


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion, also where it is 0 or 1.

    Source: Wilson, JASA 22 (1927), as SciPy has it.
    """
    if total < 1:
        raise UserError(f"A proportion needs at least one image, not {total}.")
    found = stats.binomtest(successes, total).proportion_ci(method="wilson")
    share = successes / total
    # Rounding must not put the estimate outside its own interval.
    return min(float(found.low), share), max(float(found.high), share)


def _bootstrap(counts: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Macro precision, recall and f1 of resampled confusion matrices, `(draws, 3)` at a time.

    The counts have a row for each class and a last column for images without an answer.
    """
    true, predicted = np.nonzero(counts)
    cells = counts[true, predicted]
    num_cells, num_classes = len(cells), len(counts)
    rows = np.arange(num_cells)
    of_true = sparse.csr_array((np.ones(num_cells), (rows, true)), (num_cells, num_classes))
    of_predicted = sparse.csr_array(
        (np.ones(num_cells), (rows, predicted)), (num_cells, num_classes + 1)
    )[:, :num_classes]
    hits = sparse.csr_array(
        ((true == predicted).astype(float), (rows, true)), (num_cells, num_classes)
    )
    rng = np.random.default_rng(seed)
    for _ in range(0, NUM_BOOTSTRAP_DRAWS, _BOOTSTRAP_CHUNK):
        drawn = rng.multinomial(cells.sum(), cells / cells.sum(), size=_BOOTSTRAP_CHUNK)
        hit, support, guessed = drawn @ hits, drawn @ of_true, drawn @ of_predicted
        precision = np.divide(hit, guessed, out=np.zeros_like(hit), where=guessed > 0)
        recall = np.divide(hit, support, out=np.zeros_like(hit), where=support > 0)
        both = support + guessed
        f1 = np.divide(2 * hit, both, out=np.zeros_like(hit), where=both > 0)
        yield np.stack([precision.mean(1), recall.mean(1), f1.mean(1)], axis=1)


def classification_metrics(
    predictions: Sequence[int] | np.ndarray,
    references: Sequence[int] | np.ndarray,
    num_classes: int,
    *,
    seed: int = 0,
) -> dict[str, Estimate]:
    """The metrics of `METRICS` with 95 % intervals.

    Args:
        predictions: Predicted class of every image; `NO_CLASS` is wrong, and no class's guess.
        references: True class of every image.
        num_classes: How many classes there are, also those that no image has.
        seed: Of the bootstrap.

    Returns:
        By name: the Wilson interval for accuracy, for macro means the percentile interval of 1,000
        resampled confusion matrices (widened to hold the estimate where it is at an end).

    Raises:
        UserError: No images, or classes outside `range(num_classes)`.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if not len(references) or len(references) != len(predictions):
        raise UserError(
            f"{len(predictions)} predictions came for {len(references)} labels; give one of each "
            f"for at least one image."
        )
    classes = np.concatenate([predictions[predictions != NO_CLASS], references])
    outside = classes[(classes < 0) | (classes >= num_classes)]
    if outside.size:
        raise UserError(
            f"Class {outside[0]} is outside the {num_classes} classes; raise num_classes."
        )
    values = metric_values(predictions, references, num_classes)
    counts = confusion_counts(predictions, references, num_classes)
    draws = np.concatenate(list(_bootstrap(counts, seed)))
    low, high = np.quantile(draws, (0.025, 0.975), axis=0)
    intervals = [wilson_interval(int(np.trace(counts)), len(references))]
    intervals += [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return {
        name: Estimate(values[name], min(low, values[name]), max(high, values[name]))
        for name, (low, high) in zip(METRICS, intervals, strict=True)
    }


def paired_difference(
    correct_a: Sequence[bool] | np.ndarray, correct_b: Sequence[bool] | np.ndarray
) -> Difference:
    """Compare two models, or one on two channel sets, image by image.

    The interval of Agresti and Min, Statistics in Medicine 24 (2005): Wald's after half an image is
    added to every cell. It holds its level where few images differ, which the interval of the
    binomial among those alone does not: their number is itself by chance. The test is McNemar's
    exact one; of shares its normal form.

    Args:
        correct_a: Whether a was right, one value an image; or in which share of several channel
            sets or seeds, in 0..1.
        correct_b: Whether b was, on the same images in the same order.

    Returns:
        The difference in accuracy (a - b), its 95 % interval and the two-sided p-value.

    Raises:
        UserError: No images, different numbers of them, or values outside 0..1.
    """
    a, b = np.asarray(correct_a, dtype=float), np.asarray(correct_b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UserError(
            f"Shapes {a.shape} and {b.shape} cannot be paired; give one value an image for the "
            f"same images in the same order."
        )
    both = np.stack([a, b])
    if not ((both >= 0) & (both <= 1)).all():
        raise UserError("Whether an image was right is a value in 0..1; others came.")
    total, squares = float((a - b).sum()), float(((a - b) ** 2).sum())
    n = a.size + 2
    centre, difference = total / n, total / a.size
    error = np.sqrt(squares + 1 - total**2 / n) / n
    low, high = stats.norm.interval(0.95, centre, error)
    if not squares:
        p = 1.0
    elif np.isin(both, (0, 1)).all():
        p = float(stats.binomtest(int((a > b).sum()), int(squares)).pvalue)
    else:
        p = float(2 * stats.norm.sf(abs(total) / np.sqrt(squares)))
    # Shrunk towards 0, so that the estimate may lie outside near -1 and 1.
    low, high = max(-1.0, min(low, difference)), min(1.0, max(high, difference))
    return Difference(difference, float(low), float(high), p)

"""The answers of a model, saved beside its results, and their comparison with another model's."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from timm_varchan.channels import ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.evaluation.evaluate import SetResult
from timm_varchan.evaluation.metrics import (
    Difference,
    Estimate,
    paired_difference,
    wilson_interval,
)
from timm_varchan.evaluation.sets import set_label

logger = logging.getLogger(__name__)

#: Name of the file in the folder of a run.
PREDICTIONS = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """What a model answered on each image with each channel set.

    Args:
        model: What to call it.
        class_names: In the order of the class numbers.
        sets: The channels of every set, each a text.
        variants: Mode and order of every set.
        classes: Predicted classes `(images, sets)`, `NO_CLASS` where there is no answer.
        probabilities: Of the predicted classes, `(images, sets)`, 0..1.
        references: True classes `(images,)`.
        fingerprint: A number for the content of every image; empty where nobody took one.
    """

    model: str
    class_names: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...]
    variants: tuple[tuple[str, str], ...]
    classes: np.ndarray = field(repr=False)
    probabilities: np.ndarray = field(repr=False)
    references: np.ndarray = field(repr=False)
    fingerprint: np.ndarray = field(repr=False)

    @classmethod
    def of(
        cls,
        results: Sequence[SetResult],
        channels: ChannelSet,
        *,
        class_names: Sequence[str],
        model: str = "",
        fingerprint: Sequence[int] | np.ndarray = (),
    ) -> Predictions:
        """The answers in results of `evaluate_channel_sets`; `channels` are those of the data."""
        return cls(
            model,
            tuple(class_names),
            tuple(tuple(set_label(channels, (i,)) for i in result.indices) for result in results),
            tuple((result.mode, result.order) for result in results),
            np.stack([result.predictions for result in results], 1).astype(np.int32),
            np.stack([result.probabilities for result in results], 1).astype(np.float32),
            results[0].references.astype(np.int32),
            np.asarray(fingerprint, np.uint64),
        )

    def save(self, path: str | Path) -> Path:
        """Write them as a compressed `.npz`; the path."""
        about = {name: getattr(self, name) for name in _ABOUT}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with open(path, "wb") as file:
            np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read what `save` wrote.

        Args:
            path: The file, the folder of a run, or the folder of its model.

        Raises:
            UserError: There are none, or the file is broken.
        """
        places = [Path(path), Path(path) / PREDICTIONS, Path(path).parent / PREDICTIONS]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            raise UserError(
                f"There are no predictions in {path}. Give the folder of a run, or evaluate that "
                f"model first: timm-varchan evaluate MODEL --output FOLDER."
            )
        try:
            with np.load(file) as stored:
                about = json.loads(str(stored["about"]))
                arrays = {name: stored[name] for name in _ARRAYS}
            return cls(
                about["model"],
                tuple(about["class_names"]),
                tuple(map(tuple, about["sets"])),
                tuple(map(tuple, about["variants"])),
                **arrays,
            )
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} holds no predictions ({error}). Evaluate anew.") from error

    def check(
        self,
        class_names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        fingerprint: Sequence[int] | np.ndarray = (),
    ) -> None:
        """Refuse a comparison with answers to images of these classes, labels and fingerprint.

        Raises:
            UserError: Other images or classes.
        """
        same = np.array_equal(self.references, labels)
        if len(fingerprint) and len(self.fingerprint):
            same &= np.array_equal(self.fingerprint, fingerprint)
        if not same or self.class_names != tuple(class_names):
            raise UserError(
                f"The predictions of {self.model or 'the baseline'} are of other "
                f"{'classes' if same else 'images'}. Evaluate both models on the same images and "
                f"classes."
            )

    def right(self, column: int) -> np.ndarray:
        """Whether each image was classified correctly with one set."""
        return np.asarray(self.classes[:, column] == self.references)


_ABOUT = ("model", "class_names", "sets", "variants")
_ARRAYS = ("classes", "probabilities", "references", "fingerprint")


class Compared(NamedTuple):
    """One channel set: the other model's accuracy, and ours minus theirs on the same images."""

    accuracy: Estimate
    difference: Difference


def compare_predictions(ours: Predictions, theirs: Predictions) -> dict[int, Compared]:
    """Compare two models image by image, on every channel set that both answered.

    Returns:
        By the number of our set; sets whose planes were shuffled are left out.

    Raises:
        UserError: Other images or classes.
    """
    theirs.check(ours.class_names, ours.references, ours.fingerprint)
    columns: dict[frozenset[str], int] = {}
    for column, (names, (_, order)) in enumerate(zip(theirs.sets, theirs.variants, strict=True)):
        if order == "in order":
            columns.setdefault(frozenset(names), column)
    found = {}
    for number, (names, (_, order)) in enumerate(zip(ours.sets, ours.variants, strict=True)):
        if frozenset(names) in columns and order == "in order":
            right = theirs.right(columns[frozenset(names)])
            estimate = Estimate(float(right.mean()), *wilson_interval(int(right.sum()), len(right)))
            found[number] = Compared(estimate, paired_difference(ours.right(number), right))
    if not found:
        asked = ", ".join("+".join(names) for names in theirs.sets[:3])
        logger.warning("%s answered other sets: %s. Name sets with --eval-sets.",
                       theirs.model, asked)  # fmt: skip
    return found

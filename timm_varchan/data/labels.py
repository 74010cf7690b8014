"""The labels of rows: as they are stored, as indices of classes, evenly chosen."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from timm_varchan.channels import seeded_rng
from timm_varchan.data.records import Files
from timm_varchan.errors import UserError

logger = logging.getLogger(__name__)


class StoredLabels(NamedTuple):
    """The labels of a split as they are stored.

    Args:
        values: One a row: text in one spelling, whole numbers, or None where there is none.
        names: The classes in their order, where a `ClassLabel` says it.
        are_numbers: Whether they are whole numbers without names.
    """

    values: Sequence[Any]
    names: tuple[str, ...] | None
    are_numbers: bool


def stored_labels(rows: Any, column: str) -> StoredLabels:
    """The labels of rows; those of a `ClassLabel` by name, where they are in its range.

    Raises:
        UserError: The column holds neither whole numbers nor names of classes.
    """
    if isinstance(rows, Files):
        numbers = any(isinstance(x, int) for x in rows.labels)
        values = rows.labels if numbers else _spelled(rows.labels, rows.are_names)
        return StoredLabels(values, None, numbers)
    feature = rows.features[column]
    dtype = str(getattr(feature, "dtype", None))
    if isinstance(feature, (list, tuple, datasets.Sequence, getattr(datasets, "List", tuple))):
        raise several_labels(f"The label column {column!r} holds {feature}")
    is_number = re.fullmatch(r"bool|u?int\d+", dtype) is not None
    if not is_number and dtype not in ("string", "large_string"):
        raise UserError(
            f"The label column {column!r} holds {feature}; it needs whole numbers from 0, or "
            f"text: measured numbers are no classes. Name the right one with --label-column."
        )
    values = rows.select_columns([column]).with_format(None)[:][column]
    if not isinstance(feature, datasets.ClassLabel):
        return StoredLabels(values if is_number else _spelled(values), None, is_number)
    names = tuple(_spelled(feature.names, True))
    named = dict(enumerate(names))
    return StoredLabels([named.get(v, v) for v in values], names, False)


def several_labels(what: str) -> UserError:
    """The error for labels of which an image has several."""
    return UserError(
        f"{what}: several labels an image. Only one class an image is served; name a column of "
        f"class names with --label-column."
    )


def _spelled(labels: Iterable[Any], are_names: bool = False) -> list[Any]:
    """Text labels in one form of Unicode; refused where they are no names of classes.

    Args:
        labels: As they are stored.
        are_names: Whether they are certainly names, as of folders.
    """
    counts = Counter(labels)
    plain = {x: x if x is None else unicodedata.normalize("NFC", x) for x in counts}
    names = {x for x in plain.values() if x is not None}
    if len(names) < len([x for x in plain if x is not None]):
        logger.warning(
            "Two spellings of one name (Unicode's NFC and NFD) are one class: %s",
            ", ".join(sorted(n for n, c in Counter(plain.values()).items() if c > 1 and n)),
        )
    alike = [n for n, c in Counter(n.strip().casefold() for n in names).items() if c > 1]
    if alike:
        logger.warning("Classes that differ in case or blanks alone: %s", ", ".join(sorted(alike)))
    if not are_names:
        _refuse_numbers_and_lists(names, sum(counts.values()))
    return [plain[x] for x in labels]


def _refuse_numbers_and_lists(names: set[str], num_rows: int) -> None:
    measured = [n for n in names if re.fullmatch(r"[+-]?(\d+\.\d*|\.\d+|\d+)(e[+-]?\d+)?", n, re.I)]
    if names and len(measured) == len(names) and not all(n.lstrip("+-").isdigit() for n in names):
        raise UserError(
            f"The labels are measured numbers ({', '.join(sorted(names)[:3])}, ...). Classes are "
            f"whole numbers or names, regression is not served: write classes, as dose_0.5."
        )
    for mark in "|;, ":
        joined = [n for n in names if mark in n]
        parts = Counter(part.strip() for n in joined for part in n.split(mark))
        of_names = [n for n in joined if all(part.strip() in names for part in n.split(mark))]
        if of_names or (
            mark != " " and len(joined) * 2 > len(names) and parts.total() > len(parts)
        ):
            raise several_labels(f"There is the label {min(of_names or joined)!r}")


def resolve_labels(
    labels: Mapping[str, StoredLabels], class_names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """Find the classes of a data set and the index of every label among them.

    Args:
        labels: By split; the first split decides about classes where nothing else does.
        class_names: The classes where they are known, in the order of the indices.

    Returns:
        The names of the classes, sorted where the data does not order them, and the indices of the
        labels, -1 for a label that is none. Numbers among classes whose names are all numbers go by
        name, else by position.

    Raises:
        UserError: Numbers with gaps; numbers in one split and names in another; one class only.
    """
    first = next(iter(labels.values()))
    names = first.names if class_names is None else tuple(class_names)
    names = _find_classes(first) if names is None else names
    of_number = _names_as_numbers(names)
    of_name = {unicodedata.normalize("NFC", name): i for i, name in enumerate(names)}
    numbers = [split for split, stored in labels.items() if stored.are_numbers]
    if of_number is None and numbers:
        if len(numbers) < len(labels):
            with_names = ", ".join(split for split in labels if split not in numbers)
            raise UserError(
                f"The labels of {', '.join(numbers)} are numbers, those of {with_names} are names "
                f"({', '.join(names[:3])}, ...). Write the same kind in all."
            )
        logger.warning(
            "The labels are numbers; they are taken as positions among the classes %s: 0 is %s.",
            ", ".join(names[:5]), names[0],
        )  # fmt: skip
        of_number = {i: i for i in range(len(names))}
    indices = {}
    for split, stored in labels.items():
        places: dict[Any, int] = (of_number or {}) if stored.are_numbers else of_name
        indices[split] = [places.get(value, -1) for value in stored.values]
    return names, indices


def _names_as_numbers(names: Sequence[str]) -> dict[int, int] | None:
    """The index of every number that is a class's name, where all names are numbers."""
    if not all(name.isascii() and name.isdigit() for name in names):
        return None
    found = {int(name): index for index, name in enumerate(names)}
    return found if len(found) == len(names) else None


def _find_classes(labels: StoredLabels) -> tuple[str, ...]:
    values = {value for value in labels.values if value is not None}
    if len(values) == 1:
        raise UserError(
            f"There is only one class, {min(values)!r}. Give two or more: class folders with "
            f"images in each, or labels.csv (path,label) beside the images."
        )
    if not labels.are_numbers:
        return tuple(sorted(values))
    values = {value for value in values if value >= 0}
    gaps = sorted(set(range(len(values))) - values)
    if gaps:
        top = max(values)
        raise UserError(
            f"Label {top} in row {list(labels.values).index(top)} is out of range: labels are "
            f"indices from 0, but no image has label {gaps[0]}. Correct the labels, or say the "
            f"classes with class_names=; measured numbers are no classes."
        )
    return tuple(str(index) for index in range(len(values)))


def label_problem(label: str | int | None, num_classes: int) -> str:
    """Why a label is none of the classes."""
    if label is None:
        return "has no label"
    if isinstance(label, str):
        return f"has label {label!r}, which is none of the {num_classes} classes"
    if not 0 <= label < num_classes:
        return f"has label {label}, out of range 0..{num_classes - 1}"
    return f"has label {label}, which no class is called"


def balanced_indices(labels: Sequence[int], limit: int, seed: int, split: str) -> list[int]:
    """Positions of `limit` images with the classes as even as they can be, in rising order.

    Args:
        labels: Label of every image.
        limit: How many images to take; all where there are fewer.
        seed: Which ones; the split too, so that splits differ.
        split: Its name.
    """
    order = list(range(len(labels)))
    seeded_rng("limit", seed, split).shuffle(order)
    rank: Counter[int] = Counter()
    ranked = []
    for position in order:
        ranked.append(rank[labels[position]])
        rank[labels[position]] += 1
    firsts = np.argsort(ranked, kind="stable")[:limit]
    return sorted(order[i] for i in firsts)

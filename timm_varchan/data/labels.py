"""The labels of rows: as they are stored, as indices of classes, evenly chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np

from timm_varchan.channels import seeded_rng
from timm_varchan.data.sources import Files, Rows
from timm_varchan.errors import UserError

__all__ = ["StoredLabels", "balanced_indices", "label_problem", "resolve_labels", "stored_labels"]

logger = logging.getLogger(__name__)

_INDEX_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


class StoredLabels(NamedTuple):
    """The labels of a split as they are stored.

    Args:
        values: One a row: text, whole numbers, or None where there is none.
        names: The classes in their order, where a `ClassLabel` says it.
        are_numbers: Whether they are whole numbers without names.
    """

    values: Sequence[Any]
    names: tuple[str, ...] | None
    are_numbers: bool


def stored_labels(rows: Rows, column: str) -> StoredLabels:
    """The labels of rows; those of a `ClassLabel` by name, where they are in its range.

    Raises:
        UserError: The column holds neither whole numbers nor text.
    """
    if isinstance(rows, Files):
        return StoredLabels(
            rows.labels, None, bool(rows.labels) and isinstance(rows.labels[0], int)
        )
    feature = rows.features[column]
    dtype = getattr(feature, "dtype", None)
    if isinstance(feature, (list, tuple, datasets.Sequence, getattr(datasets, "List", tuple))):
        raise UserError(
            f"The label column {column!r} holds {feature}: several labels an image. Only one "
            f"class an image is served; name another column with --label-column."
        )
    is_number = dtype in _INDEX_TYPES
    if not is_number and dtype not in ("string", "large_string"):
        raise UserError(
            f"The label column {column!r} holds {feature}; it needs whole numbers from 0, or "
            f"text. Name the right one with --label-column."
        )
    values = rows.select_columns([column]).with_format(None)[:][column]
    if not isinstance(feature, datasets.ClassLabel):
        return StoredLabels(values, None, is_number)
    named = dict(enumerate(feature.names))
    return StoredLabels([named.get(v, v) for v in values], tuple(feature.names), False)


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
        UserError: Numbers with gaps; numbers in one split and names in another.
    """
    first = next(iter(labels.values()))
    names = tuple(class_names) if class_names is not None else first.names
    names = _find_classes(first) if names is None else names
    of_number, of_name = _names_as_numbers(names), {name: i for i, name in enumerate(names)}
    numbers = [split for split, one in labels.items() if one.are_numbers]
    if of_number is None and numbers:
        if len(numbers) < len(labels):
            others = ", ".join(split for split in labels if split not in numbers)
            raise UserError(
                f"The labels of {', '.join(numbers)} are numbers, those of {others} are names "
                f"({', '.join(names[:3])}, ...). Write the same kind in all."
            )
        logger.warning(
            "The labels are numbers; they are taken as positions among the classes %s: 0 is %s.",
            ", ".join(names[:5]), names[0],
        )  # fmt: skip
        of_number = {i: i for i in range(len(names))}
    indices = {}
    for split, one in labels.items():
        places: dict[Any, int] = (of_number or {}) if one.are_numbers else of_name
        indices[split] = [places.get(value, -1) for value in one.values]
    return names, indices


def _names_as_numbers(names: Sequence[str]) -> dict[int, int] | None:
    """The index of every number that is a class's name, where all names are numbers."""
    if not all(name.isascii() and name.isdigit() for name in names):
        return None
    found = {int(name): index for index, name in enumerate(names)}
    return found if len(found) == len(names) else None


def _find_classes(labels: StoredLabels) -> tuple[str, ...]:
    known = {value for value in labels.values if value is not None}
    if not labels.are_numbers:
        return tuple(sorted(known))
    known = {value for value in known if value >= 0}
    gaps = sorted(set(range(len(known))) - known)
    if gaps:
        top = max(known)
        raise UserError(
            f"Label {top} in row {list(labels.values).index(top)} is out of range: labels are "
            f"indices from 0, but no image has label {gaps[0]}. Correct the labels, or say the "
            f"classes with class_names=."
        )
    return tuple(str(index) for index in range(len(known)))


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
        seed: Which ones.
        split: Part of the seed, so that splits differ.

    Returns:
        The positions.
    """
    order = list(range(len(labels)))
    seeded_rng("limit", seed, split).shuffle(order)
    rank: dict[int, int] = {}
    ranked = []
    for position in order:
        label = labels[position]
        ranked.append((rank.setdefault(label, 0), position))
        rank[label] += 1
    firsts = np.argsort([place for place, _ in ranked], kind="stable")[:limit]
    return sorted(ranked[i][1] for i in firsts)

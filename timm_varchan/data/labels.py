"""Labels of every kind to indices of classes, with the rows named whose label is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from timm_varchan.channels import seeded_rng

_INDEX_TYPES = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


@dataclass
class LabelColumn:
    """Labels of one split as indices; rows without a valid one hold -1 and are in `problems`."""

    indices: list[int]
    problems: dict[int, str] = field(default_factory=dict)


def resolve_labels(
    columns: Mapping[str, tuple[Any, Sequence[Any]]], class_names: Sequence[str] | None = None
) -> tuple[tuple[str, ...], dict[str, LabelColumn]]:
    """Find the classes of a data set and the index of every label among them.

    Args:
        columns: By split: the feature of the label column and its values. The first split decides
            about classes where nothing else does.
        class_names: The classes where they are known, in the order of the indices.

    Returns:
        The names of the classes, sorted where the data does not order them, and the labels.

    Raises:
        ValueError: A column that is neither whole numbers nor text; numbers with gaps.
    """
    feature, first = next(iter(columns.values()))
    names = tuple(class_names) if class_names is not None else _find_classes(feature, first)
    return names, {
        split: _to_indices(feature, values, names) for split, (feature, values) in columns.items()
    }


def _find_classes(feature: Any, values: Sequence[Any]) -> tuple[str, ...]:
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    known = {value for value in values if value is not None}
    if not _is_index(feature):
        return tuple(sorted(known))
    known = {value for value in known if value >= 0}
    gaps = sorted(set(range(len(known))) - known)
    if gaps:
        top = max(known)
        raise ValueError(
            f"Label {top} in row {list(values).index(top)} is out of range: labels are indices "
            f"from 0, but no image has label {gaps[0]}. Correct the labels, or say the classes "
            f"with class_names=."
        )
    return tuple(str(index) for index in range(len(known)))


def _is_index(feature: Any) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    dtype = getattr(feature, "dtype", None)
    if dtype not in (*_INDEX_TYPES, "string", "large_string"):
        raise ValueError(
            f"The label column holds {feature}; it needs whole numbers from 0, or text. Name the "
            f"right one with --label-column."
        )
    return dtype in _INDEX_TYPES


def _to_indices(feature: Any, values: Sequence[Any], names: tuple[str, ...]) -> LabelColumn:
    if isinstance(feature, datasets.ClassLabel) and tuple(feature.names) != names:
        own = feature.names
        values = [own[v] if v is not None and 0 <= v < len(own) else v for v in values]
        is_index = False
    else:
        is_index = _is_index(feature)
    positions = {name: index for index, name in enumerate(names)}
    column = LabelColumn([])
    for row, value in enumerate(values):
        if value is None or is_index:
            problem = index_problem(value, len(names))
            index = int(value) if problem is None else -1
        else:
            index = positions.get(value, -1)
            problem = f"has label {value!r}, which is none of the {len(names)} classes"
        column.indices.append(index)
        if index < 0:
            column.problems[row] = str(problem)
    return column


def index_problem(label: int | None, num_classes: int) -> str | None:
    """Why a label is none of the classes' indices, or None."""
    if label is None:
        return "has no label"
    if not 0 <= label < num_classes:
        return f"has label {label}, out of range 0..{num_classes - 1}"
    return None


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

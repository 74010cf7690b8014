"""Rebuild the 50-class subset of Tiny-ImageNet that the results were measured on.

    python bench/tiny_imagenet.py --output data/tinyimagenet50

`tiny_imagenet50.json` names the classes and, for each, its 25 of the 50 public validation images;
all 500 training images of a class belong to it. Order: training images sorted by file name
(`n01443537_0.JPEG`), then shuffled by `random.Random(0)`; validation images by class, then name.
The images are taken as they are stored, and digests of their bytes say whether all is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

PLAN = Path(__file__).with_name("tiny_imagenet50.json")
SOURCE = "zh-plus/tiny-imagenet"
VALIDATION_NAMES = ("validation", "valid", "val", "test")
_DIGITS = 8


@dataclass(frozen=True)
class Plan:
    """What belongs to the subset.

    Args:
        classes: Class names (`n01443537_goldfish`) in the order of the labels, and for each its
            validation images: number of the file (`val_1230.JPEG`) and first digits of the digest.
        train_digest: Of the training images in their order.
        train_set_digest: Of the same images, whatever their order.
    """

    classes: dict[str, dict[str, str]]
    train_digest: str
    train_set_digest: str

    @classmethod
    def read(cls, path: Path = PLAN) -> Plan:
        """From a file: each class with `number:digits` of its images, split at spaces."""
        plan = json.loads(path.read_text())
        plan["classes"] = {
            name: dict(entry.split(":") for entry in text.split())
            for name, text in plan["classes"].items()
        }
        return cls(**plan)


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def digest_all(rows: list[Row], *, ordered: bool) -> str:
    """One digest for many images."""
    each = [digest(row.content) for row in rows]
    return digest("".join(each if ordered else sorted(each)).encode())


@dataclass(frozen=True)
class Row:
    """One image: its bytes as stored, the file's name ('' if the source has none), its label."""

    content: bytes
    name: str
    label: int


def read_rows(table: datasets.Dataset, classes: list[str]) -> list[Row]:
    """The rows of the wanted classes, which are told by their WordNet number.

    Raises:
        ValueError: Columns or classes are missing.
    """
    if not {"image", "label"} <= set(table.column_names):
        raise ValueError(f"Needed are the columns image and label, not {table.column_names}.")
    number_of = {name.split("_")[0]: label for label, name in enumerate(classes)}
    theirs = getattr(table.features["label"], "names", [])
    label_of = {i: number_of.get(name.split("_")[0].split()[0]) for i, name in enumerate(theirs)}
    missing = set(range(len(classes))) - set(label_of.values())
    if missing:
        raise ValueError(
            f"The source lacks {len(missing)} of {len(classes)} classes, such as "
            f"{classes[min(missing)]}; its labels must be named by WordNet numbers."
        )
    kept = [i for i, label in enumerate(table["label"]) if label_of[label] is not None]
    stored = table.cast_column("image", datasets.Image(decode=False)).select(kept)
    rows = []
    for row in stored:
        content, path = row["image"]["bytes"], row["image"]["path"]
        content = Path(path).read_bytes() if content is None else content
        label = label_of[row["label"]]
        assert label is not None
        rows.append(Row(content, Path(path or "").name, label))
    return rows


def choose_training(rows: list[Row]) -> list[Row]:
    """All of them, in the order of the subset, or nearly where the source has no file names."""
    rows = sorted(rows, key=lambda row: row.name if row.name else f"{row.label:06d}")
    random.Random(0).shuffle(rows)
    return rows


def choose_validation(rows: list[Row], plan: Plan) -> list[Row]:
    """The images of the plan, by digest of their bytes, else by file name.

    Raises:
        ValueError: Some are not there.
    """
    by_digest = {digest(row.content)[:_DIGITS]: row for row in rows}
    by_name = {row.name: row for row in rows if row.name}
    chosen, missing = [], []
    for label, images in enumerate(plan.classes.values()):
        for number, digits in images.items():
            name = f"val_{number}.JPEG"
            row = by_digest.get(digits) or by_name.get(name)
            if row is None or row.label != label:
                missing.append(name)
            else:
                chosen.append(row)
    if missing:
        raise ValueError(
            f"{len(missing)} validation images are not in the source, such as {missing[0]}, "
            f"neither by content nor by name. Give a source with the original files."
        )
    return chosen


def rebuild(source: Mapping[str, datasets.Dataset], folder: Path, plan: Plan) -> dict[str, bool]:
    """Write `train.parquet` and `validation.parquet`.

    Args:
        source: The public splits.
        folder: Where to.
        plan: What belongs to the subset.

    Returns:
        Whether the training images, their order, and the validation images are those of the plan.

    Raises:
        ValueError: Splits, classes or validation images are missing.
    """
    name = next((name for name in VALIDATION_NAMES if name in source), None)
    if "train" not in source or name is None:
        raise ValueError(f"Needed are the splits train and validation, not {list(source)}.")
    classes = list(plan.classes)
    train = choose_training(read_rows(source["train"], classes))
    validation = choose_validation(read_rows(source[name], classes), plan)
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", validation)):
        write_parquet(rows, classes, folder / f"{split}.parquet")
    wanted = [digits for images in plan.classes.values() for digits in images.values()]
    return {
        "training images": digest_all(train, ordered=False) == plan.train_set_digest,
        "order of the training images": digest_all(train, ordered=True) == plan.train_digest,
        "validation images": [digest(row.content)[:_DIGITS] for row in validation] == wanted,
    }


def write_parquet(rows: list[Row], classes: list[str], path: Path) -> None:
    """Write rows with the columns image and label."""
    columns: dict[str, list[Any]] = {
        "image": [{"bytes": row.content, "path": row.name or None} for row in rows],
        "label": [row.label for row in rows],
    }
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    table.to_parquet(path)


def main() -> None:
    """Parse the command line, load the public data, rebuild."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", default=SOURCE, help="hub name or folder of the public data")
    parser.add_argument("--output", type=Path, required=True, help="folder for the Parquet files")
    args = parser.parse_args()
    try:
        if (Path(args.source) / "dataset_dict.json").is_file():
            source = datasets.load_from_disk(args.source)
        else:
            source = datasets.load_dataset(args.source)
        same = rebuild(source, args.output, Plan.read())
    except (ValueError, OSError) as error:
        parser.exit(1, f"{args.source}: {error}\n")
    for what, is_same in same.items():
        print(f"{what}: {'the same' if is_same else 'NOT the same as measured on'}")
    if not all(same.values()):
        parser.exit(3, "Figures can differ from the committed ones.\n")


if __name__ == "__main__":
    main()

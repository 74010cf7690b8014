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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets

PLAN = json.loads(Path(__file__).with_name("tiny_imagenet50.json").read_text())
SOURCE = "zh-plus/tiny-imagenet"
VALIDATION_NAMES = ("validation", "valid", "val", "test")

#: Bytes as stored, name of the file ('' where the source has none), label.
Row = tuple[bytes, str, int]


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def digest_all(digests: Iterable[str]) -> str:
    """One digest for many images, in their order."""
    return digest("".join(digests).encode())


def read_rows(table: datasets.Dataset, classes: list[str]) -> list[Row]:
    """The rows of the wanted classes, which are found by their WordNet number.

    Raises:
        ValueError: Columns or classes are missing.
    """
    if not {"image", "label"} <= set(table.column_names):
        raise ValueError(f"Needed are the columns image and label, not {table.column_names}.")
    number_of = {name.split("_")[0]: label for label, name in enumerate(classes)}
    theirs = getattr(table.features["label"], "names", [])
    numbers = [name.split("_")[0].split()[0] for name in theirs]
    label_of = {i: number_of[number] for i, number in enumerate(numbers) if number in number_of}
    missing = set(number_of.values()) - set(label_of.values())
    if missing:
        raise ValueError(
            f"The source lacks {len(missing)} of {len(classes)} classes, such as "
            f"{classes[min(missing)]}; its labels must be named by WordNet numbers."
        )
    kept = [i for i, label in enumerate(table["label"]) if label in label_of]
    rows: list[Row] = []
    for row in table.cast_column("image", datasets.Image(decode=False)).select(kept):
        content, path = row["image"]["bytes"], row["image"]["path"] or ""
        content = Path(path).read_bytes() if content is None else content
        rows.append((content, Path(path).name, label_of[row["label"]]))
    return rows


def choose_validation(rows: list[Row], plan: Mapping[str, Any]) -> list[tuple[Row, bool]]:
    """The images of the plan, by their bytes, else by file name, and whether the bytes are right.

    Raises:
        ValueError: Some are not there.
    """
    by_key = {name: row for row in rows if (name := row[1])}
    by_key |= {digest(row[0])[:8]: row for row in rows}
    chosen, missing = [], []
    for label, images in enumerate(plan["classes"].values()):
        for number, digits in (image.split(":") for image in images.split()):
            name = f"val_{number}.JPEG"
            row = by_key.get(digits) or by_key.get(name)
            if row is None or row[2] != label:
                missing.append(name)
            else:
                chosen.append((row, digits in by_key))
    if missing:
        raise ValueError(
            f"{len(missing)} validation images are not in the source, such as {missing[0]}, "
            f"neither by content nor by name. Give a source with the original files."
        )
    return chosen


def rebuild(
    source: Mapping[str, datasets.Dataset], folder: Path, plan: Mapping[str, Any] = PLAN
) -> dict[str, bool]:
    """Write `train.parquet` and `validation.parquet`.

    Args:
        source: The public splits.
        folder: Where to.
        plan: `classes`, in the order of the labels, each with `number:digits` of its validation
            images; `train_digest` of the training images in their order, `train_set_digest` of
            them sorted.

    Returns:
        Whether the training images, their order, and the validation images are those of the plan.

    Raises:
        ValueError: Splits, classes or validation images are missing.
    """
    name = next((name for name in VALIDATION_NAMES if name in source), None)
    if "train" not in source or name is None:
        raise ValueError(f"Needed are the splits train and validation, not {list(source)}.")
    classes = list(plan["classes"])
    # Without names of files the order is nearly that of the subset.
    train = sorted(read_rows(source["train"], classes), key=lambda row: row[1] or f"{row[2]:06d}")
    random.Random(0).shuffle(train)
    validation = choose_validation(read_rows(source[name], classes), plan)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("validation", [row for row, _ in validation])):
        columns: dict[str, list[Any]] = {
            "image": [{"bytes": content, "path": name or None} for content, name, _ in rows],
            "label": [label for *_, label in rows],
        }
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(folder / f"{split}.parquet")
    digests = [digest(content) for content, *_ in train]
    return {
        "training images": digest_all(sorted(digests)) == plan["train_set_digest"],
        "order of the training images": digest_all(digests) == plan["train_digest"],
        "validation images": all(same for _, same in validation),
    }


def main() -> None:
    """Parse the command line, load the public data, rebuild."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", default=SOURCE, help="hub name or folder of the public data")
    parser.add_argument("--output", type=Path, required=True, help="folder for the Parquet files")
    args = parser.parse_args()
    try:
        saved = (Path(args.source) / "dataset_dict.json").is_file()
        load = datasets.load_from_disk if saved else datasets.load_dataset
        same = rebuild(load(args.source), args.output)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{args.source}: {error}\n")
    for what, is_same in same.items():
        print(f"{what}: {'the same' if is_same else 'NOT the same as measured on'}")
    if not all(same.values()):
        parser.exit(3, "Figures can differ from the committed ones.\n")


if __name__ == "__main__":
    main()

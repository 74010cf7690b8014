"""Where data comes from: a hub name, Parquet, list files, class folders, saved `datasets`.

Every source ends as one `datasets.Dataset` a split; nothing is decoded here. Class folders are
walked here and not by `imagefolder`, which knows no `.npy` and takes a class folder named
`test_tube` or `bullet_train` for a split.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.parquet as parquet
from datasets.exceptions import DatasetGenerationError

from timm_varchan.data.images import IMAGE_SUFFIXES

#: What a split is called in sources, by what it is called here; the first that is there counts.
SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
HUB_ALIASES = {"mini-imagenet": "timm/mini-imagenet", "imagenet-mini": "timm/mini-imagenet"}
_KNOWN = "'synthetic', a folder of class folders, of Parquet or of train.txt lists, or a hub name"


_T = TypeVar("_T")


@dataclass(frozen=True)
class Tables:
    """The rows of every split.

    Args:
        splits: One table a split, by `train`, `validation`, `test`.
        folder: What relative paths in the rows start from.
        name: What the data is called in results.
        row_names: What errors call the rows of a split, where these are only some of the source's.
    """

    splits: dict[str, datasets.Dataset]
    folder: Path
    name: str
    row_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


def load_tables(
    source: str, splits: Mapping[str, str | None], cache_dir: str | Path | None = None
) -> Tables:
    """Find out what a source is and read its rows.

    Args:
        source: Folder, file or hub name; see the module.
        splits: What the splits are called in the source where it is none of `SPLIT_ALIASES`; None
            leaves a split out.
        cache_dir: Where `datasets` keeps its copies; its own default without it.

    Returns:
        The tables.

    Raises:
        FileNotFoundError: Nothing is there; the hub has no such data or cannot be reached.
        ValueError: Files that cannot be read, splits that are not there.
    """
    path = Path(source).expanduser()
    cache = None if cache_dir is None else str(cache_dir)
    if path.is_dir():
        return Tables(_load_folder(path, splits, cache), path, path.resolve().name)
    if path.is_file() and path.suffix == ".parquet":
        return Tables(_load_parquet([path], splits, cache), path.parent, path.stem)
    if path.is_file() and path.suffix == ".txt":
        files = choose_splits({path.stem: path}, splits, source)
        tables = {split: _read_list(file) for split, file in files.items()}
        return Tables(tables, path.parent, path.resolve().parent.name)
    if path.is_file():
        raise ValueError(f"{source} is neither a .parquet nor a .txt file. Give {_KNOWN}.")
    if source.startswith((".", "/", "~")) or path.suffix in (".parquet", ".txt"):
        raise FileNotFoundError(f"There is no {source}. Check the path, or give {_KNOWN}.")
    name = HUB_ALIASES.get(source, source)
    return Tables(_load_hub(name, splits, cache), Path(), name)


def choose_splits(
    found: Mapping[str, _T], splits: Mapping[str, str | None], source: object
) -> dict[str, _T]:
    """Pick what stands for train, validation and test among what a source has.

    Args:
        found: Anything, by the name of the split in the source.
        splits: What the caller calls them, which goes before the usual names.
        source: For errors.

    Returns:
        The chosen things by `train`, `validation`, `test`; a single one of unknown name is `train`.

    Raises:
        ValueError: An asked split is not there, or nothing is recognised.
    """
    unknown = sorted(set(splits) - set(SPLIT_ALIASES))
    if unknown:
        raise ValueError(
            f"Unknown split {', '.join(unknown)}; there are {', '.join(SPLIT_ALIASES)}."
        )
    chosen: dict[str, _T] = {}
    for split, aliases in SPLIT_ALIASES.items():
        wanted = splits.get(split)
        if wanted is not None and wanted not in found:
            raise ValueError(f"{source} has no split {wanted!r}; it has {', '.join(found)}.")
        names = aliases if split not in splits else () if wanted is None else (wanted,)
        for name in names:
            if name in found:
                chosen.setdefault(split, found[name])
    if not chosen and len(found) == 1 and "train" not in splits:
        chosen["train"] = next(iter(found.values()))
    if not chosen:
        raise ValueError(
            f"{source} has no split that is called like one; it has {', '.join(found)}. Say which "
            f"is which with --train-split, --validation-split and --test-split (splits=)."
        )
    return chosen


def _load_folder(
    folder: Path, splits: Mapping[str, str | None], cache_dir: str | None
) -> dict[str, datasets.Dataset]:
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _load_saved(folder, splits)
    parquet = _visible(folder.rglob("*.parquet"), folder)
    if parquet:
        return _load_parquet(parquet, splits, cache_dir, folder)
    named = {str(name) for names in (*SPLIT_ALIASES.values(), splits.values()) for name in names}
    lists = {file.stem: file for file in sorted(folder.glob("*.txt")) if file.stem in named}
    if lists:
        files = choose_splits(lists, splits, folder)
        return {split: _read_list(file) for split, file in files.items()}
    return _load_class_folders(folder, splits, named)


def _visible(files: Iterable[Path], folder: Path) -> list[Path]:
    return sorted(
        file for file in files if not any(p.startswith(".") for p in file.relative_to(folder).parts)
    )


def _load_saved(folder: Path, splits: Mapping[str, str | None]) -> dict[str, datasets.Dataset]:
    saved = datasets.load_from_disk(str(folder))
    found = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return choose_splits(found, splits, folder)


def _load_parquet(
    files: list[Path],
    splits: Mapping[str, str | None],
    cache_dir: str | None,
    folder: Path | None = None,
) -> dict[str, datasets.Dataset]:
    chosen = _parquet_splits(files, splits, folder)
    for split, group in chosen.items():
        if sum(_num_rows(file) for file in group) == 0:
            raise empty_split(f"{', '.join(group)} ({split})", split)
    try:
        tables = datasets.load_dataset("parquet", data_files=chosen, cache_dir=cache_dir)
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Cannot read the Parquet files of {folder or files[0]} "
            f"({', '.join(file.name for file in files)}): {reason}. Check the files; all of them "
            f"need the same columns."
        ) from error
    return dict(tables)


def _parquet_splits(
    files: list[Path], splits: Mapping[str, str | None], folder: Path | None
) -> dict[str, list[str]]:
    """The files of each split, by their names or their folder's."""
    known = {name for names in SPLIT_ALIASES.values() for name in names} | set(splits.values())
    found: dict[str, list[str]] = {}
    for file in files:
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
        name = file.parent.name if stem not in known and file.parent != folder else stem
        found.setdefault(name if name in known else stem, []).append(str(file))
    return choose_splits(found, splits, folder or files[0])


def open_streams(
    source: str, splits: Mapping[str, str | None]
) -> tuple[str, dict[str, datasets.IterableDataset]]:
    """The rows of every split of a hub name or of Parquet files, read as they come.

    Returns:
        What the data is called, and the rows by `train`, `validation`, `test`.

    Raises:
        FileNotFoundError: Nothing is there; the hub has no such data or cannot be reached.
        ValueError: A folder without Parquet files, splits that are not there.
    """
    path = Path(source).expanduser()
    if path.exists():
        files = _visible(path.rglob("*.parquet"), path) if path.is_dir() else [path]
        if not files or files[0].suffix != ".parquet":
            raise ValueError(
                f"{source} holds no Parquet files, which --streaming reads. Leave it out."
            )
        chosen = _parquet_splits(files, splits, path if path.is_dir() else None)
        opened = datasets.load_dataset("parquet", data_files=chosen, streaming=True)
        return path.resolve().stem, dict(opened)
    name = HUB_ALIASES.get(source, source)
    return name, _load_hub(name, splits, None, streaming=True)


def _num_rows(file: str) -> int:
    try:
        return parquet.read_metadata(file).num_rows
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"Cannot read the Parquet file {file}: {reason}. Write it again, or take it out."
        ) from error


def empty_split(where: str, split: str) -> ValueError:
    """The error for a split without rows."""
    return ValueError(
        f"{where} is empty. Fill it, or leave it out with splits={{{split!r}: None}}."
    )


def _read_list(path: Path) -> datasets.Dataset:
    """Rows of `path label` lines; paths may hold spaces and start at the file's folder."""
    images, labels = [], []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error}. Write one 'path label' a line."
        ) from error
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.rsplit(maxsplit=1)
        if not parts:
            continue
        if len(parts) != 2:
            raise ValueError(f"{path} line {number} is {line!r}; it needs 'path label'.")
        images.append(parts[0].strip())
        labels.append(parts[1])
    is_index = all(re.fullmatch(r"[+-]?\d+", label) for label in labels)
    kind = datasets.Value("int64" if is_index else "string")
    return _path_table(images, [int(label) for label in labels] if is_index else labels, kind)


def _path_table(
    images: list[str], labels: list[int] | list[str], kind: datasets.Value
) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(decode=False), "label": kind})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def _load_class_folders(
    folder: Path, splits: Mapping[str, str | None], named: set[str]
) -> dict[str, datasets.Dataset]:
    inner = [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    # A split holds class folders; a class that is called "train" holds images.
    found = {e.name: e for e in inner if e.name in named and any(x.is_dir() for x in e.iterdir())}
    chosen = choose_splits(found or {"train": folder}, splits, folder)
    tables = {}
    for split, root in chosen.items():
        images, labels = [], []
        for file in _visible(root.rglob("*"), root):
            if file.suffix.lower() in IMAGE_SUFFIXES and file.parent != root:
                images.append(str(file.relative_to(folder)))
                labels.append(file.relative_to(root).parts[0])
        tables[split] = _path_table(images, labels, datasets.Value("string"))
    if not any(len(table) for table in tables.values()):
        raise ValueError(
            f"{folder} has no images in class folders, no Parquet files and no train.txt. It needs "
            f"CLASS/image.png or train/CLASS/image.png, train.parquet, or train.txt."
        )
    return tables


def _load_hub(
    name: str, splits: Mapping[str, str | None], cache_dir: str | None, streaming: bool = False
) -> dict[str, Any]:
    try:
        tables = datasets.load_dataset(name, cache_dir=cache_dir, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        network = "unset HF_HUB_OFFLINE" if offline else "check the network"
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise FileNotFoundError(
            f"Data {name!r} is no local path, and the hub did not give it "
            f"({type(error).__name__}: {reason}). Check the name, {network}, or give {_KNOWN}."
        ) from error
    return choose_splits(tables, splits, name)

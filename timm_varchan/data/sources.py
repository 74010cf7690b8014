"""Where data comes from: one reader that makes one row an image, with its label, for every split.

A row is a file, the files of an image's channels, or a row of a `datasets` table; nothing is
decoded. Folders are walked here and not by `imagefolder`, which knows no `.npy` and takes a class
folder named `test_tube` for a split. What is left out is said in the log.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.parquet as parquet
from datasets.exceptions import DatasetGenerationError

from timm_varchan.data.decode import IMAGE_SUFFIXES
from timm_varchan.data.lists import (
    NO_COLUMNS,
    SPLIT_ALIASES,
    TABLE_SUFFIXES,
    Columns,
    read_table,
    split_of,
)
from timm_varchan.data.planes import are_channels, put_together
from timm_varchan.data.records import Files
from timm_varchan.errors import UserError

logger = logging.getLogger(__name__)

HUB_ALIASES = {"mini-imagenet": "timm/mini-imagenet", "imagenet-mini": "timm/mini-imagenet"}
_KNOWN = (
    "'synthetic', a folder of class folders, of Parquet, of lists or tables (labels.csv), one such "
    "file, or a hub name"
)
_NO_STREAM = "{} holds no Parquet files, which --streaming reads. Leave it out."
_SAY_WHICH = "Say which is which with --train-split, --validation-split and --test-split (splits=)"
#: Folders that systems leave behind; names that begin with a dot are hidden anyway.
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
#: What lies beside images without being meant as one.
_DOCUMENTS = frozenset(
    {"", ".msk", ".txt", ".md", ".rst", ".json", ".yaml", ".yml", ".xml", ".html", ".pdf", ".py",
     ".ipynb", ".log", ".db", ".ini", ".parquet", *TABLE_SUFFIXES}
)  # fmt: skip
_PICTURES = frozenset({"image", "images", "img", "imgs", "photos", "input", "inputs"})
_MASKS = frozenset(
    {"mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "gt",
     "segmentations", "ground_truth", "groundtruth", "target", "targets"}
)  # fmt: skip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Tables:
    """The rows of every split.

    Args:
        splits: `Rows` by `train`, `validation`, `test`.
        folder: What relative paths in the rows start from.
        name: What the data is called in results.
        row_names: What errors call the rows of a split, where these are only some of the source's.
        planes: What the files of an image are called, where it lies in several.
    """

    splits: dict[str, Any]
    folder: Path
    name: str
    row_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    planes: tuple[str, ...] = ()


def load_tables(
    source: str,
    splits: Mapping[str, str | None],
    *,
    columns: Columns = NO_COLUMNS,
    cache_dir: str | Path | None = None,
    streaming: bool = False,
) -> Tables:
    """Find out what a source is and read its rows.

    Args:
        source: Folder, file or hub name; see the module.
        splits: What the splits are called in the source where it is none of `SPLIT_ALIASES`; None
            leaves a split out. `"."` is a folder of class folders itself.
        columns: Of a table of text: which are the images', the labels'; which files are one
            image's.
        cache_dir: Where `datasets` keeps its copies; its own default without it.
        streaming: Read rows as they come, of Parquet files or from the hub.

    Returns:
        The tables, of `datasets.IterableDataset` where they are streamed.

    Raises:
        FileNotFoundError: Nothing is there; the hub has no such data or cannot be reached.
        UserError: Files that cannot be read, splits that are not there.
    """
    unknown = sorted(set(splits) - set(SPLIT_ALIASES))
    if unknown:
        raise UserError(
            f"Unknown split {', '.join(unknown)}; there are {', '.join(SPLIT_ALIASES)}."
        )
    path = Path(source).expanduser()
    cache = None if cache_dir is None else str(cache_dir)
    options: dict[str, Any] = {"streaming": True} if streaming else {"cache_dir": cache}
    found: dict[str, Any]
    if path.is_dir():
        folder, name = path, path.resolve().name
        found = _load_folder(path, splits, columns, options)
    elif path.is_file():
        folder, name = path.parent, path.resolve().stem
        if path.suffix == ".parquet":
            found = _load_parquet([path], splits, **options)
        elif streaming:
            raise UserError(_NO_STREAM.format(path))
        elif path.suffix.lower() in (".txt", *TABLE_SUFFIXES):
            name = path.resolve().parent.name
            found = _by_split(_tables_of([path], folder, columns, set()), splits, source)
        else:
            raise UserError(f"{source} is no .parquet, .txt, .csv, .tsv or .jsonl. Give {_KNOWN}.")
    elif source.startswith((".", "/", "~")) or path.suffix in (".parquet", ".txt", *TABLE_SUFFIXES):
        raise FileNotFoundError(f"There is no {source}. Check the path, or give {_KNOWN}.")
    else:
        folder, name = Path(), HUB_ALIASES.get(source, source)
        found = _load_hub(name, splits, **options)
    if not all(isinstance(rows, Files) for rows in found.values()):
        return Tables(found, folder, name)
    found, channels = put_together(found, columns.planes, folder, columns.channels)
    return Tables(found, folder, name, planes=channels)


def choose_splits(
    found: Mapping[str, _T], splits: Mapping[str, str | None], source: object
) -> dict[str, _T]:
    """What stands for train, validation and test among what a source has, by its own names.

    What the caller says goes before the usual names; a single thing of unknown name is `train`.

    Raises:
        UserError: An asked split is not there, nothing is recognised, or names that differ in their
            case alone.
    """
    chosen = {split: name for split, name in splits.items() if name is not None}
    for name in chosen.values():
        if name not in found:
            raise UserError(f"{source} has no split {name!r}; it has {', '.join(sorted(found))}.")
    for split in set(SPLIT_ALIASES) - set(splits):
        others = [name for name in found if name not in splits.values()]
        named = [[n for n in others if n.lower() == alias] for alias in SPLIT_ALIASES[split]]
        names = next(filter(None, named), [])
        if len(names) > 1:
            raise UserError(
                f"{source} has the split {names[0].lower()!r} twice, in other cases: "
                f"{', '.join(names)}. {_SAY_WHICH}."
            )
        chosen |= {split: names[0]} if names else {}
    if not chosen and len(found) == 1 and "train" not in splits:
        chosen["train"] = next(iter(found))
    if not chosen:
        raise UserError(
            f"{source} has no split that is called like one; it has {', '.join(sorted(found))}. "
            f"{_SAY_WHICH}."
        )
    unused = sorted(set(found) - set(chosen.values()))
    if unused and not splits:
        logger.warning("%s: left out %s, which is none of the splits", source, ", ".join(unused))
    return {split: found[chosen[split]] for split in SPLIT_ALIASES if split in chosen}


def _split_names(splits: Iterable[str | None] = SPLIT_ALIASES) -> set[str]:
    """The usual names of splits, in lower case; of other words these themselves."""
    return {
        name for split in splits if split for name in SPLIT_ALIASES.get(split, (split.lower(),))
    }


# Folders ------------------------------------------------------------------------------------------


class Level:
    """What is visible in a folder; links are followed, but not to a folder above.

    Names that begin with a dot, and what systems leave behind, are passed over.

    Args:
        folder: The folder.
        place: Its path from the folder of the data, ending in a slash; paths in it begin so.
        above: Devices and inodes of the folders that it lies in.
    """

    def __init__(self, folder: str, place: str = "", above: tuple[tuple[int, int], ...] = ()):
        self.place, self.folders = place, dict[str, Level]()
        self.images, self.others = list[str](), list[str]()
        about = os.stat(folder)
        above = (*above, (about.st_dev, about.st_ino))
        if above[-1] not in above[:-1]:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    self._add(entry, above)
        self.count: int = len(self.images) + sum(inner.count for inner in self.folders.values())

    def _add(self, entry: os.DirEntry[str], above: tuple[tuple[int, int], ...]) -> None:
        here = f"{self.place}{entry.name}"
        if entry.name.startswith("."):
            return
        if not entry.is_dir():  # a link to nothing too
            (self.images if _suffix(here) in IMAGE_SUFFIXES else self.others).append(here)
        elif entry.name not in _SYSTEM_FOLDERS:
            self.folders[entry.name] = Level(entry.path, f"{here}/", above)

    def below(self, kind: str = "images") -> Iterator[str]:
        """The paths of all images in it, or of all `others`."""
        yield from getattr(self, kind)
        for level in self.folders.values():
            yield from level.below(kind)

    @property
    def holding(self) -> set[str]:
        """Its folders that hold images anywhere."""
        return {name for name, level in self.folders.items() if level.count}

    @property
    def is_wrapper(self) -> bool:
        """Whether all images lie in folders of one folder."""
        holding = self.holding
        return len(holding) == 1 and not self.images and not self.folders[min(holding)].images

    def unwrapped(self) -> Level:
        """Without folders that hold one folder only, which holds several."""
        level = self
        while level.is_wrapper:
            level = level.folders[min(level.holding)]
        return level


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") + 1 else ""


def _count_suffixes(names: Iterable[str]) -> str:
    counts = Counter(_suffix(name) or "without an ending" for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


def _say_left_out(folder: Path, level: Level) -> None:
    """A line about the files whose ending is none of an image."""
    others = [name for name in level.below("others") if _suffix(name) not in _DOCUMENTS]
    if others:
        counts = _count_suffixes(others)
        logger.warning("%s: left out %d files by their ending: %s", folder, len(others), counts)


def find_images(paths: Iterable[str | Path]) -> list[Path]:
    """The files, and every image below the folders, sorted.

    Args:
        paths: Files, whether they are there or not, and folders.

    Returns:
        The files in the order of `paths`.

    Raises:
        UserError: A folder without images, or no paths.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        level = Level(str(path))
        _say_left_out(path, level)
        below = sorted(path / name for name in level.below())
        if not below:
            raise UserError(
                f"There are no images below {path}. Files are taken by their ending: "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        files += below
    if not files:
        raise UserError("There are no files to predict. Give image files or folders.")
    return files


def _load_folder(
    folder: Path, splits: Mapping[str, str | None], columns: Columns, options: Mapping[str, Any]
) -> dict[str, Any]:
    is_saved = any((folder / f"dataset_{name}.json").is_file() for name in ("dict", "info"))
    if is_saved and "streaming" not in options:
        saved = datasets.load_from_disk(str(folder))
        return choose_splits(
            saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}, splits, folder
        )
    level = Level(str(folder))
    stored = [folder / name for name in level.below("others") if _suffix(name) == ".parquet"]
    if stored:
        if level.count:
            logger.warning("%s: left out %d images beside the Parquet files", folder, level.count)
        return _load_parquet(stored, splits, folder, **options)
    if "streaming" in options:
        raise UserError(_NO_STREAM.format(folder))
    named = _split_names() | _split_names(splits.values())
    tables = _tables_of(_named_tables(folder, level, named), folder, columns, named)
    if tables:
        chosen = _by_split(tables, splits, folder)
        rows = (row for table in chosen.values() for row in table.paths)
        rest = level.count - sum(len(row) if isinstance(row, tuple) else 1 for row in rows)
        if rest > 0:
            logger.warning("%s: left out %d images that no table lists", folder, rest)
        return dict(chosen)
    _say_left_out(folder, level)
    return dict(_load_class_folders(folder, level, splits, columns.planes))


# Lists and tables ---------------------------------------------------------------------------------


def _named_tables(folder: Path, level: Level, named: set[str]) -> list[Path]:
    """Files of a folder that may say which images there are: at the top, or in a split's folder."""
    inner = [below for name, below in level.folders.items() if name.lower() in named]
    found = [name for place in (level, *inner) for name in place.others]
    return [
        folder / name for name in found
        if _suffix(name) in TABLE_SUFFIXES or (
            _suffix(name) == ".txt" and "/" not in name and split_of(name[:-4], named) is not None
        )
    ]  # fmt: skip


def _tables_of(
    files: Sequence[Path], folder: Path, columns: Columns, named: set[str]
) -> dict[str, Files]:
    """The rows of tables by what splits are called in them; empty where none lists images."""
    found: dict[str, Files] = {}
    for file in files:
        word = file.parent.name if file.parent != folder else file.stem
        is_asked = (len(files) == 1 and not named) or split_of(word, named) is not None
        for split, part in (read_table(file, folder, columns, is_asked) or {}).items():
            name = split or word
            if name in found:
                raise UserError(
                    f"{folder} has two tables for {name}, one is {file.name}. Give the right one "
                    f"as the data, or take the other out."
                )
            found[name] = part
    return found


def _by_split(
    found: dict[str, Files], splits: Mapping[str, str | None], source: object
) -> dict[str, Files]:
    """The chosen splits; labels are whole numbers where all are."""
    usual = {
        name: split
        for name in found
        if name not in splits.values() and (split := split_of(name, _split_names())) is not None
    }
    if len(set(usual.values())) == len(usual):
        found = {usual.get(name, name): files for name, files in found.items()}
    chosen = choose_splits(found, splits, source)
    labels = [x for rows in chosen.values() for x in rows.labels if x is not None]
    if labels and all(re.fullmatch(r"[+-]?\d+(\.0+)?", str(x)) for x in labels):
        return {
            s: replace(rows, labels=[None if x is None else int(float(x)) for x in rows.labels])
            for s, rows in chosen.items()
        }
    return chosen


# Class folders ------------------------------------------------------------------------------------


def _load_class_folders(
    folder: Path, top: Level, splits: Mapping[str, str | None], planes: str | None
) -> dict[str, Files]:
    names = _split_folders(top, splits)
    if not names:
        inner = top.unwrapped()
        if inner is not top:
            logger.info("%s: reading %s in it", folder, inner.place.rstrip("/"))
        top, names = inner, _split_folders(inner, splits)
    if names:
        # A split holds class folders; a class that is called "train" holds images.
        others = [n for n in top.holding if n.lower() not in _split_names()]
        chosen = choose_splits({n: top.folders[n] for n in {*names, *others}}, splits, folder)
        if all(level.is_wrapper for level in chosen.values()):  # seg_train/seg_train/CLASS
            chosen = {split: level.unwrapped() for split, level in chosen.items()}
    elif "." in splits.values():
        chosen = choose_splits({".": top}, splits, folder)
    else:
        _refuse_no_classes(folder, top, planes)
        chosen = choose_splits({"train": top}, splits, folder)
    tables = {split: _class_files(folder, level) for split, level in chosen.items()}
    if not any(len(table) for table in tables.values()):
        raise UserError(
            f"{folder} has no images in class folders, no Parquet files and no table that lists "
            f"images. It needs CLASS/image.png or train/CLASS/image.png, train.parquet, train.txt "
            f"or labels.csv (path,label)."
        )
    return tables


def _split_folders(level: Level, splits: Mapping[str, str | None]) -> list[str]:
    """Folders of folders that are splits, by the caller's names or the usual ones."""
    if "." in splits.values():
        return []
    holders = sorted(name for name, inner in level.folders.items() if inner.folders)
    asked = set(splits.values())
    return [name for name in holders if name in asked or name.lower() in _split_names()]


def _refuse_no_classes(folder: Path, top: Level, planes: str | None) -> None:
    """Refuse folders that are no classes: those of splits, of images beside masks."""
    holding = {name.lower(): name for name in sorted(top.holding)}
    masks, pictures = _MASKS & set(holding), _PICTURES & set(holding)
    if masks and (pictures or len(holding) == len(masks)):
        raise UserError(
            f"{folder}: {', '.join(holding.values())} are no classes but images and what belongs "
            f"to them, pixel by pixel. Classes of whole images are served: give class folders, or "
            f"labels.csv (path,label) beside the images. Segmentation is not."
        )
    if holding and set(holding) <= _split_names() and len(holding) > 1:
        raise UserError(
            f"{folder}: {', '.join(holding.values())} are called like splits, but hold images and "
            f"no class folders. Put class folders into them, or say the labels in train.csv, "
            f"test.csv (path,label); --train-split . if they are classes."
        )
    inner = {
        name: {n for n in level.folders} | level.unwrapped().holding
        for name, level in sorted(top.folders.items())
        if level.count and not level.images
    }
    for one, other in itertools.combinations(inner, 2):
        same = sorted(inner[one] & inner[other])
        is_said = planes not in (None, "none")
        if same and not is_said and not _are_scenes(top.folders[one], top.folders[other]):
            beside = sorted(top.holding - {one, other})
            raise UserError(
                f"{folder}: {one} and {other} look like splits, not classes: both hold the folders "
                f"{', '.join(same[:4])}"
                + (f"; beside them are {', '.join(beside[:4])}" if beside else "")
                + f". {_SAY_WHICH}; --train-split . if they are classes."
            )


def _are_scenes(one: Level, other: Level) -> bool:
    """Whether their folders are images, with a file a channel in each."""
    inside = [level for top in (one, other) for level in top.folders.values() if level.count]
    return all(are_channels([p.rpartition("/")[2] for p in level.images]) for level in inside)


def _class_files(folder: Path, root: Level) -> Files:
    """The images of a split with their folders as labels."""
    if root.images:
        count = len(root.images)
        logger.warning("%s: left out %d images that lie in no class folder", folder, count)
    for name in sorted(set(root.folders) - root.holding) if root.holding else ():
        files = root.folders[name].others
        logger.warning(
            "%s: %s holds no images%s and is no class", folder, root.place + name,
            f" (but {_count_suffixes(files)})" if files else "",
        )  # fmt: skip
    paths: list[Any] = []
    labels: list[Any] = []
    for name in sorted(root.folders):
        below = list(root.folders[name].below())
        paths += below
        labels += [name] * len(below)
    return Files(paths, labels, are_names=True)


# Parquet and the hub ------------------------------------------------------------------------------


def _load_parquet(
    files: list[Path], splits: Mapping[str, str | None], folder: Path | None = None, **options: Any
) -> dict[str, Any]:
    chosen = _parquet_splits(files, splits, folder)
    for split, group in chosen.items():
        if sum(map(_num_rows, group)) == 0:
            raise empty_split(f"{', '.join(group)} ({split})", split)
    # Paths that `datasets` does not take for patterns.
    literal = {split: [glob.escape(file) for file in group] for split, group in chosen.items()}
    try:
        return dict(datasets.load_dataset("parquet", data_files=literal, **options))
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise UserError(
            f"Cannot read the Parquet files of {folder or files[0]} "
            f"({', '.join(file.name for file in files)}): {reason}. Check the files; all of them "
            f"need the same columns."
        ) from error


def _parquet_splits(
    files: list[Path], splits: Mapping[str, str | None], folder: Path | None
) -> dict[str, list[str]]:
    """The files of each split, by their names or their folder's."""
    names = _split_names() | _split_names(splits.values())
    found: dict[str, list[str]] = {}
    for file in files:
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
        inside = file.parent != folder and file.parent.name.lower() in names
        name = file.parent.name if stem.lower() not in names and inside else stem
        found.setdefault(name, []).append(str(file))
    return choose_splits(found, splits, folder or files[0])


def _num_rows(file: str) -> int:
    try:
        return parquet.read_metadata(file).num_rows
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"Cannot read the Parquet file {file}: {reason}. Write it again, or take it out."
        ) from error


def empty_split(where: str, split: str) -> UserError:
    """The error for a split without rows."""
    return UserError(f"{where} is empty. Fill it, or leave it out with splits={{{split!r}: None}}.")


def _load_hub(name: str, splits: Mapping[str, str | None], **options: Any) -> dict[str, Any]:
    try:
        tables = datasets.load_dataset(name, **options)
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE")
        network = "unset HF_HUB_OFFLINE" if offline else "check the network"
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise FileNotFoundError(
            f"Data {name!r} is no local path, and the hub did not give it "
            f"({type(error).__name__}: {reason}). Check the name, {network}, or give {_KNOWN}."
        ) from error
    return choose_splits(tables, splits, name)

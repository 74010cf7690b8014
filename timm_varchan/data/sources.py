"""Where data comes from: a hub name, Parquet, list files, class folders, saved `datasets`.

Every source ends as rows of images and labels; nothing is decoded here. Folders are walked here and
not by `imagefolder`, which knows no `.npy` and takes a class folder named `test_tube` or
`bullet_train` for a split. What a walk leaves out is said in the log.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, Union

import datasets
import pyarrow.parquet as parquet
from datasets.exceptions import DatasetGenerationError

from timm_varchan.data.decode import IMAGE_SUFFIXES
from timm_varchan.errors import UserError

logger = logging.getLogger(__name__)

#: What a split is called in sources, by what it is called here, in any case; the first counts.
SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
HUB_ALIASES = {"mini-imagenet": "timm/mini-imagenet", "imagenet-mini": "timm/mini-imagenet"}
_KNOWN = "'synthetic', a folder of class folders, of Parquet or of train.txt lists, or a hub name"
_SAY_WHICH = "Say which is which with --train-split, --validation-split and --test-split (splits=)"
#: Folders that systems leave behind; names that begin with a dot are hidden anyway.
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})
#: What lies beside images without being meant as one.
_DOCUMENTS = frozenset(
    {"", ".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".yaml", ".yml", ".xml", ".html",
     ".pdf", ".py", ".ipynb", ".log", ".db", ".ini", ".parquet"}
)  # fmt: skip

_T = TypeVar("_T")


@dataclass(frozen=True)
class Files:
    """Image files with their labels: text, or whole numbers.

    Args:
        paths: From the folder of the tables.
        labels: One a file.
    """

    paths: list[str]
    labels: list[str] | list[int]

    def __len__(self) -> int:
        return len(self.paths)


Rows = Union[Files, datasets.Dataset]


@dataclass(frozen=True)
class Tables:
    """The rows of every split.

    Args:
        splits: `Rows` by `train`, `validation`, `test`.
        folder: What relative paths in the rows start from.
        name: What the data is called in results.
        row_names: What errors call the rows of a split, where these are only some of the source's.
    """

    splits: dict[str, Any]
    folder: Path
    name: str
    row_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


def load_tables(
    source: str,
    splits: Mapping[str, str | None],
    cache_dir: str | Path | None = None,
    *,
    streaming: bool = False,
) -> Tables:
    """Find out what a source is and read its rows.

    Args:
        source: Folder, file or hub name; see the module.
        splits: What the splits are called in the source where it is none of `SPLIT_ALIASES`; None
            leaves a split out. `"."` is a folder of class folders itself.
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
    if path.is_dir():
        return Tables(_load_folder(path, splits, options), path, path.resolve().name)
    if path.is_file() and path.suffix == ".parquet":
        return Tables(_load_parquet([path], splits, **options), path.parent, path.stem)
    if path.is_file() and streaming:
        raise _nothing_to_stream(path)
    if path.is_file() and path.suffix == ".txt":
        lists = _read_lists(choose_splits({path.stem: path}, splits, source))
        return Tables(dict(lists), path.parent, path.resolve().parent.name)
    if path.is_file():
        raise UserError(f"{source} is neither a .parquet nor a .txt file. Give {_KNOWN}.")
    if source.startswith((".", "/", "~")) or path.suffix in (".parquet", ".txt"):
        raise FileNotFoundError(f"There is no {source}. Check the path, or give {_KNOWN}.")
    name = HUB_ALIASES.get(source, source)
    return Tables(_load_hub(name, splits, **options), Path(), name)


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
        UserError: An asked split is not there, nothing is recognised, or names that differ in their
            case alone.
    """
    usual = _split_names(set(SPLIT_ALIASES) - set(splits))
    lower = Counter(name.lower() for name in found if name not in splits.values())
    doubled = [name for name, count in lower.items() if count > 1 and name in usual]
    if doubled:
        raise UserError(
            f"{source} has the split {doubled[0]!r} twice, in other cases: {', '.join(found)}. "
            f"{_SAY_WHICH}."
        )
    chosen = {
        split: name
        for split in SPLIT_ALIASES
        if (name := _name_of_split(split, found, splits, source)) is not None
    }
    if not chosen and len(found) == 1 and "train" not in splits:
        chosen["train"] = next(iter(found))
    if not chosen:
        raise UserError(
            f"{source} has no split that is called like one; it has {', '.join(found)}. "
            f"{_SAY_WHICH}."
        )
    unused = sorted(set(found) - set(chosen.values()))
    if unused and not set(splits) & {"train", "validation", "test"}:
        logger.warning("%s: left out %s, which is none of the splits", source, ", ".join(unused))
    return {split: found[name] for split, name in chosen.items()}


def _name_of_split(
    split: str, found: Mapping[str, Any], splits: Mapping[str, str | None], source: object
) -> str | None:
    if split in splits:
        wanted = splits[split]
        if wanted is not None and wanted not in found:
            raise UserError(f"{source} has no split {wanted!r}; it has {', '.join(found)}.")
        return wanted
    names = {name.lower(): name for name in found if name not in splits.values()}
    return next((names[alias] for alias in SPLIT_ALIASES[split] if alias in names), None)


def _split_names(splits: Iterable[str | None] = SPLIT_ALIASES) -> set[str]:
    """The usual names of splits, in lower case; of other words these themselves."""
    return {name for one in splits if one for name in SPLIT_ALIASES.get(one, (one.lower(),))}


# Folders ------------------------------------------------------------------------------------------


def walk(folder: Path) -> Iterator[tuple[str, ...]]:
    """Every visible file below a folder, as the parts of its path from there; links are followed.

    Names that begin with a dot, and what systems leave behind, are passed over. Folders come too,
    with an empty last part, and links to nothing as if they were files.
    """
    start = os.stat(folder)
    yield from _walk(str(folder), (), ((start.st_dev, start.st_ino),))


def _walk(
    folder: str, parts: tuple[str, ...], above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, ...]]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        here = (*parts, entry.name)
        if not entry.is_dir():
            yield here
        elif entry.name not in _SYSTEM_FOLDERS:
            about = entry.stat()
            own = (about.st_dev, about.st_ino)
            yield (*here, "")
            if own not in above:  # a link to a folder that holds it
                yield from _walk(entry.path, here, (*above, own))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _count_suffixes(names: Iterable[str]) -> str:
    counts = Counter(_suffix(name) or "without an ending" for name in names)
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


def _say_left_out(folder: Path, files: Iterable[tuple[str, ...]]) -> None:
    """A line about the files whose ending is none of an image."""
    names = [parts[-1] for parts in files if parts[-1]]
    others = [n for n in names if _suffix(n) not in IMAGE_SUFFIXES and _suffix(n) not in _DOCUMENTS]
    if others:
        logger.warning(
            "%s: left out %d files by their ending: %s",
            folder,
            len(others),
            _count_suffixes(others),
        )


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
        found = list(walk(path))
        _say_left_out(path, found)
        below = sorted(path.joinpath(*p) for p in found if _suffix(p[-1]) in IMAGE_SUFFIXES)
        if not below:
            raise UserError(
                f"There are no images below {path}. Files are taken by their ending: "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        files += below
    if not files:
        raise UserError("There are no files to predict. Give image files or folders.")
    return files


def _nothing_to_stream(path: Path) -> UserError:
    return UserError(f"{path} holds no Parquet files, which --streaming reads. Leave it out.")


def _load_folder(
    folder: Path, splits: Mapping[str, str | None], options: Mapping[str, Any]
) -> dict[str, Any]:
    is_saved = any((folder / f"dataset_{name}.json").is_file() for name in ("dict", "info"))
    if is_saved and "streaming" not in options:
        saved = datasets.load_from_disk(str(folder))
        return choose_splits(
            saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}, splits, folder
        )
    found = list(walk(folder))
    tables = [folder.joinpath(*parts) for parts in found if _suffix(parts[-1]) == ".parquet"]
    named = _split_names() | _split_names(splits.values())
    texts = (Path(p[0]) for p in found if len(p) == 1 and _suffix(p[0]) == ".txt")
    lists = {file.stem: folder / file for file in texts if file.stem.lower() in named}
    if not tables and "streaming" in options:
        raise _nothing_to_stream(folder)
    if not tables and not lists:
        _say_left_out(folder, found)
        return dict(_load_class_folders(folder, found, splits))
    images = sum(_suffix(parts[-1]) in IMAGE_SUFFIXES for parts in found)
    if tables:
        if images:
            logger.warning("%s: left out %d images beside the Parquet files", folder, images)
        return _load_parquet(tables, splits, folder, **options)
    return dict(_read_lists(choose_splits(lists, splits, folder)))


# Class folders ------------------------------------------------------------------------------------


class _Level:
    """A folder whose folders are splits or classes.

    Args:
        found: What `walk` gave, from this folder.
        prefix: Where it lies in the folder of the data.
    """

    def __init__(self, found: list[tuple[str, ...]], prefix: tuple[str, ...] = ()) -> None:
        self.found, self.prefix = found, prefix
        self.images = [p for p in found if _suffix(p[-1]) in IMAGE_SUFFIXES]
        self.num_loose = sum(len(p) == 1 for p in self.images)
        self.holding = {p[0] for p in self.images if len(p) > 1}
        self.direct = {p[0] for p in self.images if len(p) == 2}

    @cached_property
    def folders(self) -> dict[str, _Level]:
        """Its folders by name."""
        below: dict[str, list[tuple[str, ...]]] = {}
        for name, *rest in self.found:
            if rest:
                below.setdefault(name, []).append(tuple(rest))
        return {
            name: _Level([p for p in paths if p != ("",)], (*self.prefix, name))
            for name, paths in below.items()
        }

    @property
    def is_wrapper(self) -> bool:
        """Whether all images lie in folders of one folder."""
        return len(self.holding) == 1 and not self.direct and not self.num_loose

    def unwrapped(self) -> _Level:
        """Without folders that hold one folder only, which holds several."""
        level = self
        while level.is_wrapper:
            level = level.folders[next(iter(level.holding))]
        return level


def _load_class_folders(
    folder: Path, found: list[tuple[str, ...]], splits: Mapping[str, str | None]
) -> dict[str, Files]:
    top = _Level(found)
    names = _split_folders(top, splits)
    if not names:
        inner = top.unwrapped()
        if inner is not top:
            logger.info("%s: reading %s in it", folder, "/".join(inner.prefix))
        top, names = inner, _split_folders(inner, splits)
    if names:
        # A split holds class folders; a class that is called "train" holds images.
        chosen = choose_splits({n: top.folders[n] for n in names}, splits, folder)
        _say_not_chosen(folder, top, chosen.values())
        if all(level.is_wrapper for level in chosen.values()):  # seg_train/seg_train/CLASS
            chosen = {split: level.unwrapped() for split, level in chosen.items()}
    elif "." in splits.values():
        chosen = choose_splits({".": top}, splits, folder)
    else:
        _refuse_equal_subfolders(folder, top)
        chosen = choose_splits({"train": top}, splits, folder)
    tables = {split: _class_files(folder, level) for split, level in chosen.items()}
    if not any(len(table) for table in tables.values()):
        raise UserError(
            f"{folder} has no images in class folders, no Parquet files and no train.txt. It needs "
            f"CLASS/image.png or train/CLASS/image.png, train.parquet, or train.txt."
        )
    return tables


def _split_folders(level: _Level, splits: Mapping[str, str | None]) -> list[str]:
    """Folders of folders that are splits, by the caller's names or the usual ones."""
    if "." in splits.values():
        return []
    holders = sorted(name for name, inner in level.folders.items() if inner.folders)
    asked = set(splits.values())
    return [name for name in holders if name in asked or name.lower() in _split_names()]


def _refuse_equal_subfolders(folder: Path, top: _Level) -> None:
    """Folders that hold the same folders are splits or sources, hardly classes."""
    inner = {
        name: set(level.folders) | level.unwrapped().holding
        for name, level in sorted(top.folders.items())
        if name in top.holding and name not in top.direct
    }
    for one, other in itertools.combinations(inner, 2):
        same = sorted(inner[one] & inner[other])
        if same:
            beside = sorted(top.holding - {one, other})
            raise UserError(
                f"{folder}: {one} and {other} look like splits, not classes: both hold the folders "
                f"{', '.join(same[:4])}"
                + (f"; beside them are {', '.join(beside[:4])}" if beside else "")
                + f". {_SAY_WHICH}; --train-split . if they are classes."
            )


def _say_not_chosen(folder: Path, top: _Level, chosen: Iterable[_Level]) -> None:
    taken = {level.prefix[-1] for level in chosen}
    others = {n: sum(p[0] == n for p in top.images) for n in sorted(top.holding - taken)}
    if others:
        named = ", ".join(f"{name}/ ({count} images)" for name, count in others.items())
        logger.warning("%s: left out %s, which is none of the splits", folder, named)


def _class_files(folder: Path, root: _Level) -> Files:
    """The images of a split with their folders as labels."""
    if root.num_loose:
        logger.warning("%s: left out %d images that lie in no class folder", folder, root.num_loose)
    for name in sorted(set(root.folders) - root.holding) if root.holding else ():
        files = [p[-1] for p in root.folders[name].found if p[-1]]
        logger.warning(
            "%s: %s holds no images%s and is no class", folder, "/".join((*root.prefix, name)),
            f" (but {_count_suffixes(files)})" if files else "",
        )  # fmt: skip
    images = [parts for parts in root.images if len(parts) > 1]
    return Files([str(Path(*root.prefix, *p)) for p in images], [p[0] for p in images])


# Lists --------------------------------------------------------------------------------------------


def _read_lists(files: Mapping[str, Path]) -> dict[str, Files]:
    """Lists of `path label`; labels are numbers where those of all lists are."""
    lists = {split: _read_list(file) for split, file in files.items()}
    if not all(re.fullmatch(r"[+-]?\d+", str(x)) for rows in lists.values() for x in rows.labels):
        return lists
    return {s: Files(rows.paths, [int(x) for x in rows.labels]) for s, rows in lists.items()}


def _read_list(path: Path) -> Files:
    """Rows of `path label` lines; paths may hold spaces and start at the file's folder."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text: {error}. Write one 'path label' a line."
        ) from error
    images, labels = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.rsplit(maxsplit=1)
        if not parts:
            continue
        if len(parts) != 2:
            raise UserError(f"{path} line {number} is {line!r}; it needs 'path label'.")
        images.append(parts[0].strip())
        labels.append(parts[1])
    return Files(images, labels)


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
    known = _split_names() | _split_names(splits.values())
    found: dict[str, list[str]] = {}
    for file in files:
        stem = re.sub(r"-\d+-of-\d+$", "", file.stem)
        inside = file.parent != folder and file.parent.name.lower() in known
        name = file.parent.name if stem.lower() not in known and inside else stem
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

"""One image in several files: a microscope's file a channel, a satellite's file a band.

Which files belong together a pattern says (`--planes "{image}_w{channel}.tif"`), or their names
where these make it plain. What is not there stays None.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from timm_varchan.channels import ChannelSet
from timm_varchan.data.decode import decode
from timm_varchan.data.lists import natural
from timm_varchan.data.plane_names import find_planes, label_of, satellite_of
from timm_varchan.data.records import Files
from timm_varchan.errors import ImageError, UserError

logger = logging.getLogger(__name__)

_WORDS = (
    "red|green|blue|yellow|nir|swir1|swir2|rededge|dapi|hoechst|gfp|egfp|rfp|yfp|cfp|mcherry|cy3|"
    "cy5|fitc|tritc|brightfield|phase|dna|er|rna|agp|mito|actin|tubulin|golgi"
)
_START = r"(?P<image>(?:.*/)?(?:[^/]*[_\-. ])?)"
_END = r"(?=$|[_\-. ])"
#: How names say a channel: MetaXpress, Harmony, CellVoyager, satellites' bands, words.
_PLAIN = tuple(
    re.compile(text, re.I)
    for text in (
        rf"{_START}(?P<channel>(?:w|c|ch|channel|band)[_\-]?\d{{1,2}})(?P<rest>{_END}[^/]*)",
        r"(?P<image>.*_)(?P<channel>w\d)(?P<rest>[0-9A-F]{8}-[0-9A-F-]+)",
        r"(?P<image>.*-)(?P<channel>ch\d{1,2})(?P<rest>sk\d.*)",
        r"(?P<image>.*Z\d\d)(?P<channel>C\d\d)(?P<rest>)",
        rf"{_START}(?P<channel>B(?:0?[1-9]|1[0-2]|8A))(?P<rest>{_END}[^/]*)",
        rf"{_START}(?P<channel>{_WORDS})(?P<rest>{_END}[^/]*)",
    )
)
#: What differs between the files of one image without telling images apart: resolution, a GUID.
_SAME = re.compile(r"[_\-]\d+m(?=$|[_\-.])|[0-9A-F]{8}-[0-9A-F-]{20,}|(?<=/)R\d+m/", re.I)
_MAX_PLANES = 64
_PARTS = {"image": "(?P<image>[^/]+)", "channel": "(?P<channel>[^/]+?)"}
_CURE = "--planes none (planes='none') takes every file for an image"

Match = Callable[[str], "tuple[str, str] | None"]


def put_together(
    splits: Mapping[str, Files], pattern: str | None, folder: Path, wanted: Sequence[str] = ()
) -> tuple[dict[str, Files], tuple[str, ...]]:
    """Rows of one file each as rows of one image each, where images are several files.

    Args:
        splits: The rows.
        pattern: Of the names: `{image}` and `{channel}`, `*` for anything; `"none"` for no
            grouping; None: as the names say, where they are plain.
        folder: What the paths start from.
        wanted: Names of channels that are asked for: words that names may say.

    Returns:
        The rows with a tuple of paths each, and what the planes are called; no names where every
        image is one file.

    Raises:
        UserError: A pattern that no file fits, files of one image with different labels or splits.
    """
    named = next((rows.planes for rows in splits.values() if rows.planes), ())
    if named:
        return dict(splits), named
    paths = [p for rows in splits.values() for row in rows.paths for p in _each(row)]
    if pattern == "none" or not paths:
        return dict(splits), ()
    match = _of_pattern(pattern) if pattern else _plain(paths, folder, wanted)
    several = next(
        (row for rows in splits.values() for row in rows.paths if isinstance(row, tuple)), None
    )
    if match is None and several is not None:
        raise UserError(
            f"An image is several files ({', '.join(several[:3])}, ...), and their names do not "
            f'say which channel each is. Say it with --planes, as "{{image}}_w{{channel}}.tif".'
        )
    if match is None:
        return dict(splits), ()
    found = {split: _images(rows, match) for split, rows in splits.items()}
    names = sorted(
        {n for images in found.values() for _, files in images.values() for n in files}, key=natural
    )
    if not names:
        raise UserError(
            f"No file fits --planes {pattern!r}, the first is {paths[0]!r}. {{image}} and "
            f"{{channel}} stand for what differs, * for anything; the rest has to be the same."
        )
    _refuse_divided(found)
    for split, images in found.items():
        classes = {label for label, _ in images.values()}
        if splits[split].are_names and len(classes) == len(images) > 1:
            raise UserError(
                f"The folders of {folder} are one image each ({', '.join(names)}), not classes: "
                f"{', '.join(sorted(classes)[:3])}, ... Put folders of classes around them, or "
                f"labels.csv (path,label) beside them; {_CURE}."
            )
    _say(found, names, len(paths), folder, pattern is None)
    return {
        split: Files(
            [tuple(files.get(n) for n in names) for _, files in images.values()],
            [label for label, _ in images.values()],
            splits[split].are_names,
        )
        for split, images in found.items()
    }, tuple(names)


def _each(row: Any) -> tuple[str, ...]:
    return row if isinstance(row, tuple) else () if row is None else (row,)


Images = dict[str, tuple[Any, dict[str, str]]]


def _images(rows: Files, match: Match) -> Images:
    """Label and files by channel of every image; of several files of a channel the first counts."""
    found: Images = {}
    for row, label in zip(rows.paths, rows.labels, strict=True):
        for path in _each(row):
            place = match(path)
            if place is None:
                continue
            first_label, files = found.setdefault(place[0], (label, {}))
            if first_label != label:
                raise UserError(
                    f"{path} has the label {label!r}, another file of the same image "
                    f"{first_label!r}. Write one label an image, or {_CURE}."
                )
            files.setdefault(place[1], path)
    return found


def _refuse_divided(found: Mapping[str, Images]) -> None:
    for (split, images), (other_split, others) in itertools.combinations(found.items(), 2):
        both = sorted(set(images) & set(others))
        if both:
            raise UserError(
                f"Files of the image {both[0]} are in {split} and in {other_split} ({len(both)} "
                f"such images). Put all files of an image into one split."
            )


def _say(
    found: Mapping[str, Images], names: Sequence[str], num_files: int, folder: Path, plain: bool
) -> None:
    images = [files for group in found.values() for _, files in group.values()]
    used = sum(map(len, images))
    logger.warning(
        "%s: %d files are the planes of %d images, one file a channel (%s)%s%s",
        folder, used, len(images), ", ".join(names),
        f"; {num_files - used} files left out" if used < num_files else "",
        f". {_CURE}" if plain else "",
    )  # fmt: skip


# Patterns -----------------------------------------------------------------------------------------


def _of_pattern(pattern: str) -> Match:
    """Image and channel of a path by a pattern of its last parts."""
    if "{channel}" not in pattern:
        raise UserError(
            f'--planes {pattern!r} has no {{channel}}. Write it as "{{image}}_w{{channel}}.tif".'
        )
    text, seen = "", set()
    for part in re.split(r"(\{image\}|\{channel\}|\*)", pattern):
        name = part.strip("{}")
        if part == "*":
            text += "[^/]*"
        elif part in ("{image}", "{channel}"):
            text += f"(?P={name})" if name in seen else _PARTS[name]
            seen.add(name)
        else:
            text += re.escape(part)
    return _matcher(re.compile(f"(?P<place>(?:.*/)?){text}", re.I), has_ending=True)


def _plain(paths: Sequence[str], folder: Path, wanted: Sequence[str]) -> Match | None:
    """How the names say image and channel, if they do so plainly: see `_is_plain`."""
    some = paths[:: max(1, len(paths) // 50)]
    for match in (*map(_matcher, _PLAIN), *_by_words(paths, some, wanted)):
        if sum(match(path) is not None for path in some) < 0.95 * len(some):
            continue
        groups: dict[str, set[str]] = {}
        for path in paths:
            if (place := match(path)) is not None:
                groups.setdefault(place[0], set()).add(place[1].lower())
        if _is_plain(groups) and _is_one_plane(folder / paths[0]):
            return match
    return None


def _by_words(paths: Sequence[str], some: Sequence[str], wanted: Sequence[str]) -> Iterator[Match]:
    """Ways to take one part of the names for the channel, where words of channels stand in it.

    The wanted channels' all, or known ones, two at least and half of what stands there; some of the
    names have one too.
    """
    asked = {re.sub(r"[\W_]+", "", name).lower() for name in wanted}
    for place in (-1, -2, -3, -4, 0, 1, 2):
        match = _at(place)
        few = {found[1].lower() for path in some if (found := match(path))}
        if not few & asked and not any(re.fullmatch(_WORDS, word) for word in few):
            continue
        words = {found[1].lower() for path in paths if (found := match(path))}
        num_known = sum(re.fullmatch(_WORDS, word) is not None for word in words)
        if len(words) <= _MAX_PLANES and (
            1 < len(asked) <= len(asked & words) or (num_known > 1 and 2 * num_known >= len(words))
        ):
            yield match


def _at(place: int) -> Match:
    def match(path: str) -> tuple[str, str] | None:
        folder, slash, name = path.rpartition(".")[0].rpartition("/")
        parts = re.split(r"([_\-. ])", name)
        at = 2 * place if place >= 0 else 2 * place + 1
        if not -len(parts) <= at < len(parts) or not parts[at]:
            return None
        channel, parts[at] = parts[at], ""
        return folder + slash + _SAME.sub("", "".join(parts)), channel

    return match


def are_channels(names: Sequence[str]) -> bool:
    """Whether these files are one image's, by names that say nothing but the channel."""
    found = [[match("/" + name) for name in names] for match in map(_matcher, _PLAIN)]
    return len(names) > 1 and any(all(f and f[0] == "/" for f in files) for files in found)


def _matcher(compiled: re.Pattern[str], has_ending: bool = False) -> Match:
    """Image and channel by the groups of a pattern, of whole names or of those without ending."""

    def match(path: str) -> tuple[str, str] | None:
        found = compiled.fullmatch(path if has_ending else path.rpartition(".")[0])
        if found is None:
            return None
        parts = found.groupdict("")
        image = "".join(parts.get(name, "") for name in ("place", "image", "rest"))
        return (image if has_ending else _SAME.sub("", image)), parts["channel"]

    return match


def _is_plain(groups: Mapping[str, set[str]]) -> bool:
    """Whether most images have all of several channels."""
    channels = set().union(*groups.values())
    whole = Counter(len(group) == len(channels) for group in groups.values())
    return 1 < len(channels) <= _MAX_PLANES and whole[True] > whole[False]


def _is_one_plane(path: Path) -> bool:
    try:
        return decode(str(path)).num_planes == 1
    except ImageError:
        return False


# Channels and pixels ------------------------------------------------------------------------------


def channels_of_files(names: Sequence[str], path: str) -> ChannelSet:
    """The channels that files are of by what they are called; names that nobody knows are new."""
    satellite = satellite_of(path.rpartition("/")[2])
    return ChannelSet(tuple(label_of(name, None, satellite) for name in names))


def order_of(found: ChannelSet, names: Sequence[str], wanted: ChannelSet) -> tuple[int, ...]:
    """Which file each wanted channel is: by its name, else by place where the counts agree.

    Raises:
        UserError: Neither.
    """
    order = find_planes(found.channels, wanted.channels)
    if None not in order:
        return tuple(place for place in order if place is not None)
    if len(wanted) == len(found) and all(place is None for place in order):
        pairs = ", ".join(f"{n} is {c.label}" for n, c in zip(names, wanted, strict=True))
        logger.warning("The files of an image are taken in order: %s", pairs)
        return tuple(range(len(found)))
    raise UserError(
        f"An image is several files put together, one each for {', '.join(names)}; the channels "
        f"are {wanted}. Say --channels with these names, or as many in this order."
    )

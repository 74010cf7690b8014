"""A look at some images of a source, for what nobody said: what the planes are, how they scale."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from timm_varchan.channels import RGB, ChannelSet, known_channels, seeded_rng
from timm_varchan.data.decode import Planes, fit
from timm_varchan.data.rows import RowReader
from timm_varchan.data.transforms import scale_values
from timm_varchan.errors import ImageError, UserError

logger = logging.getLogger(__name__)

#: Images that are looked at, drawn with a fixed seed: in steps, kinds that take turns stay unseen.
_NUM_IMAGES = 24
#: Fraction of an image that has one number in all planes, from which it is told.
_LARGE_BORDER = 0.05


@dataclass(frozen=True)
class Look:
    """What was seen.

    Args:
        seen: Some pixels of the images by row.
        failures: Why others cannot be read, by row.
    """

    seen: dict[int, Planes]
    failures: dict[int, str]


def look_at(reader: RowReader) -> Look:
    """Decode some images of a split."""
    look, num_rows = Look({}, {}), len(reader)
    for row in sorted(seeded_rng("look").sample(range(num_rows), min(_NUM_IMAGES, num_rows))):
        try:
            look.seen[row] = _thinned(reader.planes(row))
        except ImageError as error:
            look.failures[row] = str(error)
    return look


def _thinned(planes: Planes) -> Planes:
    """Some of the pixels, so that many large images can be looked at together."""
    step = max(1, max(planes.image.shape[1:]) // 128)
    valid = planes.valid
    if valid is not None:
        valid = valid[:, ::step, ::step]
    return replace(planes, image=planes.image[:, ::step, ::step].copy(), valid=valid)


def refuse_all_alike(reader: RowReader, look: Look) -> None:
    """One error for what is wrong with every image, not one a row.

    Raises:
        UserError: None of several images becomes an image of the channels.
    """
    failures = dict(look.failures)
    for row, planes in look.seen.items():
        try:
            reader.image_of(planes)
        except ImageError as error:
            failures[row] = str(error)
    if len(failures) < len(look.seen) + len(look.failures) or len(failures) < 2:
        return
    row = min(failures)
    alike = len({re.sub(r"[\d.]+", "0", text) for text in failures.values()}) == 1
    raise UserError(
        f"{reader.split}: none of {len(failures)} images that were looked at can be taken"
        f"{', all for one reason' if alike else ''}. {reader.name(row)}: {failures[row]}."
    )


def guess_channels(seen: Mapping[int, Planes]) -> ChannelSet:
    """The channels of images about which nothing was said.

    What the files call them, if all call them the same; else RGB for three planes, also with gray
    images among them; else anonymous.

    Args:
        seen: Some images by their rows.

    Raises:
        UserError: They differ in their number of planes.
    """
    labels = [planes.labels for planes in seen.values()]
    if len(set(map(frozenset, labels))) == 1:  # in another order they are found by name
        named = labels[0]
        if named and not any(c.is_anonymous for c in named):
            logger.info("The files call their planes %s.", "+".join(c.label for c in named))
            return ChannelSet(named)
    counts: dict[int, int] = {}
    for row, planes in seen.items():
        counts.setdefault(planes.num_planes, row)
    if 3 in counts and set(counts) <= {1, 3}:
        return RGB
    if len(counts) > 1:
        found = ", ".join(f"{count} in row {row}" for count, row in counts.items())
        raise UserError(f"The images differ in their number of planes ({found}). Say --channels.")
    return ChannelSet.anonymous(next(iter(counts)))


def channels_there(look: Look, channels: ChannelSet) -> ChannelSet:
    """The channels that every image has which was looked at, by what files call their planes."""
    there = set(range(len(channels)))
    for planes in look.seen.values():
        with contextlib.suppress(ImageError):  # raised again when the image is asked for
            taken = fit(planes, channels, partial=True)[1]
            there &= there if taken is channels else set(channels.index(taken))
    if not 0 < len(there) < len(channels):
        return channels
    found = channels.take(sorted(there))
    logger.warning("The files have %d of the %d channels: %s.", len(found), len(channels), found)
    return found


def warn_of_borders(reader: RowReader, look: Look) -> None:
    """A line on large parts where all planes are one number, as where nothing was measured."""
    shares: dict[float, list[float]] = {}
    for planes in look.seen.values():
        image = planes.image[: planes.num_planes]
        if (image.dtype == np.uint8 and len(image) <= 3) or planes.valid is not None:
            continue  # photographs and drawings have black and white of their own
        for value in {image[0, y, x].item() for y in (0, -1) for x in (0, -1)}:
            share = float((image == value).all(0).mean())
            if share >= _LARGE_BORDER:
                shares.setdefault(value, []).append(share)
    for value, found in shares.items():
        if value != reader.spec.no_data_value and value > -9999:  # known without a word
            logger.warning(
                "%s: %d of %d images are %g in all planes at once, at the border too, in %.0f %% "
                "of their pixels. If nothing was measured there, say --no-data-value %g.",
                reader.split, len(found), len(look.seen), value,
                100 * sum(found) / len(found), value,
            )  # fmt: skip


# Scale --------------------------------------------------------------------------------------------


def with_scale(reader: RowReader, look: Look) -> ChannelSet:
    """The reader's channels, without their usual mean and deviation where these cannot be theirs.

    Raises:
        UserError: Measured mean and deviation that one factor brings to those of the images.
    """
    channels = reader.channels
    if channels.value_scale is None:
        _warn_of_types(reader, look)
    problem, is_factor = _scale_problem(reader, look)
    if problem is None:
        return channels
    problem = f"{reader.split}: {problem}."
    if _has_usual_statistics(channels):
        logger.warning(
            "%s Mean and deviation have to be measured (training does); --value-scale says what "
            "stored numbers are divided by.", problem,
        )  # fmt: skip
        return ChannelSet(
            tuple(replace(channel, mean=None, std=None) for channel in channels),
            value_scale=channels.value_scale,
        )
    if is_factor and channels.value_scale is None:
        raise UserError(
            f"{problem} Say --value-scale (value_scale=): what stored numbers were divided by "
            f"when these were measured, 65535 for the range of 16 bits."
        )
    logger.warning("%s Is --value-scale right?", problem)
    return channels


def _warn_of_types(reader: RowReader, look: Look) -> None:
    """A line on images of several types, whose numbers are divided by different ranges."""
    types: dict[str, list[int]] = {}
    for row, planes in look.seen.items():
        if planes.names.scaling is None:
            bits = "" if planes.white is None else f" of 0 to {planes.white:g}"
            types.setdefault(f"{planes.image.dtype}{bits}", []).append(row)
    if len(types) < 2:
        return
    shown = []
    for name, rows in types.items():
        images = [reader.image_of(look.seen[row]) for row in rows if _can_read(reader, look, row)]
        means = [float(scale_values(image).nanmean()) for image in images]
        mean = f", mean {sum(means) / len(means):.3g} after scaling" if means else ""
        shown.append(f"{name} (as {reader.name(rows[0])}{mean})")
    logger.warning(
        "%s: the images are of different types, each divided by its own range: %s. Say "
        "--value-scale where their numbers mean the same, or write all alike.",
        reader.split, "; ".join(shown),
    )  # fmt: skip


def _can_read(reader: RowReader, look: Look, row: int) -> bool:
    try:
        reader.image_of(look.seen[row])
    except ImageError:
        return False
    return True


def _has_usual_statistics(channels: ChannelSet) -> bool:
    """Whether mean and deviation are those that come with the names, not measured ones."""
    known = known_channels()
    return all(c.name in known and known[c.name] == c for c in channels)


def _scale_problem(reader: RowReader, look: Look) -> tuple[str | None, bool]:
    """Why the channels' mean and deviation cannot be those of images; if one factor explains it.

    Bounds are wide, since darker or flatter images than usual are no fault: two deviations for the
    mean (four if it was measured), a fifth to five times for the deviation; under usual statistics
    other types than 8 bits also need values that reach from about 0 to about 1.
    """
    channels = reader.channels
    if channels.mean is None or channels.std is None:
        return None, False
    images = [reader.image_of(p) for row, p in look.seen.items() if _can_read(reader, look, row)]
    are_bytes = all(image.dtype == torch.uint8 for image in images)
    flat = [scale_values(image).flatten(1).to(torch.float64) for image in images]
    values = torch.cat(flat, 1) if flat else torch.zeros(len(channels), 0)
    values = values[:, values.isfinite().all(0)]
    if values.shape[1] == 0:
        return None, False
    mean, std = values.mean(1), values.std(1, correction=0)
    usual_mean, usual_std = torch.tensor(channels.mean), torch.tensor(channels.std)
    away = ((mean - usual_mean).abs() / usual_std).max().item()
    ratio = (std / usual_std).clamp_min(1e-12)
    low, high = values.min().item(), values.max().item()
    is_usual = _has_usual_statistics(channels)
    is_off = away > (2 if is_usual else 4) or not 0.2 <= ratio.min() <= ratio.max() <= 5
    if is_usual and not are_bytes:
        is_off = is_off or low < -0.05 or not 0.5 <= high <= 1.5
    if not is_off:
        return None, False
    both = ratio / (mean / usual_mean).clamp_min(1e-12)  # 1 where only the scale differs
    one_side = bool((ratio < 0.2).all() or (ratio > 5).all())
    text = (
        f"its values, {low:.4g} to {high:.4g} after scaling, have mean {mean.mean():.4g} and "
        f"deviation {std.mean():.4g}; the channels {channels} stand for mean "
        f"{usual_mean.mean():.3g} and deviation {usual_std.mean():.3g}"
    )
    return text, one_side and bool(((both > 0.25) & (both < 4)).all())

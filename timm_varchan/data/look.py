"""A look at some images of a source, for what nobody said: what the planes are, how they scale."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from timm_varchan.channels import RGB, ChannelSet, known_channels, seeded_rng
from timm_varchan.data.decode import Planes
from timm_varchan.data.planes import channels_of_files, order_of
from timm_varchan.data.reading import Reading, fit
from timm_varchan.data.records import ROW_CURE, Records
from timm_varchan.data.transforms import scale_values
from timm_varchan.errors import ImageError, UserError

logger = logging.getLogger(__name__)

#: Images that are looked at, drawn with a fixed seed: in steps, kinds that take turns stay unseen.
_NUM_IMAGES = 24
#: Fraction of an image that has one number in all planes, from which it is told.
_LARGE_BORDER = 0.05


@dataclass(frozen=True)
class Look:
    """What was seen of some images of a split, by their rows.

    Args:
        records: The images.
        seen: Some pixels of them, as they are stored.
        images: What a reading makes of these.
        failures: Why others cannot be read.
    """

    records: Records
    seen: dict[int, Planes] = field(default_factory=dict)
    images: dict[int, Tensor] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @classmethod
    def at(cls, records: Records, reading: Reading) -> Look:
        """Decode some images of which no file is missing."""
        look, paths = cls(records), records.paths
        rows = [r for r in range(len(records)) if not (paths and _is_incomplete(paths[r]))]
        for row in sorted(seeded_rng("look").sample(rows, min(_NUM_IMAGES, len(rows)))):
            try:
                look.seen[row] = _thinned(reading.decode(records[row]))
            except ImageError as error:
                look.failures[row] = str(error)
        return look

    def by(self, reading: Reading) -> Look:
        """The same with the images that this reading makes.

        Raises:
            UserError: None of several images can be taken; said once, not once a row.
        """
        look = Look(self.records, self.seen, {}, dict(self.failures))
        for row, planes in self.seen.items():
            try:
                look.images[row] = reading.image(planes)
            except ImageError as error:
                look.failures[row] = str(error)
        if look.images or len(look.failures) < 2:
            return look
        row, name = min(look.failures), self.records.name(min(look.failures))
        is_alike = len({re.sub(r"[\d.]+", "0", text) for text in look.failures.values()}) == 1
        raise UserError(
            f"{self.records.split}: none of {len(look.failures)} images that were looked at can be "
            f"taken{', all for one reason' if is_alike else ''}. {name}: {look.failures[row]}."
        )


def _is_incomplete(value: object) -> bool:
    return isinstance(value, tuple) and None in value


def _thinned(planes: Planes) -> Planes:
    """Some of the pixels, so that many large images can be looked at together."""
    step = max(1, max(planes.image.shape[1:]) // 128)
    valid = planes.valid
    if valid is not None:
        valid = valid[:, ::step, ::step]
    return replace(planes, image=planes.image[:, ::step, ::step].copy(), valid=valid)


def settle(
    records: Records, reading: Reading, planes: Sequence[str], *, guess: bool, partial: bool
) -> Reading:
    """A reading with the channels of the images, after a look at some of them.

    Args:
        records: The images of one split.
        reading: What was said of the channels; maybe nothing.
        planes: What the files of an image are called, where it lies in several.
        guess: Whether planes that nobody named may get names.
        partial: Whether channels that all files lack may be left out.

    Raises:
        UserError: None of the images can be taken; planes and names that do not fit.
    """
    channels = asked = reading.channels
    if planes:
        named = channels_of_files(planes, records.name(0))
        files = order_of(named, planes, asked) if len(asked) else range(len(named))
        if not len(asked):
            channels = (named if guess else named.without_identity()).with_scale(*_scale_of(asked))
        reading = replace(reading.with_channels(channels), files=tuple(files))
        _say_sizes(records, reading)
    look = Look.at(records, reading)
    if not len(channels):
        if not look.seen:
            look = look.by(reading)
            row = min(look.failures)
            problem = f"cannot be read: {look.failures[row]}"
            raise UserError(records.where(row, problem) + ROW_CURE)
        found = _guess_channels(look.seen)
        channels = (found if guess else found.without_identity()).with_scale(*_scale_of(asked))
    elif partial and not planes:
        channels = _channels_there(look, channels)
    reading = reading.with_channels(channels)
    look = look.by(reading)
    _warn_of_borders(look, reading.spec.no_data_value)
    if channels.value_scale is None:
        _warn_of_types(look)
    return reading.with_channels(_with_scale(look, channels))


def _scale_of(channels: ChannelSet) -> tuple[float | None, float]:
    return channels.value_scale, channels.value_offset


def _say_sizes(records: Records, reading: Reading) -> None:
    """A line on files of lower resolution, by those of the first whole image."""
    whole = next((paths for paths in records.paths if None not in paths), None)
    if whole is None:
        return
    try:
        parts = [reading.decode(whole[place]) for place in reading.files]
    except ImageError:  # raised again when the image is asked for
        return
    shapes = [part.image.shape[1:] for part in parts]
    pairs = zip(reading.channels, shapes, strict=True)
    low = [f"{c.label} ({s[0]} x {s[1]})" for c, s in pairs if s != max(shapes)]
    if low:
        logger.warning(
            "%s: planes of lower resolution are brought to the finest, %d x %d, by repeated "
            "pixels: %s", records.split, *max(shapes), ", ".join(low),
        )  # fmt: skip


def _guess_channels(seen: Mapping[int, Planes]) -> ChannelSet:
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


def _channels_there(look: Look, channels: ChannelSet) -> ChannelSet:
    """The channels that every image has which was looked at, by what files call their planes."""
    places = set(range(len(channels)))
    for planes in look.seen.values():
        with contextlib.suppress(ImageError):  # raised again when the image is asked for
            taken = fit(planes, channels, partial=True)[1]
            places &= places if taken is channels else set(channels.index(taken))
    if not 0 < len(places) < len(channels):
        return channels
    found = channels.take(sorted(places))
    logger.warning("The files have %d of the %d channels: %s.", len(found), len(channels), found)
    return found


def _warn_of_borders(look: Look, no_data_value: float | None) -> None:
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
        if value != no_data_value and value > -9999:  # known without a word
            logger.warning(
                "%s: %d of %d images are %g in all planes at once, at the border too, in %.0f %% "
                "of their pixels. If nothing was measured there, say --no-data-value %g.",
                look.records.split, len(found), len(look.seen), value,
                100 * sum(found) / len(found), value,
            )  # fmt: skip


# Scale --------------------------------------------------------------------------------------------


def _with_scale(look: Look, channels: ChannelSet) -> ChannelSet:
    """The channels, without their usual mean and deviation where these cannot be the images'.

    Raises:
        UserError: Measured mean and deviation that one factor brings to those of the images.
    """
    problem, is_factor = _scale_problem(look, channels)
    if problem is None:
        return channels
    problem = f"{look.records.split}: {problem}."
    if _has_usual_statistics(channels):
        logger.warning(
            "%s Mean and deviation have to be measured (training does); --value-scale says what "
            "stored numbers are divided by.", problem,
        )  # fmt: skip
        without = tuple(replace(channel, mean=None, std=None) for channel in channels)
        return ChannelSet(without, value_scale=channels.value_scale)
    if is_factor and channels.value_scale is None:
        raise UserError(
            f"{problem} Say --value-scale (value_scale=): what stored numbers were divided by "
            f"when these were measured, 65535 for the range of 16 bits."
        )
    logger.warning("%s Is --value-scale right?", problem)
    return channels


def _warn_of_types(look: Look) -> None:
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
        images = [look.images[row] for row in rows if row in look.images]
        means = [float(scale_values(image).nanmean()) for image in images]
        mean = f", mean {sum(means) / len(means):.3g} after scaling" if means else ""
        shown.append(f"{name} (as {look.records.name(rows[0])}{mean})")
    logger.warning(
        "%s: the images are of different types, each divided by its own range: %s. Say "
        "--value-scale where their numbers mean the same, or write all alike.",
        look.records.split, "; ".join(shown),
    )  # fmt: skip


def _has_usual_statistics(channels: ChannelSet) -> bool:
    """Whether mean and deviation are those that come with the names, not measured ones."""
    usual = known_channels()
    return all(c.name in usual and usual[c.name] == c for c in channels)


def _scale_problem(look: Look, channels: ChannelSet) -> tuple[str | None, bool]:
    """Why the channels' mean and deviation cannot be those of images; if one factor explains it.

    Bounds are wide, since darker or flatter images than usual are no fault: two deviations for the
    mean (four if it was measured), a fifth to five times for the deviation; under usual statistics
    other types than 8 bits also need values that reach from about 0 to about 1.
    """
    images = list(look.images.values())
    if channels.mean is None or channels.std is None or not images:
        return None, False
    are_bytes = all(image.dtype == torch.uint8 for image in images)
    flat = [scale_values(image).flatten(1).to(torch.float64) for image in images]
    values = torch.cat(flat, 1)
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

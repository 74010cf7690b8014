"""Classify image files, with any channels that the model takes."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_varchan.channels import ANONYMOUS, ChannelSet
from timm_varchan.data import Reading, eval_transform, find_images
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec
from timm_varchan.models import has_stems, share, stems, unexplained_variance
from timm_varchan.models.adapt import parse_channels

logger = logging.getLogger(__name__)

#: An image whose values lie so many deviations from the mean, on average, is none of the data.
FAR = 30.0
#: Fraction of a virtual channel's variance from which it is told that it stays unexplained.
_POOR = 0.05

__all__ = [
    "ImageFiles",
    "Prediction",
    "find_images",
    "missing_channels",
    "predict",
    "write_table",
]


@dataclass(frozen=True)
class Prediction:
    """The classes of one file.

    Args:
        file: The file.
        classes: Name and probability (0..1) of the likeliest classes, likeliest first; empty for
            a file that cannot be read.
        error: Why it cannot be read, else None.
        is_sure: Whether the likeliest class is an answer, not less probable than was asked for.
    """

    file: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None
    is_sure: bool = True


def predict(
    model: nn.Module,
    files: Sequence[str | Path],
    spec: InputSpec | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    top: int = 5,
    min_probability: float = 0.0,
    batch_size: int = 32,
    num_workers: int = 0,
    **fields: Any,
) -> Iterator[Prediction]:
    """Classify image files.

    Args:
        model: A classifier on any device. One with a stem is not changed; if it was set to
            `"anonymous"` it is asked so, else told the channels. One without a stem is put into
            evaluation mode.
        files: PNG, JPEG, TIFF with any bands, `.npy`, ...
        spec: What the files are like: channels with mean and deviation (`ANONYMOUS` for any number,
            also different ones, with `mean` and `std`), image size, class names, no-data.
        mean: Means instead of the channels' own, one each or one for all, in the units of the
            scaled values (8 bits / 255, 16 bits / 65535, floats as they are).
        std: Standard deviations likewise.
        top: How many classes.
        min_probability: A likeliest class below it is no answer.
        batch_size: Images at once.
        num_workers: Processes that decode; 0 for none.
        **fields: Fields of the `InputSpec` in place of its own, as `InputSpec.of` takes them.

    Yields:
        One prediction a file, in order; a file that cannot be read has an `error`.

    Raises:
        UserError: Channels that the model cannot serve or without mean and std, a wrong number of
            class names, no image size, a count below 1.
    """
    spec = spec_for(model, spec, fields)
    _check_options(model, spec.class_names, top, batch_size)
    if spec.img_size is None:
        raise UserError("Nothing says the image size. Give img_size=, such as 224.")
    reader = ImageFiles(
        [Path(f) for f in files],
        Reading(spec, partial=has_stems(model)),
        (mean, std),
        (spec.img_size, spec.crop_pct),
    )
    for_channels(model, spec.channels)  # refuses what the model cannot serve
    loader = DataLoader(reader, batch_size=batch_size, num_workers=num_workers, collate_fn=list)
    return _run(model, loader, spec, (top, min_probability))


def spec_for(model: nn.Module, spec: InputSpec | None, fields: Mapping[str, Any]) -> InputSpec:
    """The specification with these fields, its channels also by names that only the model knows."""
    named = fields.get("channels")
    if spec is None and named is not None:
        fields = {**fields, "channels": parse_channels(model, named)}
    return InputSpec.of(spec, **fields)


def write_table(predictions: Iterable[Prediction], path: str | Path) -> Iterator[Prediction]:
    """Write predictions into a CSV file as they come: file, class, probability, note.

    Args:
        predictions: From `predict`.
        path: The file. The class is empty where the model is not sure or the file cannot be read;
            the note says which.

    Yields:
        The predictions.
    """
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        lines = csv.writer(file)
        lines.writerow(("file", "class", "probability", "note"))
        for prediction in predictions:
            name, probability = prediction.classes[0] if prediction.classes else ("", float("nan"))
            note = prediction.error or ("" if prediction.is_sure else f"not sure: {name}")
            shown = name if prediction.is_sure else ""
            lines.writerow((prediction.file, shown, f"{probability:.4f}" if name else "", note))
            yield prediction


def missing_channels(model: nn.Module, channels: ChannelSet) -> str | None:
    """What channels that are missing would have told and the others do not, in words.

    Args:
        model: A model with a stem, or another one.
        channels: What is there.

    Returns:
        A sentence; None where nothing is missing or nothing is known of it.
    """
    if not has_stems(model) or stems(model)[0].channels == ANONYMOUS or channels.is_anonymous:
        return None
    fractions = unexplained_variance(model, channels)
    poor = {name: value for name, value in fractions.items() if value >= _POOR}
    if not poor:
        return None
    parts = ", ".join(f"{1 - value:.0%} of what {name} would" for name, value in poor.items())
    subject = "This channel tells" if len(channels) == 1 else f"These {len(channels)} channels tell"
    return f"{subject} {parts} (of its variance; {channels} came)."


def _check_options(model: nn.Module, class_names: Sequence[str], top: int, batch_size: int) -> None:
    num_classes = int(getattr(model, "num_classes", len(class_names)))
    if class_names and len(class_names) != num_classes:
        raise UserError(
            f"{len(class_names)} class names came for {num_classes} classes. Give one a class."
        )
    if num_classes < 1:
        raise UserError("The model has no classifier. Load it with num_classes=... above 0.")
    if top < 1 or batch_size < 1:
        raise UserError(f"top is {top} and batch_size {batch_size}; both must be at least 1.")


def for_channels(model: nn.Module, channels: ChannelSet) -> nn.Module:
    """The model in evaluation mode and told its channels, over the same weights."""
    if has_stems(model):
        anonymous = stems(model)[0].channels == ANONYMOUS
        return share(model, ANONYMOUS if anonymous else channels).eval()
    num_channels = getattr(model, "in_chans", len(channels))
    if len(channels) != num_channels:
        raise UserError(
            f"The model takes {num_channels} channels and has no stem for others, but the channels "
            f"are {channels}. Use a dwg_ twin."
        )
    return model.eval()


Seen = tuple[Path, Union[Tensor, str], ChannelSet]


class ImageFiles(Dataset[Seen]):
    """Files, decoded and normalised one by one, and the channels that each of them has.

    In place of an image stands the reason why there is none.

    Args:
        files: The files.
        reading: How they become images.
        stats: Means and standard deviations instead of the channels' own.
        size: Pixels a side, and the share that the crop keeps.
    """

    def __init__(
        self,
        files: Sequence[Path],
        reading: Reading,
        stats: tuple[Sequence[float] | None, Sequence[float] | None],
        size: tuple[int, float],
    ) -> None:
        self.files, self.reading, self.stats, self.size = files, reading, stats, size
        channels = reading.channels
        self._transforms: dict[ChannelSet, nn.Module] = {}
        self._transform(channels if len(channels) else ChannelSet.anonymous(1))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Seen:
        file = self.files[index]
        try:
            image, channels = self.reading.part(self.reading.decode(file))
        except ImageError as error:
            return file, str(error), self.reading.channels
        if len(channels) == 0:
            channels = ChannelSet.anonymous(len(image))
        return file, self._transform(channels)(image), channels

    def _transform(self, channels: ChannelSet) -> nn.Module:
        """The transform for these channels; refuses channels without statistics."""
        key, (mean, std) = channels, self.stats
        if key in self._transforms:
            return self._transforms[key]
        if (mean is None) != (std is None):
            raise UserError("Only one of mean and std came. Give both or neither.")
        if mean is not None and std is not None:
            means, stds = (v * len(channels) if len(v) == 1 else v for v in (list(mean), list(std)))
            channels = channels.with_stats(means, stds)
        self._transforms[key] = eval_transform(
            self.size[0], channels, crop_pct=self.size[1], no_data=self.reading.spec.no_data
        )
        return self._transforms[key]


def _run(
    model: nn.Module,
    loader: Iterable[list[Seen]],
    spec: InputSpec,
    wanted: tuple[int, float],
) -> Iterator[Prediction]:
    like, class_names = next(model.parameters()), spec.class_names
    ready: dict[ChannelSet, nn.Module] = {}
    for batch in loader:
        probabilities: dict[int, Tensor] = {}
        images = {i: x for i, (_, x, _) in enumerate(batch) if isinstance(x, Tensor)}
        for channels in {batch[i][2] for i in images}:
            if channels not in ready:
                ready[channels] = for_channels(model, channels)
                if len(channels) < len(spec.channels):
                    logger.warning(
                        "Files have %d of the %d channels: %s. %s", len(channels),
                        len(spec.channels), channels, missing_channels(model, channels) or "",
                    )  # fmt: skip
            rows = [i for i in images if batch[i][2] == channels]
            with torch.inference_mode():
                logits = ready[channels](torch.stack([images[i] for i in rows]).to(like))
            probabilities |= dict(zip(rows, logits.float().softmax(-1).cpu(), strict=True))
        for i, (file, outcome, _) in enumerate(batch):
            problem = outcome if isinstance(outcome, str) else _problem(outcome, probabilities[i])
            if problem is not None:
                yield Prediction(file, error=problem)
                continue
            values, classes = probabilities[i].topk(min(wanted[0], len(probabilities[i])))
            named = (class_names[c] if class_names else str(c) for c in classes.tolist())
            found = tuple(zip(named, values.tolist(), strict=True))
            yield Prediction(file, found, is_sure=found[0][1] >= wanted[1])


def _problem(image: Tensor, probabilities: Tensor) -> str | None:
    """Why an answer is none: the values of the image are not of the kind that the model knows."""
    if not probabilities.isfinite().all():
        return "its values are so large that the answer is not finite"
    away = image.abs().mean().item()
    if away <= FAR:
        return None
    return (
        f"its values lie {away:,.0f} standard deviations from the model's means: another scale "
        f"(--value-scale, --mean and --std) or pixels without data"
    )

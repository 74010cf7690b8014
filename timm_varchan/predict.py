"""Classify image files, with any channels that the model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from timm_varchan.channels import ANONYMOUS, ChannelSet, ChannelSetLike
from timm_varchan.data import Reading, eval_transform, find_images
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec
from timm_varchan.models import has_stems, share, stems

#: An image whose values lie so many deviations from the mean, on average, is none of the data.
FAR = 30.0

__all__ = ["ImageFiles", "Prediction", "find_images", "predict"]


@dataclass(frozen=True)
class Prediction:
    """The classes of one file.

    Args:
        file: The file.
        classes: Name and probability (0..1) of the likeliest classes, likeliest first; empty for
            a file that cannot be read.
        error: Why it cannot be read, else None.
    """

    file: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def predict(
    model: nn.Module,
    files: Sequence[str | Path],
    *,
    channels: ChannelSetLike,
    img_size: int,
    class_names: Sequence[str] = (),
    crop_pct: float = 1.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    value_scale: float | None = None,
    no_data: str = "refuse",
    top: int = 5,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Iterator[Prediction]:
    """Classify image files.

    Args:
        model: A classifier on any device. One with a stem is not changed; if it was set to
            `"anonymous"` it is asked so, else told the channels. One without a stem is put into
            evaluation mode.
        files: PNG, JPEG, TIFF with any bands, `.npy`, ...
        channels: What the planes of the files are, with mean and standard deviation;
            `"anonymous"` for any number, also different ones, with `mean` and `std`.
        img_size: Height and width for the model, in pixels.
        class_names: Name of every class; numbers without.
        crop_pct: Share of the resized image's side that the crop keeps.
        mean: Means instead of the channels' own, one each or one for all, in the units of the
            scaled values (8 bits / 255, 16 bits / 65535, floats as they are).
        std: Standard deviations likewise.
        value_scale: What stored numbers are divided by instead, such as 10000.
        no_data: What is done about pixels without data: `refuse` the file, put the `mean` there,
            `predict` them from the other channels, or `keep` the stored numbers. See
            `timm_varchan.data.Reading`.
        top: How many classes.
        batch_size: Images at once.
        num_workers: Processes that decode; 0 for none.

    Yields:
        One prediction a file, in order; a file that cannot be read has an `error`.

    Raises:
        UserError: Channels that the model cannot serve or without mean and std, a wrong number of
            class names, a count below 1.
    """
    wanted = ChannelSet.parse(channels)
    _check_options(model, class_names, top, batch_size)
    reader = ImageFiles(
        [Path(f) for f in files],
        Reading(
            InputSpec.of(channels=wanted, value_scale=value_scale, no_data=no_data),
            partial=has_stems(model),
        ),
        (mean, std),
        (img_size, crop_pct),
    )
    for_channels(model, wanted)  # refuses what the model cannot serve
    loader = DataLoader(reader, batch_size=batch_size, num_workers=num_workers, collate_fn=list)
    return _run(model, loader, tuple(class_names), top)


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
        if channels not in self._transforms:
            self._transforms[channels] = self._made(channels)
        return self._transforms[channels]

    def _made(self, channels: ChannelSet) -> nn.Module:
        mean, std = self.stats
        if (mean is None) != (std is None):
            raise UserError("Only one of mean and std came. Give both or neither.")
        if mean is not None and std is not None:
            means, stds = (v * len(channels) if len(v) == 1 else v for v in (list(mean), list(std)))
            channels = channels.with_stats(means, stds)
        return eval_transform(
            self.size[0], channels, crop_pct=self.size[1], no_data=self.reading.spec.no_data
        )


def _run(
    model: nn.Module,
    loader: Iterable[list[Seen]],
    class_names: tuple[str, ...],
    top: int,
) -> Iterator[Prediction]:
    like = next(model.parameters())
    ready: dict[ChannelSet, nn.Module] = {}
    for batch in loader:
        probabilities: dict[int, Tensor] = {}
        images = {i: x for i, (_, x, _) in enumerate(batch) if isinstance(x, Tensor)}
        for channels in {batch[i][2] for i in images}:
            if channels not in ready:
                ready[channels] = for_channels(model, channels)
            rows = [i for i in images if batch[i][2] == channels]
            with torch.inference_mode():
                logits = ready[channels](torch.stack([images[i] for i in rows]).to(like))
            probabilities |= dict(zip(rows, logits.float().softmax(-1).cpu(), strict=True))
        for i, (file, outcome, _) in enumerate(batch):
            problem = outcome if isinstance(outcome, str) else _problem(outcome, probabilities[i])
            if problem is not None:
                yield Prediction(file, error=problem)
                continue
            values, classes = probabilities[i].topk(min(top, len(probabilities[i])))
            named = (class_names[c] if class_names else str(c) for c in classes.tolist())
            yield Prediction(file, tuple(zip(named, values.tolist(), strict=True)))


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

"""What an image must be like to enter a model: saved once with it, and handed on whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from timm_varchan.channels import ANONYMOUS, ChannelSet
from timm_varchan.errors import UserError

logger = logging.getLogger(__name__)

#: What can be done about pixels that hold no data.
NO_DATA = ("refuse", "mean", "predict", "keep")
#: Width times height of the largest image that is read: 3 GiB as RGB of 8 bits.
MAX_PIXELS = 2**30


@dataclass(frozen=True, kw_only=True)
class PixelFlags:
    """How stored numbers are read; by default as the saved model says."""

    #: divide stored numbers by this, such as 10000; by default by their type's largest
    value_scale: float | None = None
    value_offset: float | None = None  # add this before; -1000 for Sentinel-2 since 2022
    #: pixels without data: refuse (by default), put the mean there, predict, keep
    no_data: Literal["refuse", "mean", "predict", "keep"] | None = None
    no_data_value: float | None = None  # a stored number that means no data
    max_pixels: int | None = None  # width times height of the largest image; 2**30

    @property
    def flags(self) -> dict[str, Any]:
        """These fields, for `InputSpec.of`."""
        return {field.name: getattr(self, field.name) for field in fields(PixelFlags)}


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """Everything between a file of a user and the input of a model.

    Args:
        channels: The planes in order, with mean, deviation, correlation and value scale where
            they are known; `ANONYMOUS` for any number.
        img_size: Height and width for the model, in pixels; None where nobody said.
        crop_pct: Share of the resized image's side that evaluation keeps, above 0 and at most 1.
        no_data: What is done about pixels without data, one of `NO_DATA`.
        no_data_value: A stored number that means no data, beside what files say themselves.
        max_pixels: Width times height of the largest image that is read.
        class_names: Name of every class in the order of the logits; empty where nobody knows.

    Raises:
        UserError: A value out of its range, class names that are no text.
    """

    channels: ChannelSet = ANONYMOUS
    img_size: int | None = None
    crop_pct: float = 1.0
    no_data: str = "refuse"
    no_data_value: float | None = None
    max_pixels: int = MAX_PIXELS
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.img_size is not None and self.img_size < 1:
            raise UserError(f"img_size is {self.img_size}; an image has 1 pixel a side or more.")
        if not 0 < self.crop_pct <= 1:
            raise UserError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1.")
        if self.no_data not in NO_DATA:
            raise UserError(f"no_data is {self.no_data!r}. Choose from: {', '.join(NO_DATA)}.")
        if self.max_pixels < 1:
            raise UserError(f"max_pixels is {self.max_pixels}; an image has 1 pixel or more.")
        if not all(isinstance(name, str) for name in self.class_names):
            raise UserError("The class names are no texts. Save the model anew.")

    @classmethod
    def of(cls, spec: InputSpec | None = None, /, **changes: Any) -> InputSpec:
        """A specification with some of its fields said anew.

        Args:
            spec: What holds where nothing else is said; the defaults where None.
            **changes: Fields, `channels` in any form that `ChannelSet.parse` takes with the names
                of the specification's own; `value_scale` and `value_offset` of the channels too.
                None says nothing.

        Raises:
            UserError: Values that a specification refuses; channels that come with a scale of
                their own, and another scale.
        """
        spec = cls() if spec is None else spec
        changes = {name: value for name, value in changes.items() if value is not None}
        scale, offset = changes.pop("value_scale", None), changes.pop("value_offset", None)
        channels = ChannelSet.parse(changes.pop("channels", spec.channels), own=spec.channels)
        inherited = (spec.channels.value_scale, spec.channels.value_offset)
        if (channels.value_scale, channels.value_offset) in ((None, 0.0), inherited):
            # The files are on the scale that somebody says now, else on that of the specification.
            if channels.mean and scale is not None and inherited[0] not in (None, scale):
                logger.warning(
                    "The channels were measured on numbers divided by %g; these files are read "
                    "divided by %g.", inherited[0], scale,
                )  # fmt: skip
            scale = inherited[0] if scale is None else scale
            offset = inherited[1] if offset is None else offset
            channels = replace(channels, value_scale=scale, value_offset=offset)
        else:
            channels = channels.with_scale(scale, offset)
        if "class_names" in changes:
            changes["class_names"] = tuple(changes["class_names"])
        return replace(spec, channels=channels, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-serialisable form; `from_dict` reads it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **values,
            "channels": self.channels.to_dict(),
            "class_names": list(self.class_names),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> InputSpec:
        """What `to_dict` gave.

        Raises:
            UserError: Another content.
        """
        try:
            channels, names = ChannelSet.from_dict(values["channels"]), values["class_names"]
            return cls(**{**values, "channels": channels, "class_names": tuple(names)})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"This says nothing of an input ({error}). Save the model anew."
            ) from error

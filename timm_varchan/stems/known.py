"""What stems have in common that serve only the channels that they were made for."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_varchan.channels import Channel, ChannelSet, known_channels
from timm_varchan.errors import UserError
from timm_varchan.stems.mixer import Mixer

__all__ = ["KnownMixer"]


class KnownMixer(Mixer):
    """Puts every known channel in its place among the virtual channels, and nothing elsewhere."""

    supports_anonymous: ClassVar[bool] = False
    supports_unseen: ClassVar[bool] = False

    #: Channels beside the virtual ones that a subclass knows, by name.
    channel_names: tuple[str, ...] = ()

    place: Tensor

    @classmethod
    def table_names(cls) -> tuple[str, ...]:
        """The buffers that `tables` fills."""
        return (*super().table_names(), "place")

    def known(self) -> list[Channel]:
        """The channels that have a place: the virtual ones first."""
        names = known_channels()
        more = [names.get(name, Channel(name)) for name in self.channel_names]
        own = set(self.virtual_channels)
        return [*self.virtual_channels, *(channel for channel in more if channel not in own)]

    def tables(
        self, sets: Sequence[ChannelSet], wavelengths_nm: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """The place of each channel `(S, P)`, and as prior `(S, P, K)` 1 at its place, else 0."""
        known = self.known()
        row_of = {(c.name, c.wavelength_nm): row for row, c in enumerate(known)}
        place = torch.zeros(present.shape, dtype=torch.long)
        for row, channel_set in enumerate(sets):
            for column, channel in enumerate(channel_set):
                place[row, column] = row_of[channel.name, channel.wavelength_nm]
        prior = F.one_hot(place, len(known))[:, :, : self.num_virtual] * present[:, :, None]
        return {"prior": prior.to(wavelengths_nm.dtype), "place": place}

    def _check_channels(self, channels: ChannelSet | tuple[ChannelSet, ...] | None) -> None:
        super()._check_channels(channels)
        known = {(c.name, c.wavelength_nm): c.label for c in self.known()}
        for channel_set in channels if isinstance(channels, tuple) else (channels,):
            if channel_set is None:
                continue
            unknown = [c.label for c in channel_set if (c.name, c.wavelength_nm) not in known]
            if unknown:
                raise UserError(
                    f"{type(self).__name__} has no place for {', '.join(unknown)}: it was made for "
                    f"{', '.join(known.values())}. Leave them out or use another stem."
                )
            if not self.any_count and len(channel_set) != self.num_virtual:
                raise UserError(
                    f"{type(self).__name__} takes exactly {self.num_virtual} channels, but "
                    f"{channel_set} has {len(channel_set)}. Use a stem that takes any count."
                )

"""What stems have in common that serve only the channels that they were made for."""

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
        """The tensors that `tables` makes."""
        return (*super().table_names(), "place")

    def known(self) -> list[Channel]:
        """The channels that have a place: the virtual ones first."""
        names = known_channels()
        more = [names.get(name, Channel(name)) for name in self.channel_names]
        own = set(self.virtual_channels)
        return [*self.virtual_channels, *(channel for channel in more if channel not in own)]

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """The place `(N,)` of each channel among the known ones."""
        row_of = {c.identity: row for row, c in enumerate(self.known())}
        return {"place": torch.tensor([row_of[c.identity] for c in channels])}

    def prior_rows(self, count: Tensor) -> Tensor:
        """The prior `(S, N, K)`: 1 at a channel's place, else 0."""
        place = F.one_hot(self._row_tables["place"], len(self.known())).double()
        return place[:, : self.num_virtual].expand(len(count), -1, -1)

    def _check_channels(self, channels: ChannelSet | tuple[ChannelSet, ...] | None) -> None:
        super()._check_channels(channels)
        known = {c.identity: c.label for c in self.known()}
        for channel_set in channels if isinstance(channels, tuple) else (channels,):
            if channel_set is None:
                continue
            unknown = [c.label for c in channel_set if c.identity not in known]
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

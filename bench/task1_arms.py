"""The networks of Task I and the ways to train them."""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
from torch import nn

import timm_varchan
from timm_varchan import RGB, ChannelSet
from timm_varchan.stems import MIXERS
from timm_varchan.training import CHANNEL_AUGS

#: A resnet10t a quarter as wide as timm's: the smallest BatchNorm network that shows the effect.
ARCHITECTURE, WIDTHS = "resnet10t", {"channels": (32, 64, 128, 256), "stem_width": 16}
WARMUP_EPOCHS, LR = 2, 2e-3
TEST_SETS = tuple(map(str, RGB.subsets()))
SINGLES = ("R", "G", "B")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        stem: Key of `MIXERS`; None for a plain timm model.
        channels: The channels that it is made for.
        aug: Key of `CHANNEL_AUGS`: what training does to the channels.
        identity: Whether training tells the model which channels it sees.
    """

    stem: str | None
    channels: str = "RGB"
    aug: str = "none"
    identity: str = "named"

    @property
    def modes(self) -> tuple[str, ...]:
        """In which modes it is tested."""
        if self.stem is None:
            return ("mask",)
        if not MIXERS[self.stem].supports_anonymous:
            return ("named",)
        told_names = self.identity == "named" and self.aug != "shuffle"
        return ("named", "anonymous") if told_names else ("anonymous",)

    @property
    def test_sets(self) -> list[ChannelSet]:
        """On which subsets of its channels it is tested."""
        channels = ChannelSet.parse(self.channels)
        any_count = self.stem is None or MIXERS[self.stem].any_count
        return channels.subsets() if any_count else [channels]


def stem_augs(stem: str) -> tuple[str, ...]:
    """What training can do to the channels of a model with this stem."""
    if not MIXERS[stem].any_count:
        return ("none",)
    needs_names = not MIXERS[stem].supports_anonymous
    return tuple(aug for aug in CHANNEL_AUGS if not (needs_names and aug == "shuffle"))


ARMS = (
    {f"expert-{name}": Arm(None, name) for name in TEST_SETS}
    | {f"plain-{aug}": Arm(None, aug=aug) for aug in ("shuffle", "hcs-mask")}
    | {f"{stem}-{aug}": Arm(stem, aug=aug) for stem in MIXERS for aug in stem_augs(stem)}
    | {
        f"{stem}-{aug}-anonymous": Arm(stem, aug=aug, identity="anonymous")
        for stem, mixer in MIXERS.items() if mixer.supports_anonymous for aug in stem_augs(stem)
    }
)  # fmt: skip


def build(arm: Arm, num_classes: int) -> nn.Module:
    """The arm's network, from random weights."""
    in_chans = len(ChannelSet.parse(arm.channels))
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, in_chans=in_chans, **WIDTHS)
    if arm.stem is not None:
        model = timm_varchan.adapt(model, arm.stem)
    return model.to(memory_format=torch.channels_last)

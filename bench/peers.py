"""Two published mechanisms for any number of channels, as models that the same trainer trains.

Written from the papers' formulas: DOFA (arXiv:2403.15356) generates the kernels of the first layer
from wavelengths; ChannelViT (arXiv:2309.16108) makes a token for each patch of each channel.
Their names begin as those of twins do: models with a stem that are built again by their name.
"""

from __future__ import annotations

from typing import Any, cast

import stems as stems  # registers them
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from timm_varchan import adapt
from timm_varchan.channels import ChannelSetLike
from timm_varchan.stems import Stem

__all__ = ["ChannelViT", "dwg_channel_vit", "dwg_dofa_resnet10t"]

default_cfgs = generate_default_cfgs({
    name: {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, "first_conv": (),
           "classifier": classifier}
    for name, classifier in (("dwg_dofa_resnet10t", "fc"), ("dwg_channel_vit", "head"))
})  # fmt: skip
#: What `set_channels` notes in a model's arguments, and these models need not be told.
NOTED = ("prior", "prior_scale", "channel_stats", "channel_set")


class ChannelTokens(Stem):
    """A token for each patch of each channel, `(B, C, H, W) -> (B, C N, D)`.

    One projection for all channels, a learned code for each channel, positions of the patches.

    Args:
        virtual_channels: The channels that there are codes for.
        bank: The projection of one plane.
        num_patches: N.
    """

    def __init__(self, virtual_channels: ChannelSetLike, bank: nn.Conv2d, num_patches: int) -> None:
        super().__init__(stems.KnownMixer(virtual_channels, virtual_channels), bank)
        width = bank.out_channels
        self.codes = nn.Parameter(torch.randn(self.mixer.num_virtual, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(num_patches, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Make the tokens; those of absent planes are there, see `absent`."""
        x = self.mixer.checked(x)
        rows, _, _ = self.mixer.rows(x)
        tokens = self.bank(x.flatten(0, 1)[:, None]).flatten(2).transpose(1, 2)
        code = self.codes[cast(stems.KnownMixer, self.mixer).place[:, rows]]
        return (tokens.unflatten(0, x.shape[:2]) + self.positions + code).flatten(1, 2)

    def absent(self, x: Tensor) -> Tensor:
        """Which tokens are of planes that are not there, `(B or 1, C N)`."""
        rows, _, _ = self.mixer.rows(self.mixer.checked(x))
        return (self.mixer.present[:, rows] == 0).repeat_interleave(len(self.positions), 1)


class ChannelViT(VisionTransformer):
    """A vision transformer on the tokens of all channels.

    Args:
        virtual_channels: The channels that it knows.
        in_chans: Not in use.
        **kwargs: Of timm's `VisionTransformer`.
    """

    def __init__(self, virtual_channels: ChannelSetLike, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(in_chans=1, pos_embed="none", **kwargs)
        num_patches = self.patch_embed.num_patches
        self.patch_embed = ChannelTokens(virtual_channels, self.patch_embed.proj, num_patches)
        self.in_chans = self.patch_embed.mixer.num_virtual

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All tokens `(B, 1 + C N, D)`; nobody attends to those of absent planes."""
        absent = nn.functional.pad(self.patch_embed.absent(x), (1, 0))[:, None, None]
        mask = torch.zeros_like(absent, dtype=x.dtype).masked_fill(absent, -torch.inf)
        return super().forward_features(x, attn_mask=mask)


def _resnet10t(
    width: int, num_tokens: int, feedforward: int, in_chans: int, **kwargs: Any
) -> nn.Module:
    model = adapt(
        timm.create_model("resnet10t", **kwargs), "dofa", width=width, num_tokens=num_tokens,
        feedforward=feedforward,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, Stem):
            module.bank.requires_grad_(False)  # not in use
    return model


@register_model
def dwg_dofa_resnet10t(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """resnet10t with kernels from wavelengths; `width`, `num_tokens`, `feedforward`: generator."""
    given = {key: value for key, value in kwargs.items() if key not in NOTED}
    return build_model_with_cfg(_resnet10t, "dwg_dofa_resnet10t", pretrained, **given)


@register_model
def dwg_channel_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A `ChannelViT` of any size."""
    given = {key: value for key, value in kwargs.items() if key not in NOTED}
    return build_model_with_cfg(ChannelViT, "dwg_channel_vit", pretrained, **given)

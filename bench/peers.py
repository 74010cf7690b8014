"""Two published mechanisms for any number of channels, as models that the same trainer trains.

Written from the papers' formulas: DOFA (arXiv:2403.15356) generates the kernels of the first layer
from wavelengths; ChannelViT (arXiv:2309.16108) makes a token for each patch of each channel.
Their names begin as those of twins do: models with a stem that are built again by their name.
"""

import math
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from timm_varchan import adapt, register_stem
from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems import Mixer, Stem
from timm_varchan.stems.mixer import Channels

__all__ = ["ChannelViT", "DofaMixer", "dwg_channel_vit", "dwg_dofa_resnet10t"]

default_cfgs = generate_default_cfgs({
    name: {"input_size": (3, 224, 224), "mean": (0.5,) * 3, "std": (0.5,) * 3, "first_conv": (),
           "classifier": classifier}
    for name, classifier in (("dwg_dofa_resnet10t", "fc"), ("dwg_channel_vit", "head"))
})  # fmt: skip
#: What `set_channels` notes in a model's arguments, and these models need not be told.
NOTED = ("prior", "prior_scale", "channel_stats", "channel_set")


@register_notrace_module
class DofaStem(Stem):
    """A first layer whose convolution runs with the kernels that its mixer generates."""

    def forward(self, x: Tensor) -> Tensor:
        """Generate kernels, then convolve."""
        bank = cast(nn.Conv2d, self.bank)
        if type(bank) is not nn.Conv2d or bank.groups != 1 or bank.padding_mode != "zeros":
            raise UserError(f"Whole kernels need an ordinary first convolution, not {bank}.")
        x = self.mixer.checked(x)
        kernels = cast(DofaMixer, self.mixer).kernels(x).to(x.dtype)
        how: dict[str, Any] = {name: getattr(bank, name) for name in ("stride", "padding")}
        if len(kernels) == 1:
            return F.conv2d(x, kernels[0], bank.bias, **how)
        B, _, H, W = x.shape
        bias = None if bank.bias is None else bank.bias.repeat(B)
        y = F.conv2d(x.reshape(1, -1, H, W), kernels.flatten(0, 1), bias, groups=B, **how)
        return y.view(B, kernels.shape[1], *y.shape[2:])


class DofaMixer(Mixer):
    """Generates a kernel for each channel from its wavelength by a small transformer; no bank.

    Source: the weight generator of DOFA, arXiv:2403.15356. Differs: the bias is that of the
    convolution. As in the paper, nothing is divided by the number of channels.

    Args:
        kernel_shape: `(out, kh, kw)` of the convolution.
        width: D, of the tokens.
        num_tokens: Learned tokens beside those of the channels.
        feedforward: Width of the transformer's hidden layer.
    """

    stem_type = DofaStem
    supports_anonymous: bool = False
    code: Tensor

    def __init__(
        self,
        *args: Any,
        kernel_shape: tuple[int, int, int],
        width: int = 128,
        num_tokens: int = 128,
        feedforward: int = 2048,
        **kwargs: Any,
    ) -> None:
        self.width, self.kernel_shape = width, kernel_shape
        super().__init__(*args, **kwargs)
        like: dict[str, Any] = {key: kwargs.get(key) for key in ("device", "dtype")}
        self.embed = nn.Sequential(
            nn.Linear(width, width, **like), nn.ReLU(), nn.Linear(width, width, **like), nn.ReLU()
        )
        self.tokens = nn.Parameter(torch.empty(1, num_tokens, width, **like).normal_(std=0.02))
        self.encoder = nn.TransformerEncoderLayer(
            width, 4, feedforward, dropout=0.0, activation="gelu", batch_first=True, **like
        )
        self.out = nn.Linear(width, math.prod(kernel_shape), **like)

    @classmethod
    def before(cls, bank: nn.Module, *args: Any, **kwargs: Any) -> Mixer:
        """A mixer that is given the shape of the bank's kernels."""
        weight = cast(Tensor, bank.weight)
        return cls(*args, kernel_shape=(len(weight), *weight.shape[2:]), **kwargs)

    def row_tables(self, channels: ChannelSet) -> dict[str, Tensor]:
        """The code `(N, D)` of each wavelength."""
        waves = [math.nan if nm is None else nm for nm in channels.wavelengths_nm]
        half = self.width // 2
        frequencies = 10000.0 ** (-torch.arange(half).double() / half)
        angles = torch.tensor(waves).double()[:, None] * frequencies
        return {"code": torch.cat([angles.sin(), angles.cos()], -1).nan_to_num(0.0)}

    def kernels(self, x: Tensor) -> Tensor:
        """The kernels, `(S, out, C, kh, kw)`, generated once for each different set."""
        rows, _, _ = self.rows(x)
        absent = self.present[:, rows] == 0
        which = torch.zeros(1, dtype=torch.long, device=absent.device)
        if len(absent) > 1:  # not of one, so that shapes can be computed on the meta device
            absent, which = torch.unique(absent, dim=0, return_inverse=True)
        code = self.code[:, rows].expand(len(absent), -1, -1)
        embedded = code + self.embed(code)
        tokens = self.tokens.expand(len(code), -1, -1)
        ignored = torch.cat([absent.new_zeros(tokens.shape[:2]), absent], 1)
        hidden = torch.cat([tokens, embedded], 1)
        encoded = self.encoder(hidden, src_key_padding_mask=ignored)[:, tokens.shape[1] :]
        kernels = self.out(encoded + embedded).masked_fill(absent[:, :, None], 0.0)
        return kernels.unflatten(2, self.kernel_shape).transpose(1, 2)[which]

    def _check_channels(self, channels: Channels) -> None:
        super()._check_channels(channels)
        if isinstance(channels, tuple):
            raise UserError("DofaMixer takes one set with masks, not a set for each sample.")
        dark = [c.label for c in channels or () if c.wavelength_nm is None]
        if dark:
            raise UserError(f"Channel {', '.join(dark)} has no wavelength to make kernels from.")


register_stem("dofa", DofaMixer)


class ChannelTokens(Stem):
    """A token for each patch of each channel, `(B, C, H, W) -> (B, C N, D)`.

    One projection for all channels, a learned code for each channel, positions of the patches.

    Args:
        virtual_channels: The channels that there are codes for.
        bank: The projection of one plane.
        num_patches: N.
    """

    def __init__(self, virtual_channels: ChannelSetLike, bank: nn.Conv2d, num_patches: int) -> None:
        super().__init__(Mixer(virtual_channels, virtual_channels, prior="zero"), bank)
        width = bank.out_channels
        self.codes = nn.Parameter(torch.randn(self.mixer.num_virtual, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(num_patches, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Make the tokens; those of absent planes are there, see `absent`."""
        x = self.mixer.checked(x)
        tokens = self.bank(x.flatten(0, 1)[:, None]).flatten(2).transpose(1, 2)
        code = self.mixer.coefficients(x) @ self.codes  # each channel is one of the virtual ones
        tokens = tokens.unflatten(0, x.shape[:2]) + self.positions + code[:, :, None]
        return tokens.flatten(1, 2)

    def absent(self, x: Tensor) -> Tensor:
        """Which tokens are of planes that are not there, `(B or 1, C N)`."""
        present = self.mixer.tables(self.mixer.checked(x))["present"][..., 0]
        return (present == 0).repeat_interleave(len(self.positions), 1)


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

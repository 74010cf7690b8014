"""The parts of `RRDB`: convolution with normalisation, dense block, stage."""

from typing import Any

import torch
from timm.layers import LayerScale2d, create_act_layer, get_norm_layer
from torch import Tensor, nn

__all__ = ["ConvNormAct", "DenseBlock", "Stage"]


class NormAct(nn.Module):
    """Normalisation and activation, either of which may be left out."""

    def __init__(
        self, dim: int, norm_layer: str, act_layer: str | None, device: Any, dtype: Any
    ) -> None:
        super().__init__()
        norm = get_norm_layer(norm_layer) or nn.Identity
        self.norm = norm(dim, device=device, dtype=dtype)
        self.act = create_act_layer(act_layer) if act_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, H, W)` in and out."""
        return self.act(self.norm(x))


class ConvNormAct(nn.Module):
    """Convolution, normalisation, activation; `(B, in, H, W)` to `(B, out, H', W')`."""

    def __init__(
        self, in_chs: int, out_chs: int, kernel_size: int, norm_layer: str,
        act_layer: str | None, stride: int = 1, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(
            in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=not norm_layer,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.norm_act = NormAct(out_chs, norm_layer, act_layer, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        return self.norm_act(self.conv(x))


class DenseBlock(nn.Module):
    """Convolutions that each see all maps before them; their fused output is added to the input."""

    def __init__(
        self, dim: int, growth: int, num_layers: int, res_scale: float, norm_layer: str,
        act_layer: str, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.normalised = bool(norm_layer)
        self.layers = nn.ModuleList(
            ConvNormAct(dim + i * growth, growth, 3, norm_layer, act_layer, **dd)
            for i in range(num_layers)
        )
        self.fuse = ConvNormAct(dim + num_layers * growth, dim, 1, norm_layer, None, **dd)
        self.scale = LayerScale2d(dim, init_values=res_scale, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, H, W)` in and out."""
        maps = x
        for layer in self.layers:
            maps = torch.cat([maps, layer(maps)], dim=1)
        return x + self.scale(self.fuse(maps))

    def init_weights(self) -> None:
        """Without normalisation a tenth of what the convolutions have."""
        if self.normalised:
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.mul_(0.1)


class Stage(nn.Module):
    """One residual-in-residual dense block, behind a halving of the map if `stride` is 2."""

    def __init__(
        self, in_chs: int, dim: int, stride: int, num_blocks: int, growth: int, num_layers: int,
        res_scale: float, norm_layer: str, act_layer: str, device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # rounded up: a map of one pixel stays one
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.widen = nn.Identity() if in_chs == dim else nn.Conv2d(in_chs, dim, 1, **dd)
        self.blocks = nn.Sequential(*(
            DenseBlock(dim, growth, num_layers, res_scale, norm_layer, act_layer, **dd)
            for _ in range(num_blocks)
        ))  # fmt: skip
        self.scale = LayerScale2d(dim, init_values=res_scale, **dd)
        self.norm_act = NormAct(dim, norm_layer, act_layer, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chs, H, W)` to `(B, dim, ceil(H / stride), ceil(W / stride))`."""
        x = self.widen(self.pool(x))
        return self.norm_act(x + self.scale(self.blocks(x)))

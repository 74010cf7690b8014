"""Residual-in-residual dense blocks for classification, with and without a recurrence before them.

`rrdb_*`: stem, three blocks, classifier. `rrdb_rnn_*`: stem, a gated recurrent convolution, three
blocks, classifier.

What counts as a layer: as in the task that asks for a network of two to four layers, a block (or
the whole recurrence, whose steps share their weights) is one; so these have 3 and 4, or 5 and 6
with the stem and the classifier. `RRDB.count_convs()` is the number of convolutions on the longest
path from image to logits, to judge the depth otherwise.

Source: the blocks are those of ESRGAN (Wang et al., arXiv:1809.00219, section 3.1), made for
super-resolution. Adapted: BatchNorm behind each convolution; a 1x1 convolution fuses a dense
block, as in the residual dense network (arXiv:1802.08797); the residual scale of 0.2 is where a
scale for each channel starts; the map is halved between blocks, as in DenseNet (arXiv:1608.06993).
"""

from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ConvNormAct,
    LayerScale2d,
    create_classifier,
    get_device_dtype,
    get_norm_act_layer,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from timm_varchan.errors import UserError


class DenseBlock(nn.Module):
    """Convolutions that each see all maps before them; their fused output is added to the input.

    Args:
        dim: Channels of the map.
        growth: Channels that each convolution adds.
        num_layers: Such convolutions.
        res_scale: What the output is multiplied by, for each channel, before training.
        **layers: `norm_layer`, `act_layer`, `device` and `dtype` of the convolutions.
    """

    def __init__(
        self, dim: int, growth: int, num_layers: int, res_scale: float, **layers: Any
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            ConvNormAct(dim + i * growth, growth, 3, **layers) for i in range(num_layers)
        )
        self.fuse = ConvNormAct(dim + num_layers * growth, dim, 1, apply_act=False, **layers)
        dd: dict[str, Any] = {key: layers.get(key) for key in ("device", "dtype")}
        self.scale = LayerScale2d(dim, init_values=res_scale, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, dim, H, W)` in and out."""
        maps = x
        for layer in self.layers:
            maps = torch.cat([maps, layer(maps)], dim=1)
        return x + self.scale(self.fuse(maps))


class Stage(nn.Module):
    """One residual-in-residual dense block, behind a halving of the map if `stride` is 2."""

    def __init__(
        self,
        in_chs: int,
        dim: int,
        stride: int,
        num_blocks: int,
        growth: int,
        num_layers: int,
        res_scale: float,
        norm_layer: str,
        act_layer: str,
        **dd: Any,
    ) -> None:
        super().__init__()
        # rounded up: a map of one pixel stays one
        self.pool = nn.AvgPool2d(2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.widen = nn.Identity() if in_chs == dim else nn.Conv2d(in_chs, dim, 1, **dd)
        layers = {"norm_layer": norm_layer, "act_layer": act_layer, **dd}
        self.blocks = nn.Sequential(
            *(DenseBlock(dim, growth, num_layers, res_scale, **layers) for _ in range(num_blocks))
        )
        self.scale = LayerScale2d(dim, init_values=res_scale, **dd)
        self.norm_act = get_norm_act_layer(norm_layer, act_layer)(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chs, H, W)` to `(B, dim, ceil(H / stride), ceil(W / stride))`."""
        x = self.widen(self.pool(x))
        return self.norm_act(x + self.scale(self.blocks(x)))


def _separable(in_chs: int, out_chs: int, **dd: Any) -> nn.Sequential:
    """A depthwise convolution of 3x3, then one of 1x1; height and width stay."""
    return nn.Sequential(
        nn.Conv2d(in_chs, in_chs, 3, padding=1, groups=in_chs, bias=False, **dd),
        nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd),
    )


class ConvRecurrence(nn.Module):
    """A gated recurrent unit whose products are convolutions, run on one map for a few steps.

    With the input map x and the state h, which starts as x:

        z, r = sigmoid(W_g x + U_g h)      update and reset gates
        c    = tanh(W_c x + U_c (r h))     candidate
        h   <- (1 - z) h + z c

    All steps share their weights, so parameters do not grow with the steps, while each step widens
    the receptive field by 4 pixels of the map. What the input adds is computed once.

    Source: ConvGRU, Ballas et al., arXiv:1511.06432, section 3; there the input is a video, here
    the same map at every step. Separable convolutions: arXiv:1610.02357.

    Args:
        dim: Channels of the map.
        steps: How often the state is renewed, at least 1.
    """

    def __init__(self, dim: int, steps: int = 3, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if steps < 1:
            raise UserError(f"steps={steps}: a recurrence takes at least one step.")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.steps = dim, steps
        self.input = nn.Conv2d(dim, 3 * dim, 1, **dd)
        self.candidate = _separable(dim, dim, **dd)
        self.gates = _separable(dim, 2 * dim, **dd)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The update gate starts at 0.27, so that a part of the input passes through all steps."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        bias = self.input.bias
        assert bias is not None
        nn.init.zeros_(bias)
        nn.init.constant_(bias[self.dim : 2 * self.dim], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Renew the state `steps` times; `(B, dim, H, W)` in and out."""
        given = self.input(x)
        h = x
        for _ in range(self.steps):
            gates = torch.sigmoid(given[:, self.dim :] + self.gates(h))
            update, reset = gates[:, : self.dim], gates[:, self.dim :]
            c = torch.tanh(given[:, : self.dim] + self.candidate(reset * h))
            h = h + update * (c - h)
        return h


class RRDB(nn.Module):
    """Stem, optional recurrence, residual-in-residual dense blocks, classifier.

    Args:
        dims: Channels of each block; between blocks the map is halved.
        growth: Channels that each convolution of a dense block adds.
        num_layers: Such convolutions in a dense block.
        num_blocks: Dense blocks in each residual-in-residual dense block.
        res_scale: What residuals are multiplied by, for each channel, before training.
        steps: Of the recurrence behind the stem; 0 leaves it out.
        stem_stride: Of the first convolution; 4 makes 224 px cost what 112 px cost with 2.
        norm_layer: timm's name of the normalisation.
    """

    def __init__(
        self,
        dims: tuple[int, ...] = (32, 48, 64),
        growth: int = 16,
        num_layers: int = 3,
        num_blocks: int = 3,
        res_scale: float = 0.2,
        steps: int = 0,
        stem_stride: int = 2,
        norm_layer: str = "batchnorm2d",
        act_layer: str = "leaky_relu",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = dims[-1]
        self.grad_checkpointing = False
        stem_size = max(3, 2 * stem_stride - 1)
        layers: dict[str, Any] = {"norm_layer": norm_layer, "act_layer": act_layer, **dd}
        self.stem = ConvNormAct(
            in_chans, dims[0], stem_size, stem_stride, padding=stem_size // 2, **layers
        )
        self.recurrence = ConvRecurrence(dims[0], steps, **dd) if steps else nn.Identity()
        self.stages = nn.Sequential(*(
            Stage(
                dims[max(i - 1, 0)], dim, 2 if i else 1, num_blocks, growth, num_layers,
                res_scale, **layers,
            )
            for i, dim in enumerate(dims)
        ))  # fmt: skip
        self.feature_info = [
            {"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **dd
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He's initialisation; the recurrence has its own."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.recurrence, ConvRecurrence):
            self.recurrence.init_weights()
        if isinstance(self.head, nn.Linear):
            nn.init.normal_(self.head.weight, std=0.01)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def count_convs(self) -> int:
        """Convolutions on the longest path from the image to the classifier, steps counted."""
        parts = [*self.stem.modules(), *self.stages.modules()]
        if isinstance(self.recurrence, ConvRecurrence):
            block = self.recurrence
            parts += [*block.candidate, *block.gates] * block.steps
        return sum(isinstance(module, nn.Conv2d) for module in parts)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters' names, for decay of the learning rate by depth."""
        fine = [
            (r"^stages\.(\d+)\.widen", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:scale|norm_act)", (99999,)),  # behind every block
        ]
        return {"stem": r"^stem|^recurrence", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each stage again in the backward pass instead of keeping its maps."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the pooling is kept if None."""
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, **dd
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features and the outputs of chosen blocks.

        Args:
            x: Images `(B, in_chans, H, W)`.
            indices: Blocks to return: the last so many if int, all if None.
            norm: Nothing: every block ends with its normalisation.
            stop_early: Leave out the blocks behind the last chosen one.
            output_fmt: `"NCHW"`.
            intermediates_only: Leave out the features.

        Returns:
            Features `(B, D, H', W')` and a list of such maps, or the list alone.

        Raises:
            UserError: Another format.
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt={output_fmt!r}: only 'NCHW' is to be had.")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        x = self.recurrence(self.stem(x))
        # TorchScript cannot slice modules
        stages = self.stages[: max_index + 1] if stop_early else self.stages
        intermediates = []
        for i, stage in enumerate(stages):
            x = checkpoint(stage, x) if self.grad_checkpointing else stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks behind the last chosen one; the indices that were kept.

        Args:
            indices: Blocks to keep: the last so many if int.
            prune_norm: Nothing: there is no separate normalisation.
            prune_head: Remove the classifier too.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W)` to `(B, num_features, H / reduction, W / reduction)`."""
        x = self.recurrence(self.stem(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.stages, x)
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify; with `pre_logits` only pool."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(B, in_chans, H, W)` to logits `(B, num_classes)`."""
        return self.forward_head(self.forward_features(x))


def _create(variant: str, pretrained: bool, **kwargs: Any) -> RRDB:
    return build_model_with_cfg(
        RRDB,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2), "flatten_sequential": True},
        **kwargs,
    )


_CFG: dict[str, Any] = {
    "url": "", "num_classes": 1000, "input_size": (3, 64, 64), "pool_size": (8, 8),
    "crop_pct": 0.875, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD, "first_conv": "stem.conv", "classifier": "head",
    "license": "apache-2.0", "paper_ids": "arXiv:1809.00219",
}  # fmt: skip
#: Read by timm's `register_model`.
default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": _CFG
        for name in ("rrdb_small", "rrdb_base", "rrdb_rnn_small", "rrdb_rnn_base")
    }
)


@register_model
def rrdb_small(pretrained: bool = False, **kwargs: Any) -> RRDB:
    """Three blocks, 0.17 M parameters with 50 classes."""
    return _create("rrdb_small", pretrained, **{"dims": (32, 56, 72), "growth": 8, **kwargs})


@register_model
def rrdb_base(pretrained: bool = False, **kwargs: Any) -> RRDB:
    """Three blocks."""
    return _create("rrdb_base", pretrained, **{"dims": (64, 96, 128), "growth": 32, **kwargs})


@register_model
def rrdb_rnn_small(pretrained: bool = False, **kwargs: Any) -> RRDB:
    """Recurrence and three blocks, 0.30 M parameters with 50 classes."""
    model_args = {"dims": (32, 48, 60), "growth": 16, "steps": 3, **kwargs}
    return _create("rrdb_rnn_small", pretrained, **model_args)


@register_model
def rrdb_rnn_base(pretrained: bool = False, **kwargs: Any) -> RRDB:
    """Recurrence and three blocks."""
    model_args = {"dims": (64, 96, 128), "growth": 32, "steps": 3, **kwargs}
    return _create("rrdb_rnn_base", pretrained, **model_args)

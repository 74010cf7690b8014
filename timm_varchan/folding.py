"""Fold a stem for one channel set into a plain timm model, and measure what that changed."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2dSame
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.models import share
from timm_varchan.models.adapt import TWIN_ARGUMENTS, parse_channels
from timm_varchan.stems import Mixer, Stem
from timm_varchan.stems.stem import put_layer

if TYPE_CHECKING:
    from timm_varchan.evaluation import Difference

__all__ = ["FoldChange", "fold", "measure_change"]

PREFIX = "dwg_"
#: Largest relative difference between a folded layer and the stem with the same coefficients, in
#: units of the type's precision.
TOLERANCE_EPS = 100


class _FixedMixer(Mixer):
    """Mixes with given coefficients `(C, K)`."""

    def __init__(self, coefficients: Tensor) -> None:
        num_channels, num_virtual = coefficients.shape
        super().__init__(
            ChannelSet.anonymous(num_virtual),
            ChannelSet.anonymous(num_channels),
            device=coefficients.device,
            dtype=coefficients.dtype,
        )
        self.fixed = coefficients

    def coefficients(self, x: Tensor) -> Tensor:
        """The coefficients, whatever the input."""
        return self.fixed[None]


@torch.no_grad()
def fold(
    model: nn.Module, channels: ChannelSetLike, calibration: Iterable[Tensor] | None = None
) -> nn.Module:
    """Make a plain timm model with a static first convolution for one channel set.

    `W[:, c] = sum_k a[c, k] bank[:, k]`, exact where the coefficients `a` do not depend on the
    content of the image (an untrained stem, the fixed prior), else with their mean over the
    calibration images: `measure_change` says what that costs. The result has the architecture of
    the base and `in_chans` channels; timm saves and loads it without timm_varchan.

    Convolutions with standardised weights (`StdConv2d`, `ScaledStdConv2d`) standardise whatever
    they load. Where no weight gives the wanted kernels, a plain convolution takes their place: as
    exact, but no architecture of timm, so its name gets the ending `_folded` and timm refuses to
    load it rather than load it wrongly. Export such a model instead.

    Args:
        model: A model with stems; it is not changed.
        channels: The channel set; `ChannelSet.anonymous(n)` for n channels without identity.
        calibration: Normalised batches `(B, C, H, W)` of these channels, or None.

    Returns:
        The folded model, in evaluation mode.

    Raises:
        UserError: No timm model with a stem, channels without a count, coefficients that depend on
            the content without calibration images, or a first layer that is no convolution of the
            channels (a space-to-depth).
    """
    wanted = parse_channels(model, channels)
    if not len(wanted):
        raise UserError(f"The set {wanted} has no count. Give ChannelSet.anonymous(n).")
    folded = copy.deepcopy(share(model, wanted).eval())
    found = [
        (path.removesuffix(".stem"), module)
        for path, module in folded.named_modules()
        if isinstance(module, Stem)
    ]
    if not found or not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise UserError(
            f"{type(model).__name__} is no timm model with a stem in it. Fold the timm model "
            f"itself, before it is wrapped."
        )
    coefficients = _coefficients(folded, wanted, [stem.mixer for _, stem in found], calibration)
    plain = True
    for (path, stem), a in zip(found, coefficients, strict=True):
        layer = _fold_stem(stem, a)
        plain &= [*map(type, stem.bank.modules())] == [*map(type, layer.modules())]
        parent, _, name = path.rpartition(".")
        put_layer(folded.get_submodule(parent), name, layer)
    _describe(folded, found[0][1].mixer, wanted, plain)
    return folded


def _coefficients(
    model: nn.Module,
    channels: ChannelSet,
    mixers: Sequence[Mixer],
    calibration: Iterable[Tensor] | None,
) -> list[Tensor]:
    """The coefficients `(C, K)` of every stem, or their mean over the calibration images."""
    like = next(model.parameters())
    probes = torch.zeros(2, len(channels), 8, 8).to(like)
    probes[1] = torch.linspace(-3, 5, 64).view(8, 8)
    answers = [mixer.coefficients(probes).expand(2, -1, -1) for mixer in mixers]
    if all(torch.equal(a[0], a[1]) for a in answers):
        return [a[0] for a in answers]
    if calibration is None:
        raise UserError(
            "The stem's coefficients depend on the content of the image. Give calibration images: "
            "batches (B, C, H, W) of this channel set, normalised as for the model; on the command "
            "line --data FOLDER."
        )
    sums = [torch.zeros_like(a[0], dtype=torch.float64) for a in answers]
    count = 0

    def gather(mixer: Mixer, inputs: tuple[Tensor, ...]) -> None:
        a = mixer.coefficients(inputs[0]).to(torch.float64)
        sums[mixers.index(mixer)] += a.expand(len(inputs[0]), -1, -1).sum(0)

    hooks = [mixer.register_forward_pre_hook(gather) for mixer in mixers]
    for batch in calibration:
        model(batch.to(like))
        count += len(batch)
    for hook in hooks:
        hook.remove()
    if not count:
        raise UserError("There are no calibration images: give at least one batch.")
    return [(total / count).to(like) for total in sums]


def _fold_stem(stem: Stem, coefficients: Tensor) -> nn.Module:
    """The bank for C channels, compared with the stem at these coefficients."""
    static = Stem(_FixedMixer(coefficients), *copy.deepcopy((stem.bank, stem.anchors))).eval()
    if isinstance(stem.bank, nn.Conv2d):
        layer: nn.Module = _fold_conv(stem.bank, coefficients, stem.anchors)
    else:
        layer = copy.deepcopy(stem.bank)
        for path, conv in list(layer.named_modules()):
            of_input = isinstance(conv, nn.Conv2d) and conv.in_channels == coefficients.shape[1]
            if of_input and conv.groups == 1:
                parent, _, name = path.rpartition(".")
                setattr(layer.get_submodule(parent), name, _fold_conv(conv, coefficients))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, len(coefficients), 64, 64, generator=generator).to(coefficients)
    try:
        same = _are_close(layer(x), static(x))
    except (RuntimeError, ValueError):
        same = False
    if not same:
        raise UserError(
            f"The first layer is a {type(stem.bank).__name__}, not a convolution of the channels, "
            f"so there is nothing to fold into. Export the model for the channel set instead: "
            f"timm-varchan export MODEL FILE --channels ..."
        )
    return layer


def _are_close(actual: Tensor, expected: Tensor) -> bool:
    limit = TOLERANCE_EPS * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool((actual - expected).abs().max() <= limit)


def _kernels(conv: nn.Module, coefficients: Tensor, anchors: nn.Conv2d | None = None) -> Tensor:
    """The kernels that a convolution applies, mixed: `(out, C, kh, kw)`."""
    x = coefficients.new_zeros(1, len(coefficients), 64, 64)
    return Stem(_FixedMixer(coefficients), conv, anchors).generated_kernels(x)[0]


def _fold_conv(
    conv: nn.Module, coefficients: Tensor, anchors: nn.Conv2d | None = None
) -> nn.Conv2d:
    """A convolution of C channels with the mixed kernels, of the same kind where that can be."""
    assert isinstance(conv, nn.Conv2d)
    kernels = _kernels(conv, coefficients.to(conv.weight), anchors).contiguous()
    same_kind = copy.deepcopy(conv)
    same_kind.in_channels = len(coefficients)
    if isinstance(conv, ScaledStdConv2d):
        fan_in = math.prod(kernels.shape[1:])
        scale: Any = conv.scale * math.sqrt(conv.weight[0].numel() / fan_in)
        same_kind.scale = scale
        variance, mean = torch.var_mean(kernels, (1, 2, 3), keepdim=True, correction=0)
        deviation = variance.sqrt().clamp(min=1e-12)
        same_kind.weight = nn.Parameter((kernels - mean) / deviation)
        same_kind.gain = nn.Parameter(deviation / scale)
    else:
        same_kind.weight = nn.Parameter(kernels)
    identity = torch.eye(len(coefficients)).to(kernels)
    if _are_close(_kernels(same_kind, identity), kernels):
        return same_kind
    kind = Conv2dSame if isinstance(conv, (StdConv2dSame, ScaledStdConv2dSame)) else nn.Conv2d
    names = ("out_channels", "kernel_size", "stride", "padding", "dilation")
    options: dict[str, Any] = {name: getattr(conv, name) for name in names}
    plain = kind(len(coefficients), **options, bias=conv.bias is not None).to(kernels)
    plain.weight = nn.Parameter(kernels)
    plain.bias = copy.deepcopy(conv.bias)
    return plain


def _describe(model: nn.Module, mixer: Mixer, channels: ChannelSet, plain: bool) -> None:
    """Tell timm what the model is now: the base architecture with other input channels."""
    cfg: dict[str, Any] = dict(model.pretrained_cfg)  # type: ignore[arg-type]
    base = str(cfg["architecture"]).removeprefix(PREFIX)
    ours = set(TWIN_ARGUMENTS)
    if base == cfg["architecture"]:  # no twin, so that `adapt` may have had any argument
        ours |= set(inspect.signature(type(mixer)).parameters)
    registered = get_pretrained_cfg(base) if timm.is_model(base) else None
    cfg["architecture"] = base if plain else f"{base}_folded"
    cfg["first_conv"] = registered.first_conv if registered else None
    cfg["input_size"] = (len(channels), *cfg["input_size"][1:])
    if channels.mean is not None:
        cfg |= {"mean": channels.mean, "std": channels.std}
    given = getattr(model, "_model_args", {})
    arguments = {name: value for name, value in given.items() if name not in ours}
    arguments["in_chans"] = len(channels)
    facts: dict[str, Any] = {
        "pretrained_cfg": cfg,
        "default_cfg": cfg,
        "_traits": {**getattr(model, "_traits", {}), "first_conv": cfg["first_conv"]},
        "_model_args": arguments,
        "in_chans": len(channels),
    }
    for name, value in facts.items():
        setattr(model, name, value)


@dataclass(frozen=True)
class FoldChange:
    """What folding changed on `num_images` images: logits, first classes and, by labels, accuracy.

    `logit_std` is the standard deviation of the model's own logits, to compare with; `agreement`
    the fraction of images with the same first class.
    """

    num_images: int
    max_logit: float
    mean_logit: float
    logit_std: float
    agreement: float
    accuracy: float | None = None
    folded_accuracy: float | None = None
    difference: Difference | None = None

    def told(self, which: str) -> str:
        """One or two lines for people; `which` images they are, as `other`."""
        text = (
            f"On {self.num_images} {which} images: logits change by {self.mean_logit:.2g} (at most "
            f"{self.max_logit:.2g}; their deviation is {self.logit_std:.2g}), first class equal "
            f"{self.agreement:.1%}"
        )
        if self.difference is None:
            return text
        change, low, high = self.difference[:3]
        return (
            f"{text}\naccuracy {self.accuracy:.1%} -> {self.folded_accuracy:.1%} (difference "
            f"{change:+.1%}, 95 % interval {low:+.1%} to {high:+.1%})"
        )


@torch.no_grad()
def measure_change(
    model: nn.Module,
    folded: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    channels: ChannelSetLike,
) -> FoldChange:
    """Compare a folded model with the model that it came from.

    Args:
        model: The model with stems; it is not changed.
        folded: What `fold` made of it for these channels.
        batches: Normalised batches `(B, C, H, W)`, other ones than those of the calibration, and
            their labels `(B,)` or None.
        channels: The channel set.
    """
    from timm_varchan.evaluation import paired_difference, predicted_classes  # of an extra

    twin, folded = share(model, channels).eval(), folded.eval()
    before, after, labels = [], [], []
    for x, label in batches:
        before.append(twin(x).float())
        after.append(folded(x).float())
        if label is not None:
            labels.append(label)
    if not before:
        raise UserError("There are no images to compare on: give at least one batch.")
    a, b = torch.cat(before), torch.cat(after)
    accuracy: dict[str, Any] = {}
    if labels:
        truth = torch.cat(labels).to(a.device)
        right, folded_right = ((predicted_classes(y) == truth).cpu().numpy() for y in (a, b))
        accuracy = {
            "accuracy": float(right.mean()),
            "folded_accuracy": float(folded_right.mean()),
            "difference": paired_difference(folded_right, right),
        }
    return FoldChange(
        num_images=len(a),
        max_logit=(a - b).abs().max().item(),
        mean_logit=(a - b).abs().mean().item(),
        logit_std=a.std().item(),
        agreement=(predicted_classes(a) == predicted_classes(b)).float().mean().item(),
        **accuracy,
    )

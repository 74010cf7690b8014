"""Put a stem into any timm model, and say which channels its input has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from timm.models import FeatureGraphNet, is_model
from torch import nn

from timm_varchan.channels import RGB, ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.stems import MIXERS, ChannelsLike, Mixer, make_stem

__all__ = ["adapt", "set_channels", "stems"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

#: Where timm's feature extraction wrappers keep the model that they wrap.
_WRAPPER_PREFIXES = ("", "model.", "body.")


def stems(model: nn.Module) -> list[Mixer]:
    """The mixers of all stems in a model, under any wrapper (EMA, DDP, feature extraction).

    Raises:
        UserError: There is none.
    """
    found = [module for module in model.modules() if isinstance(module, Mixer)]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no stem of timm_varchan. Create it as "
            f"timm.create_model('dwg_<architecture>') or pass it through timm_varchan.adapt(model)."
        )
    return found


def set_channels(model: nn.Module, channels: ChannelsLike | Sequence[ChannelSet]) -> None:
    """Say which channels the input of a model has from now on.

    The choice is part of the model's construction arguments, so saving keeps it. A copy made
    before (EMA) does not hear of it. For several sets at the same time see `share`.

    Args:
        model: A model with at least one stem.
        channels: A channel set in any form that `ChannelSet.parse` takes; `"anonymous"`: any count,
            no identity; None, the default rule: an input with exactly as many channels as the
            model's default set (RGB) is that set, any other count is anonymous; or a
            sequence of `ChannelSet`, one a sample, for a mixed batch.

    Raises:
        UserError: The model has no stem, or its stem cannot serve these channels.
    """
    mixers = stems(model)
    for mixer in mixers:
        mixer.set_channels(channels)
    current = mixers[0].channels
    if isinstance(current, tuple):
        return
    for module in model.modules():
        if isinstance(getattr(module, "_model_args", None), dict):
            _record(module, current, mixers[0].default_channels)


def _record(model: nn.Module, channels: ChannelSet | None, default: ChannelSet) -> None:
    """Keep the channel set where timm keeps what a model was built with."""
    arguments: dict[str, Any] = dict(model._model_args)  # type: ignore[arg-type]
    arguments.pop("channel_set", None)
    count = len(default)
    if channels is not None and channels.channels:
        count = len(channels)
        arguments["channel_set"] = channels.to_config()
    elif channels is not None:
        arguments["channel_set"] = "anonymous"
    if arguments.get("virtual_channels") is not None:
        arguments["virtual_channels"] = ChannelSet.parse(arguments["virtual_channels"]).to_config()
    arguments["in_chans"] = model.in_chans = count  # type: ignore[assignment]
    model._model_args = arguments  # type: ignore[assignment]


def adapt(
    model: ModuleT,
    stem: str = "dwg",
    *,
    channels: ChannelSetLike | None = None,
    in_chans: int | None = None,
    virtual_channels: ChannelSetLike | None = None,
    **stem_kwargs: Any,
) -> ModuleT:
    """Put a stem before the first convolution of a timm model, in place.

    The convolution stays as it is and becomes the stem's kernel bank, so pretrained weights are
    kept, also those of a model for other bands than RGB: name them by `virtual_channels`. Where two
    first convolutions stand in one block (RepVGG, MobileOne, FastViT) the mixer stands before the
    block; where each scale has its own (CrossViT) each gets a stem (their mixers are separate:
    safetensors refuses shared tensors); where it is behind a space-to-depth (TResNet) the mixer
    stands before that.

    Args:
        model: A timm model or one of timm's feature extraction wrappers.
        stem: Which mechanism: one of `timm_varchan.stems.MIXERS`.
        channels: The channels of the input; None for the default rule.
        in_chans: The default number of channels; without `channels`, a number other than that of
            `virtual_channels` means anonymous channels.
        virtual_channels: What the channels of the model's own first convolution stand for; RGB for
            three, else anonymous. An input with as many channels is taken for this set by default.
        **stem_kwargs: Further arguments of the mixer, e.g. `channel_names`.

    Returns:
        The model.

    Raises:
        UserError: No convolution to put a stem before, a stem there already, an unknown stem,
            `in_chans` that contradicts `channels`, or `virtual_channels` that do not fit the model.
    """
    if stem not in MIXERS:
        raise UserError(f"Unknown stem {stem!r}. Choose one of: {', '.join(MIXERS)}.")
    if any(isinstance(module, Mixer) for module in model.modules()):
        raise UserError("The model has a stem already; adapt a model only once.")
    given = _given_channels(channels, in_chans)
    placed = _stem_places(model)
    virtual = _virtual_channels(model, virtual_channels)
    default = virtual
    if in_chans is not None and in_chans != len(virtual):
        default = ChannelSet.anonymous(in_chans)
    for path in placed:
        bank = model.get_submodule(path).train(model.training)
        parent, _, name = path.rpartition(".")
        stem_module = make_stem(stem, bank, virtual, default, **stem_kwargs)
        setattr(model.get_submodule(parent), name, stem_module)
    model.in_chans = len(default)  # type: ignore[assignment]
    _describe(model, stem, virtual, stem_kwargs)
    if given is not None:
        set_channels(model, given)
    return model


def _describe(
    model: nn.Module, stem: str, virtual: ChannelSet, stem_kwargs: dict[str, Any]
) -> None:
    """Tell timm what the model is now: saved and loaded as the twin of its architecture."""
    model._traits = {**getattr(model, "_traits", {}), "first_conv": ()}  # type: ignore[assignment]
    arguments = dict(getattr(model, "_model_args", {}))
    if virtual != RGB:
        arguments["virtual_channels"] = virtual.to_config()
    model._model_args = {**arguments, **stem_kwargs}  # type: ignore[assignment]
    for name in ("pretrained_cfg", "default_cfg"):
        cfg = getattr(model, name, None)
        if not isinstance(cfg, dict):
            continue
        twin = f"dwg_{cfg.get('architecture')}"
        loadable = stem == "dwg" and set(stem_kwargs) <= {"channel_names"} and is_model(twin)
        setattr(
            model, name, {**cfg, "first_conv": (), **({"architecture": twin} if loadable else {})}
        )


def _given_channels(channels: ChannelSetLike | None, in_chans: int | None) -> ChannelSet | None:
    """The channel set that was asked for, if any, checked against the number of channels."""
    given = None if channels is None else ChannelSet.parse(channels)
    if given is not None and in_chans is not None and len(given) not in (0, in_chans):
        raise UserError(
            f"in_chans={in_chans} contradicts channels={given} ({len(given)} channels). "
            f"Leave one of them out."
        )
    return given


def _first_convs(model: nn.Module) -> list[str]:
    """Paths of the first convolutions, by what timm knows of the model."""
    names = getattr(model, "_traits", {}).get("first_conv")
    names = names or (getattr(model, "pretrained_cfg", None) or {}).get("first_conv")
    names = (names,) if isinstance(names, str) else tuple(names or ())
    if not names:
        raise UserError(
            f"timm names no first convolution for {type(model).__name__}, so there is no place for "
            f"a stem. Put timm_varchan.Stem(mixer, convolution) there by hand."
        )
    flat = {prefix.replace(".", "_") + name.replace(".", "_") for name in names
            for prefix in _WRAPPER_PREFIXES}  # fmt: skip
    found = [path for path, _ in model.named_modules() if path.replace(".", "_") in flat]
    convs = [path for path in found if isinstance(model.get_submodule(path), nn.Conv2d)]
    if len(convs) != len(names):
        raise UserError(
            f"The first layer of {type(model).__name__} ({', '.join(names)}) is no convolution of "
            f"2-D images, so there is no place for a stem. Models whose first layer is linear on "
            f"patches have no dwg_ twin."
        )
    return convs


def _source_channels(model: nn.Module) -> int:
    """K, the channels that the model's own first convolution was built for."""
    return int(getattr(model, "in_chans", 3))


def _virtual_channels(model: nn.Module, given: ChannelSetLike | None) -> ChannelSet:
    """What the channels of the model's own first convolution stand for."""
    num_virtual = _source_channels(model)
    if given is None:
        return RGB if num_virtual == len(RGB) else ChannelSet.anonymous(num_virtual)
    virtual = ChannelSet.parse(given)
    if len(virtual) != num_virtual:
        raise UserError(
            f"virtual_channels={virtual} are {len(virtual)} channels, but the first convolution "
            f"of {type(model).__name__} takes {num_virtual}. Name as many, in its order."
        )
    return virtual


def _stem_places(model: nn.Module) -> list[str]:
    """Paths of the modules before which a mixer has to stand."""
    if isinstance(model, FeatureGraphNet):
        raise UserError("Adapt the model before tracing it: features by 'fx' fix its first layer.")
    convs = _first_convs(model)
    if len(convs) > 1:
        shared = _common_parent(convs)
        block = model.get_submodule(shared)
        if shared and not isinstance(block, (nn.ModuleList, nn.Sequential)):
            return [shared]
    num_virtual = _source_channels(model)
    return [
        path
        if model.get_submodule(path).in_channels == num_virtual
        else _before_rearrangement(model, path)
        for path in convs
    ]


def _common_parent(paths: list[str]) -> str:
    """The path of the deepest module that holds all of these."""
    split = [path.split(".") for path in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _before_rearrangement(model: nn.Module, path: str) -> str:
    """The first module of the chain in which a convolution stands behind a space-to-depth."""
    parent = path
    while parent:
        parent = parent.rpartition(".")[0]
        chain = model.get_submodule(parent)
        if isinstance(chain, (nn.Sequential, nn.ModuleDict)):
            first = next(iter(chain._modules))
            return f"{parent}.{first}" if parent else first
    raise UserError(f"Cannot tell where the channels of the input enter before {path}.")

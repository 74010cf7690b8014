"""A twin `dwg_<architecture>` for every timm architecture that begins with a convolution.

Registered by rule when the package is imported; nothing is built until `timm.create_model`.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import (
    DefaultCfg,
    FeatureGraphNet,
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    load_state_dict,
    load_state_dict_from_hf,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._builder import load_state_dict_from_path
from timm.models._hub import HF_WEIGHTS_NAME
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.models.adapt import adapt, stems
from timm_varchan.models.shipped import shipped_cfg

__all__: list[str] = []

PREFIX = "dwg_"
#: Families whose first layer is linear on patches of pixels: there is no convolution to keep.
LINEAR_FAMILIES = frozenset({"naflexvit", "gemma4_vit"})

#: The codes of names without a wavelength, in a mixer's weights.
VOCABULARY = "vocabulary.weight"
#: What a twin's configuration says otherwise than the one its base was built with.
OWN_KEYS = frozenset(
    {"architecture", "tag", "url", "file", "hf_hub_id", "hf_hub_filename", "source", "input_size"}
)
#: Read by timm's `register_model`.
default_cfgs: dict[str, DefaultCfg] = {}


def base_architectures() -> list[str]:
    """List the architectures of timm that get a twin."""
    linear = {name for family in LINEAR_FAMILIES for name in timm.list_models(module=family)}
    return [
        name
        for name in timm.list_models()
        if not name.startswith(PREFIX)
        and name not in linear
        and (cfg := get_pretrained_cfg(name)) is not None
        and cfg.first_conv
    ]


def _split_twin_weights(
    state_dict: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Divide a twin's weights into those of the base architecture and those of its mixers.

    Args:
        state_dict: Weights of a base architecture or of its twin.

    Returns:
        The base architecture's weights under its own names, and for each stem (by its path) its
        mixer's weights; no mixers if the weights are those of a base architecture.
    """
    paths = {m[1] for key in state_dict if (m := re.match(r"(.+)\.mixer\.", key))}
    base: dict[str, Tensor] = {}
    mixers: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for key, value in state_dict.items():
        path = next((p for p in paths if key.startswith(p + ".")), None)
        if path is None:
            base[key] = value
        elif key.startswith(f"{path}.mixer."):
            mixers[path][key.removeprefix(f"{path}.mixer.")] = value
        else:
            base[path + key.removeprefix(f"{path}.bank")] = value
    return base, mixers


def _read_weights(cfg: PretrainedCfg, base: str, cache_dir: Any) -> dict[str, Any] | None:
    """Read the state dict behind a configuration, if it may be that of a twin.

    Weights that timm publishes for the base architecture are left to timm's own loading.
    """
    if cfg.custom_load:
        return None
    if cfg.state_dict is not None:
        return dict(cfg.state_dict)
    if cfg.source == "local-dir":
        return load_state_dict_from_path(Path(str(cfg.file)))
    if cfg.file is not None and cfg.source is None:
        return load_state_dict(cfg.file)
    published = {known.hf_hub_id for known in get_arch_pretrained_cfgs(base).values()}
    if cfg.hf_hub_id is None or cfg.hf_hub_id in published:
        return None
    return load_state_dict_from_hf(
        cfg.hf_hub_id,
        cfg.hf_hub_filename or HF_WEIGHTS_NAME,
        weights_only=True,
        cache_dir=cache_dir,
    )


def _build_twin(
    base: str,
    *,
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: Any = None,
    in_chans: int | None = None,
    channel_set: ChannelSetLike | None = None,
    channel_names: tuple[str, ...] = (),
    virtual_channels: ChannelSetLike | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the base architecture by its own function and put a stem into it.

    Args:
        base: The base architecture.
        pretrained: Load weights: those of the base architecture, or the twin's own.
        pretrained_cfg: As in `timm.create_model`.
        pretrained_cfg_overlay: As in `timm.create_model`.
        cache_dir: As in `timm.create_model`.
        in_chans: The default number of channels; a number other than 3 without `channel_set` means
            anonymous channels. The kernel bank has the base's 3.
        channel_set: The channels of the input (`channels` is taken: it is ResNet's widths); None
            for the default rule.
        channel_names: Names without a wavelength that the model learns a code for.
        virtual_channels: Build the kernel bank for these channels instead of RGB: for training on
            many bands from scratch. timm tiles pretrained RGB kernels over them.
        **kwargs: Every other keyword of the base architecture.
    """
    cfg = resolve_pretrained_cfg(PREFIX + base, pretrained_cfg, pretrained_cfg_overlay)
    registered = get_pretrained_cfg(base)
    assert registered is not None
    # A saved twin's configuration holds its own count; the bank keeps the base's.
    input_size = (registered.input_size[0], *cfg.input_size[1:])
    base_cfg = replace(
        cfg, architecture=base, first_conv=registered.first_conv, input_size=input_size
    )
    weights = _read_weights(cfg, base, cache_dir) if pretrained else None
    mixers: dict[str, dict[str, Tensor]] = {}
    if weights is not None:
        weights, mixers = _split_twin_weights(weights)
        nowhere: dict[str, Any] = dict.fromkeys(("url", "file", "hf_hub_id", "source"))
        base_cfg = replace(base_cfg, state_dict=weights, **nowhere)
    traced = kwargs.get("features_only") and kwargs.get("feature_cls") == "fx"
    if traced:
        if "out_indices" not in kwargs:  # each family has its own default
            kwargs["out_indices"] = model_entrypoint(base)(**kwargs).feature_info.out_indices
        out_indices = kwargs.pop("out_indices")
        del kwargs["features_only"], kwargs["feature_cls"]
    saved = kwargs.get("pretrained_model_args") or {}
    if saved and in_chans != saved.get("in_chans") and channel_set == saved.get("channel_set"):
        channel_set = None  # another count than the saved one: the saved set does not apply
    elif saved and channel_set != saved.get("channel_set"):
        in_chans = None  # another set than the saved one: nor does the saved count
    if virtual_channels is not None:
        kwargs["in_chans"] = len(ChannelSet.parse(virtual_channels))
    model = model_entrypoint(base)(
        pretrained=pretrained, pretrained_cfg=base_cfg.to_dict(), cache_dir=cache_dir, **kwargs
    )
    adapt(
        model, "dwg", channels=channel_set, in_chans=in_chans, channel_names=channel_names,
        virtual_channels=virtual_channels,
    )  # fmt: skip
    _load_mixers(model, mixers)
    own = {key: value for key, value in cfg.to_dict().items() if key in OWN_KEYS}
    kept = {key: v for key, v in model.pretrained_cfg.items() if key != "state_dict"}
    model.pretrained_cfg = model.default_cfg = {**kept, **own}
    return _trace_features(model, out_indices) if traced else model


def _load_mixers(model: nn.Module, weights: dict[str, dict[str, Tensor]]) -> None:
    """Load the stems' own weights, if there are any; stems stand in the order of their paths."""
    mixers = stems(model)
    if weights and len(mixers) != len(weights):
        raise UserError(
            f"The weights hold {len(weights)} stems, but the model has {len(mixers)}: they belong "
            f"to another architecture."
        )
    for mixer, path in zip(mixers, sorted(weights), strict=False):
        saved, own = weights[path], mixer.state_dict().get(VOCABULARY)
        if own is not None:
            # Names that came after those of the saved model keep their fresh codes.
            rows = saved.get(VOCABULARY, own[:0])
            saved = {**saved, VOCABULARY: torch.cat([rows, own[len(rows) :]])}
        mixer.load_state_dict(saved)


def _trace_features(model: nn.Module, out_indices: tuple[int, ...]) -> nn.Module:
    """Extract features by torch.fx, on a graph made from the adapted model."""
    features = FeatureGraphNet(model, out_indices=out_indices)
    for name in ("pretrained_cfg", "default_cfg", "in_chans", "_traits", "_model_args"):
        setattr(features, name, getattr(model, name))
    return features


def _entrypoint(base: str) -> Callable[..., nn.Module]:
    """The function that timm calls for the twin of an architecture."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build_twin(base, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = PREFIX + base
    create.__doc__ = f"`{base}` for any number of channels."
    return create


def register_twins() -> None:
    """Register the twins with timm, under the tags of their base architectures."""
    for base in base_architectures():
        cfgs = get_arch_pretrained_cfgs(base)
        for cfg in cfgs.values():
            cfg.first_conv = ()  # type: ignore[assignment]  # not None: timm shall do no surgery on a stem
        tags = {name.partition(".")[2]: cfg for name, cfg in cfgs.items()}
        tag, fields = shipped_cfg(PREFIX + base)
        if fields:
            tags = {tag: replace(next(iter(cfgs.values())), **fields)}
        default_cfgs[PREFIX + base] = DefaultCfg(tags=deque(tags), cfgs=tags)
        globals()[PREFIX + base] = register_model(_entrypoint(base))


register_twins()

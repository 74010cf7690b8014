"""A twin `dwg_<architecture>` for every timm architecture that begins with a convolution.

Registered by rule when the package is imported; nothing is built until `timm.create_model`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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
    is_model,
    load_state_dict,
    load_state_dict_from_hf,
    model_entrypoint,
    resolve_pretrained_cfg,
)
from timm.models import register_model as _register
from timm.models._builder import load_state_dict_from_path
from timm.models._hub import HF_WEIGHTS_NAME
from timm.models._registry import _model_pretrained_cfgs, _model_with_tags
from torch import Tensor, nn

from timm_varchan.channels import RGB, ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError
from timm_varchan.models.adapt import adapt, named_channels, with_rgb_first
from timm_varchan.stems import Stem
from timm_varchan.stems.stem import effective_weight

PREFIX = "dwg_"
#: Families whose first layer is linear on patches of pixels: there is no convolution to keep.
LINEAR_FAMILIES = frozenset({"naflexvit", "gemma4_vit"})

#: The codes of names without a wavelength, in a mixer's weights.
VOCABULARY = "vocabulary.weight"
#: What a twin's configuration says otherwise than the one its base was built with.
OWN_KEYS = frozenset(
    {"architecture", "tag", "url", "file", "hf_hub_id", "hf_hub_filename", "source", "input_size"}
)
#: Read by timm's own `register_model`.
default_cfgs: dict[str, DefaultCfg] = {}


def base_cfgs() -> Iterator[tuple[str, dict[str, PretrainedCfg]]]:
    """The architectures that get a twin, with timm's own configurations of each, default first.

    Out of the registry itself, not to be changed: what timm hands out are deep copies, and those of
    all architectures would be most of what importing this package costs.
    """
    linear = {name for family in LINEAR_FAMILIES for name in timm.list_models(module=family)}
    for name in timm.list_models():
        if name.startswith(PREFIX) or name in linear:
            continue
        cfgs = {tagged: _model_pretrained_cfgs[tagged] for tagged in _model_with_tags[name]}
        default = next(iter(cfgs.values()), None)
        if default is not None and default.first_conv:
            yield name, cfgs


def _split_twin_weights(
    state_dict: dict[str, Tensor], first_convs: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Divide a twin's weights into those of the base architecture and what its stems add.

    Stems are beside a first convolution, with nothing but a stem's parts; the name alone says
    nothing: the blocks of some architectures have a `mixer` or a `bank`.

    Args:
        state_dict: Weights of a base architecture or of its twin.
        first_convs: Where the base has its first convolutions.

    Returns:
        The base architecture's weights under its own names, and for each stem (by its path) the
        weights of its `mixer` and its `anchors`; no stems if the weights are those of a base.
    """
    paths = []
    for path in dict.fromkeys(k.partition(".bank.")[0].partition(".mixer.")[0] for k in state_dict):
        above = path.rpartition(".")[0]
        if any(not above or f"{conv}.".startswith(f"{above}.") for conv in first_convs):
            keys = [key for key in state_dict if key.startswith(f"{path}.")]
            parts = {key[len(path) + 1 :].partition(".")[0] for key in keys}
            if parts and parts <= {"bank", "mixer", "anchors"}:
                paths.append(path)
    base: dict[str, Tensor] = {}
    added: dict[str, dict[str, Tensor]] = {path: {} for path in sorted(paths)}
    for key, value in state_dict.items():
        path = next((p for p in paths if key.startswith(p + ".")), "")
        part = key.removeprefix(f"{path}.")
        if path and not part.startswith("bank."):
            added[path][part] = value
        else:
            base[path + part.removeprefix("bank") if path else key] = value
    return base, added


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
    published = {cfg.hf_hub_id for cfg in get_arch_pretrained_cfgs(base).values()}
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
    channel_stats: ChannelSetLike | None = None,
    statistics: ChannelSetLike | None = None,
    prior: str | None = None,
    prior_scale: str = "plain",
    stem: str = "dwg",
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
        virtual_channels: What the kernels are for, instead of RGB. More channels, R, G and B or
            bands close to them among them: RGB's kernels are the base's, the others are anchors,
            which start at zero beside pretrained weights and at random otherwise. Other channels:
            the bank is built for them by the base's own `in_chans=`.
        channel_stats: Mean, deviation and correlation of the planes, from `measure_channels`.
        statistics: The same by its other name.
        prior: How absent virtual channels are made of the others, see `Mixer`; None: measured with
            statistics, else spectral, or what a saved model was trained with.
        prior_scale: See `Mixer`.
        stem: Which mechanism: one of `timm_varchan.stems.STEMS`.
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
    added: dict[str, dict[str, Tensor]] = {}
    if weights is not None:
        convs: Any = registered.first_conv
        convs = (convs,) if isinstance(convs, str) else tuple(convs)
        weights, added = _split_twin_weights(weights, convs)
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
        names = named_channels(channel_names, channel_stats)
        virtual_channels = ChannelSet.parse(virtual_channels, own=names)
        if not _takes_anchors(registered, virtual_channels, added):
            kwargs["in_chans"] = len(virtual_channels)
    model = model_entrypoint(base)(
        pretrained=pretrained, pretrained_cfg=base_cfg.to_dict(), cache_dir=cache_dir, **kwargs
    )
    words = {"channel_names": channel_names} if channel_names and stem == "dwg" else {}
    adapt(
        model, stem, channels=channel_set, in_chans=in_chans, virtual_channels=virtual_channels,
        channel_stats=channel_stats or statistics, prior=prior, prior_scale=prior_scale,
        **words,
    )  # fmt: skip
    if not pretrained:
        _start_anchors(model)
    _load_added(model, added)
    changes = {key: value for key, value in cfg.to_dict().items() if key in OWN_KEYS}
    kept = {key: v for key, v in model.pretrained_cfg.items() if key != "state_dict"}
    model.pretrained_cfg = model.default_cfg = {**kept, **changes}
    return _trace_features(model, out_indices) if traced else model


def _takes_anchors(
    registered: PretrainedCfg, virtual: ChannelSet, added: dict[str, dict[str, Tensor]]
) -> bool:
    """Whether virtual channels are those of the base's RGB kernels, and perhaps more."""
    if added and not any("anchors.weight" in weights for weights in added.values()):
        return False  # one bank for all of them: a model that was adapted
    base_chans = registered.input_size[0]
    if len(virtual) <= base_chans or base_chans != len(RGB):
        return len(virtual) == base_chans
    return with_rgb_first(virtual) is not None


@torch.no_grad()
def _start_anchors(model: nn.Module) -> None:
    """Random kernels for the anchors of a model whose other kernels are random, of their size."""
    for module in model.modules():
        if isinstance(module, Stem) and module.anchors is not None:
            weight = effective_weight(module.bank)  # type: ignore[arg-type]  # anchors need a convolution
            if weight.device.type != "meta":
                nn.init.normal_(module.anchors.weight, std=weight.float().std().item())


def _load_added(model: nn.Module, weights: dict[str, dict[str, Tensor]]) -> None:
    """Load the stems' own weights, if there are any; stems stand in the order of their paths."""
    found = [module for module in model.modules() if isinstance(module, Stem)]
    if weights and len(found) != len(weights):
        raise UserError(
            f"The weights hold {len(weights)} stems, but the model has {len(found)}: they belong "
            f"to another architecture."
        )
    for stem, path in zip(found, sorted(weights), strict=False):
        kernels = {k: v for k, v in weights[path].items() if k == "anchors.weight"}
        codes = {k.removeprefix("mixer."): v for k, v in weights[path].items() if k not in kernels}
        rows = stem.mixer.state_dict().get(VOCABULARY)
        if rows is not None:
            # Names that came after those of the saved model keep their fresh codes.
            saved = codes.get(VOCABULARY, rows[:0])
            codes[VOCABULARY] = torch.cat([saved, rows[len(saved) :]])
        stem.mixer.load_state_dict(codes)
        if stem.anchors is not None and kernels:
            stem.anchors.load_state_dict({"weight": kernels["anchors.weight"]})


def _trace_features(model: nn.Module, out_indices: tuple[int, ...]) -> nn.Module:
    """Extract features by torch.fx, on a graph made from the adapted model."""
    features = FeatureGraphNet(model, out_indices=out_indices)
    for name in ("pretrained_cfg", "default_cfg", "in_chans", "_traits", "_model_args"):
        setattr(features, name, getattr(model, name))
    return features


def _register_twin(name: str, base: str, cfgs: DefaultCfg, **defaults: Any) -> None:
    """Make a twin, with arguments built in, known to timm under a name."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _build_twin(base, pretrained=pretrained, **{**defaults, **kwargs})

    create.__name__ = create.__qualname__ = name
    given = f", with {', '.join(defaults)} set" if defaults else ""
    create.__doc__ = f"`{base}` for any number of channels{given}."
    default_cfgs[name] = cfgs
    globals()[name] = _register(create)


def register_model(name: str, base: str, **defaults: Any) -> None:
    """Register a twin under a name of its own, with a channel set or other arguments built in.

    For programs that know a model by its name only.

    Args:
        name: The new name, e.g. `dwg_resnet18_s2`.
        base: The architecture of timm, e.g. `resnet18`, or of a twin, `dwg_resnet18`.
        **defaults: What the twin is built with unless the caller says otherwise: `channel_set`,
            `virtual_channels`, `channel_stats`, ...

    Raises:
        UserError: A name that timm knows, a base that has no twin, or a channel set that nobody
            can read.
    """
    base = base.removeprefix(PREFIX)
    if is_model(name):
        raise UserError(f"timm knows a model {name!r} already; choose another name.")
    if not is_model(PREFIX + base):
        raise UserError(f"{base!r} has no twin {PREFIX + base!r}; see timm.list_models('dwg_*').")
    if defaults.get("channel_set") is not None:
        defaults["channel_set"] = ChannelSet.parse(defaults["channel_set"]).to_dict()
    _register_twin(name, base, default_cfgs[PREFIX + base], **defaults)


for _base, _cfgs in base_cfgs():
    # () and not None: timm shall do no surgery on a stem
    _tags = {
        _name.partition(".")[2]: replace(_cfg, first_conv=())  # type: ignore[arg-type]
        for _name, _cfg in _cfgs.items()
    }
    _register_twin(PREFIX + _base, _base, DefaultCfg(tags=deque(_tags), cfgs=_tags))

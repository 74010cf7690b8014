"""The benchmarks as data: what is trained, on what it is tested, with what it is compared.

An arm is the keyword arguments of a `TrainConfig`; `run.py` trains it by the package's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import peers as peers  # registers its models
import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from timm_varchan import adapt
from timm_varchan.channels import ChannelSet, seeded_rng

__all__ = ["BENCHMARKS", "WAYS", "Arm", "Benchmark", "Way"]

Sets = dict[str, list[tuple[int, ...]]]
Config = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """How a trained model meets the channels of a set; a plain one as trained only all of them.

    Args:
        mode: Key of `timm_varchan.evaluation.MODES`.
        order: One of `ORDERS`.
        prior: Puts the stem `prior` with this prior into a plain model, which is not trained
            further; `measured` and `spectral` see the correlation of its training images.
        estimated: BatchNorm's buffers are estimated anew for each set, on training images.
    """

    mode: str = "named"
    order: str = "in order"
    prior: str | None = None
    estimated: bool = False


WAYS: dict[str, Way] = {
    "trained": Way(),
    "anonymous": Way("anonymous", "shuffled"),
    **{prior: Way(prior=prior) for prior in ("zero", "mean", "spectral", "measured")},
    **{f"{prior}, estimated": Way(prior=prior, estimated=True) for prior in ("zero", "measured")},
}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        config: Keyword arguments of `TrainConfig`. In it `{lite0}` is the file of the ImageNet
            weights, `{channel_stats}` what was measured on the training images, and `{run:ARM}`
            the saved model of another arm of the same seed and fold.
        ways: Keys of `WAYS`: how it is tested.
        only_all: Tested on the set of all its channels alone.
        untrained: Nothing is trained: the classes of the data out of ImageNet's; of `config` only
            `img_size` counts.
        against: Arms that it is compared with on the same images: `ARM` or `ARM|WAY`, in which
            `{set}` is the channel set.
    """

    config: Mapping[str, Any]
    ways: tuple[str, ...] = ("trained",)
    only_all: bool = False
    untrained: bool = False
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """Arms on the same images.

    Args:
        conditions: Data, size and budget, for the name of the file of results.
        channels: The planes of the images.
        questions: What is asked: channel sets as positions of planes, by name.
        arms: By name.
        split: Key of `run.SPLITS`: how the images are divided; None: the data say it.
        seeds: Of training; the images are divided once, so that all seeds answer the same ones.
        folds: How many the division has.
    """

    conditions: str
    channels: str
    questions: Sets
    arms: Mapping[str, Arm]
    split: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    folds: int = 1

    def channel_set(self) -> ChannelSet:
        """The planes of the images."""
        return ChannelSet.parse(self.channels, new_names=True)


def every_subset(channels: str) -> Sets:
    """Each subset alone, by name, and the means over those of a size and over all."""
    planes = ChannelSet.parse(channels, new_names=True)
    sets = planes.subset_indices()
    few = {len(planes) - 1: "all but one", 1: "one"}
    return (
        {str(planes.take(indices)): [indices] for indices in sets}
        | {name: [s for s in sets if len(s) == size] for size, name in few.items()}
        | {"every set": sets}
    )  # fmt: skip


def experts(config: Config, channels: str) -> dict[str, Arm]:
    """A plain model for each subset, by timm's own `in_chans=`; that for all also without some."""
    planes = ChannelSet.parse(channels, new_names=True)
    plain = {**config, "channel_aug": "none"}
    arms = {f"expert-{planes}": Arm(plain, ("trained", "zero", "mean", "measured"))}
    for indices in planes.subset_indices()[1:]:
        name = str(planes.take(indices))
        arms[f"expert-{name}"] = Arm({**plain, "use": name, "sets": name}, only_all=True)
    return arms


def behind(config: Config, stem: str | None = None, prior: str | None = None) -> Config:
    """The twin of a plain model, or the model behind a stem in which nothing is learned."""
    given = {"stem": stem, "prior": prior}
    kwargs = {**config.get("model_kwargs", {}), **{k: v for k, v in given.items() if v is not None}}
    return {**config, "model": f"dwg_{config['model']}", "model_kwargs": kwargs}  # fmt: skip


def rivals(config: Config, against: tuple[str, ...]) -> dict[str, Arm]:
    """The twin, and the same network that fills in absent channels, all trained on subsets."""
    return {
        "zero": Arm(behind(config, "prior", "zero"), against=against),
        "mean": Arm(behind(config, "prior", "mean"), against=against),
        "twin-prior": Arm(behind(config, "prior"), against=(*against, "zero", "mean")),
        "twin": Arm(behind(config, "dwg"), against=(*against, "zero", "mean", "twin-prior")),
    }


TO_EXPERTS = ("expert-{set}",)
BASIC: Config = {
    "workers": 0, "cache": True, "mixed_precision": "no", "channels_last": True, "val_max_sets": 0,
    "rotation_degrees": 0.0,
}  # fmt: skip

# --- RGB of photographs: EfficientNet-Lite0 with its ImageNet weights

LITE0: Config = {
    "model": "tf_efficientnet_lite0", "pretrained": True, "lr": 3e-3,
    "model_kwargs": {"pretrained_cfg_overlay": {"file": "{lite0}"}},
}  # fmt: skip
FINETUNE: Config = {
    **BASIC, **LITE0, "img_size": 64, "limit": 2500, "epochs": 6, "batch_size": 32,
    "crop_scale": (0.6, 1.0), "sets": "RGB",
}  # fmt: skip
finetune = Benchmark(
    conditions="tinyimagenet50-64px-2500images-6ep",
    channels="RGB",
    questions=every_subset("RGB"),
    arms={
        **experts(FINETUNE, "RGB"),
        **rivals(FINETUNE, TO_EXPERTS),
        "twin-2x": Arm({**behind(FINETUNE, "dwg"), "epochs": 12}, against=TO_EXPERTS),
        # The classifier is that of the expert for RGB: only what mixes the channels is trained.
        "stem-only": Arm(
            {
                **FINETUNE, "model": "local-dir:{run:expert-RGB}", "pretrained": False,
                "model_kwargs": {}, "adapt": True, "train_only": "stem",
            },
            against=TO_EXPERTS,
        ),
    },
)  # fmt: skip
transfer = Benchmark(
    conditions="tinyimagenet50-160px-imagenet",
    channels="RGB",
    questions=every_subset("RGB"),
    arms={
        "lite0": Arm(
            {"img_size": 160},
            tuple(way for way in WAYS if way != "anonymous"),
            untrained=True, against=("lite0|zero",),
        )
    },
    seeds=(0,),
)  # fmt: skip

# --- Thirteen bands of Sentinel-2

#: In the order of the files: B8A is last.
BANDS = "B01+B02+B03+B04+B05+B06+B07+B08+B09+B10+B11+B12+B8A"
K6 = "R+G+B+B06+B08+B11"
#: Each band has a kernel; R, G and B have those of the ImageNet weights.
K13 = "R+G+B+B01+B05+B06+B07+B08+B09+B10+B11+B12+B8A"
EUROSAT: Config = {
    **BASIC, "channels": BANDS, "value_scale": 10000.0, "img_size": 64, "batch_size": 16,
    "vflip": 0.5, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "sets": "B08",
}  # fmt: skip


def many_bands() -> Sets:
    """All, all but one, what cameras have, each alone, and twenty sets of a random size."""
    bands = ChannelSet.parse(BANDS)
    everything = tuple(range(len(bands)))
    rng = seeded_rng("eurosat subsets", 0)
    drawn = []
    for _ in range(20):
        drawn.append(tuple(sorted(rng.sample(everything, rng.randint(1, len(bands))))))
    by_size = {f"{n} left": [s for s in drawn if len(s) == n] for n in (3, 4, 8, 10)}
    return {
        "all": [everything],
        "all but one": [everything[:i] + everything[i + 1 :] for i in everything],
        "RGB": [bands.index("B04+B03+B02")],
        "RGB+NIR": [bands.index("B04+B03+B02+B08")],
        "one": [(i,) for i in everything],
        "random": drawn,
        **by_size,
    }


default_cfgs = generate_default_cfgs({
    "dwg_tiled_lite0": {"input_size": (3, 224, 224), "first_conv": (), "classifier": "classifier"}
})  # fmt: skip


def _tiled_lite0(weights: str, in_chans: int, stem: Config, **kwargs: Any) -> nn.Module:
    overlay = {"file": weights}
    model = timm.create_model(
        "tf_efficientnet_lite0", pretrained=True, in_chans=in_chans,
        pretrained_cfg_overlay=overlay, **kwargs,
    )  # fmt: skip
    return adapt(model, "prior", channels=BANDS, virtual_channels=BANDS, **stem)


@register_model
def dwg_tiled_lite0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Timm's EfficientNet-Lite0 with `in_chans=13`; absent bands are filled in before it.

    `weights` is the file of the three-channel weights, which timm repeats over the bands.
    """
    stem = {k: kwargs.pop(k) for k in ("prior", "channel_stats") if k in kwargs}
    for noted in ("prior_scale", "channel_set", "virtual_channels", "channel_names"):
        kwargs.pop(noted, None)
    kwargs["in_chans"] = len(BANDS.split("+"))
    return build_model_with_cfg(_tiled_lite0, "dwg_tiled_lite0", pretrained, stem=stem, **kwargs)


LITE: Config = {**EUROSAT, **LITE0, "epochs": 20}


def tiled(prior: str) -> Arm:
    """Timm's own `in_chans=13`, trained on subsets whose absent bands are filled in."""
    kwargs = {"weights": "{lite0}", "prior": prior}
    if prior == "measured":
        kwargs["channel_stats"] = "{channel_stats}"
    config = {**LITE, "model": "dwg_tiled_lite0", "pretrained": False, "model_kwargs": kwargs}
    return Arm(config, against=("tiled|zero",))


PLAIN = ("tiled|zero", "tiled|measured", "tiled-zero", "tiled-mean", "tiled-measured")
OWN_13: Config = {**LITE, "virtual_channels": K13}
eurosat = Benchmark(
    conditions="eurosat13-64px-20ep",
    channels=BANDS,
    questions=many_bands(),
    split="by place",
    folds=5,
    arms={
        "tiled": Arm({**LITE, "channel_aug": "none"}, ("zero", "mean", "measured"),
                     against=("tiled|zero",)),
        **{f"tiled-{prior}": tiled(prior) for prior in ("zero", "mean", "measured")},
        "rgb-zero": Arm(behind(OWN_13, "prior", "zero"), against=PLAIN),
        "twin-prior": Arm(behind(OWN_13, "prior"), against=(*PLAIN, "rgb-zero")),
        "twin": Arm(behind(OWN_13, "dwg"), against=(*PLAIN, "rgb-zero", "twin-prior")),
        "twin-k3": Arm(behind({**LITE, "virtual_channels": "RGB"}, "dwg"), against=("twin",)),
        "twin-k6": Arm(behind({**LITE, "virtual_channels": K6}, "dwg"), against=("twin",)),
        **{
            f"twin-full{100 * full:.0f}": Arm(behind({**OWN_13, "full_share": full}, "dwg"),
                                              against=("twin",))
            for full in (0.25, 0.75)
        },
    },
)  # fmt: skip

# --- From scratch: small networks, and published mechanisms beside ours

QUARTER = {"channels": [16, 32, 64, 128], "stem_width": 16}
SCRATCH: Config = {
    **EUROSAT, "model": "resnet10t", "model_kwargs": QUARTER, "virtual_channels": BANDS,
    "epochs": 60,
}  # fmt: skip
#: Transformers of as many parameters, 16 tokens an image and 16 for each of its channels.
VIT = {"img_size": 64, "patch_size": 16, "depth": 4}
PEERS: dict[str, Config] = {
    "twin": behind(SCRATCH),
    "dofa": {**SCRATCH, "model": "dwg_dofa_resnet10t", "virtual_channels": None, "model_kwargs": {
        **QUARTER, "width": 32, "num_tokens": 32, "feedforward": 128
    }},
    "channel-vit": {**SCRATCH, "model": "dwg_channel_vit", "virtual_channels": None, "lr": 1e-3,
                    "model_kwargs": {
        **VIT, "virtual_channels": BANDS, "embed_dim": 128, "num_heads": 4
    }},
    "vit-twin": {**SCRATCH, "model": "dwg_vit_tiny_patch16_224", "lr": 1e-3, "model_kwargs": {
        **VIT, "embed_dim": 96, "num_heads": 3
    }},
}  # fmt: skip
scratch = Benchmark(
    conditions="eurosat13-64px-60ep",
    channels=BANDS,
    questions=many_bands(),
    split="by place",
    folds=5,
    arms={
        **rivals(SCRATCH, ()),
        **{name: Arm(config, against=("twin", "vit-twin")) for name, config in PEERS.items()
           if name != "twin"},
    },
)  # fmt: skip

#: A ResNet-10 half as wide as timm's: the smallest BatchNorm network that shows the effect.
SMALL = {"channels": [32, 64, 128, 256], "stem_width": 16}
TINY: Config = {
    **BASIC, "img_size": 32, "epochs": 30, "batch_size": 128, "lr": 2e-3, "warmup_epochs": 2,
    "smoothing": 0.1, "crop_scale": (0.6, 1.0), "sets": "RGB",
}  # fmt: skip
TASK1: Config = {**TINY, "model": "resnet10t", "model_kwargs": SMALL}
task1 = Benchmark(
    conditions="tinyimagenet25-32px-30ep",
    channels="RGB",
    questions=every_subset("RGB"),
    split="first 25 classes",
    arms={**experts(TASK1, "RGB"), **rivals(TASK1, TO_EXPERTS)},
)

FLAGSHIP: Config = {
    **BASIC, "model": "densenet121", "img_size": 32, "limit": 12500, "epochs": 12,
    "batch_size": 64, "mixed_precision": "bf16", "rotation_degrees": 15.0, "sets": "RGB",
}  # fmt: skip
flagship = Benchmark(
    conditions="tinyimagenet50-32px-12500images-12ep",
    channels="RGB",
    questions=every_subset("RGB"),
    arms={
        "plain": Arm({**FLAGSHIP, "channel_aug": "none"}),
        "none": Arm({**behind(FLAGSHIP), "channel_aug": "none"}, ("trained", "anonymous"),
                    against=("plain",)),
        "shuffle": Arm(
            {**behind(FLAGSHIP), "channel_aug": "shuffle", "channel_identity": "anonymous"},
            ("anonymous",), against=("plain", "none|anonymous"),
        ),
        "twin": Arm(behind(FLAGSHIP), ("trained", "anonymous"), against=("plain", "none")),
    },
    seeds=(0,),
)  # fmt: skip

# --- Stains: kinds of contrast without a wavelength

CONTRASTS = "brightfield+DNA+darkfield"
STAINS: Config = {
    **BASIC, "channels": CONTRASTS, "new_names": True, "model": "resnet10t", "model_kwargs": SMALL,
    "img_size": 40, "epochs": 30, "batch_size": 64, "vflip": 0.5, "crop_scale": (0.8, 1.0),
    "rotation_degrees": 15.0, "sets": "DNA",
}  # fmt: skip
stains = Benchmark(
    conditions="jurkat3-40px-30ep",
    channels=CONTRASTS,
    questions=every_subset(CONTRASTS),
    split="by class",
    folds=5,
    arms={**experts(STAINS, CONTRASTS), **rivals(STAINS, TO_EXPERTS)},
)

# --- Task II of the reference report: a few layers against a ResNet34


@register_model
def resnet34_stride1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A ResNet34 for small images: its first convolution and its pooling keep every pixel."""
    model = timm.create_model("resnet34", pretrained=pretrained, **kwargs)
    model.conv1.stride = (1, 1)
    model.maxpool = nn.Identity()
    cfg = {**model.pretrained_cfg, "architecture": "resnet34_stride1"}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


TASK2: Config = {**TINY, "epochs": 20, "lr": 8e-3, "mixed_precision": "bf16", "channel_aug": "none"}
task2 = Benchmark(
    conditions="tinyimagenet25-32px-20ep",
    channels="RGB",
    questions=every_subset("RGB"),
    split="first 25 classes",
    arms={
        "resnet34": Arm({**TASK2, "model": "resnet34", "lr": 4e-3}, only_all=True),
        "resnet34_stride1": Arm(
            {**TASK2, "model": "resnet34_stride1", "lr": 4e-3}, only_all=True, against=("resnet34",)
        ),
        **{
            name: Arm({**TASK2, "model": name}, only_all=True, against=("resnet34",))
            for name in ("rrdb_small", "rrdb_rnn_small", "rrdb_rnn_base")
        },
    },
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {
    "transfer": transfer,
    "eurosat": eurosat,
    "scratch": scratch,
    "finetune": finetune,
    "task1": task1,
    "stains": stains,
    "flagship": flagship,
    "task2": task2,
}

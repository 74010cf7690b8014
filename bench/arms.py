"""The benchmarks as data: what is trained, on what it is tested, with what it is compared.

An arm is the keyword arguments of a `TrainConfig`; `run.py` trains it by the package's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import peers as peers  # registers its models
import timm
from timm.models import register_model
from torch import nn

from timm_varchan.channels import ChannelSet, seeded_rng

__all__ = ["BENCHMARKS", "WAYS", "Arm", "Benchmark", "Way"]

Sets = dict[str, list[tuple[int, ...]]]


@dataclass(frozen=True)
class Way:
    """How a trained model meets the channels of a set; a plain one as trained only all of them.

    Args:
        mode: Key of `timm_varchan.evaluation.MODES`.
        order: One of `ORDERS`.
        adapted: Arguments of `adapt` that put a stem into a plain model, which is not trained
            further; `channel_stats=True` hands it those of its training images.
        estimated: BatchNorm's statistics are estimated anew for each set, on training images.
    """

    mode: str = "named"
    order: str = "in order"
    adapted: Mapping[str, Any] | None = None
    estimated: bool = False


WAYS: dict[str, Way] = {
    "trained": Way(),
    "anonymous": Way("anonymous", "shuffled"),
    "mask": Way("mask"),
    "zero": Way(adapted={"stem": "slice"}),
    "gray": Way(adapted={"stem": "gray"}),
    "mean": Way(adapted={"stem": "prior", "prior": "mean"}),
    "nearest": Way(adapted={"stem": "prior", "prior": "nearest"}),
    "spectral": Way(adapted={"stem": "prior", "prior": "spectral"}),
    "measured": Way(adapted={"stem": "prior", "prior": "measured", "channel_stats": True}),
    "measured-matched": Way(
        adapted={
            "stem": "prior", "prior": "measured", "prior_scale": "matched", "channel_stats": True
        }
    ),
}  # fmt: skip
WAYS |= {
    f"{name}, estimated": replace(way, estimated=True) for name, way in WAYS.items() if way.adapted
}
#: What a plain model can become without further training.
UNTRAINED = ("zero", "mean", "nearest", "spectral", "measured", "measured-matched")


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        config: Keyword arguments of `TrainConfig`. In a text `{lite0}` is the file of the ImageNet
            weights and `{run:ARM}` the saved model of another arm of the same seed and fold.
        ways: Keys of `WAYS`: how it is tested.
        own: Tested on the set of all its channels alone.
        untrained: Nothing is trained: the classes of the data out of ImageNet's; of `config` only
            `img_size` counts.
        against: Arms that it is compared with on the same images: `ARM` or `ARM|WAY`, in which
            `{set}` is the channel set.
    """

    config: Mapping[str, Any]
    ways: tuple[str, ...] = ("trained",)
    own: bool = False
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
        seeds: Of training, and of the division where there is one.
        folds: How many each division has.
    """

    conditions: str
    channels: str
    questions: Sets
    arms: Mapping[str, Arm]
    split: str | None = None
    seeds: tuple[int, ...] = (0,)
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


def experts(config: Mapping[str, Any], channels: str, ways: tuple[str, ...]) -> dict[str, Arm]:
    """A plain model for each subset, by timm's own `in_chans=`; that for all also without some."""
    planes = ChannelSet.parse(channels, new_names=True)
    plain = {**config, "channel_aug": "none"}
    arms = {f"expert-{planes}": Arm(plain, ways)}
    for indices in planes.subset_indices()[1:]:
        name = str(planes.take(indices))
        arms[f"expert-{name}"] = Arm({**plain, "use": name}, own=True)
    return arms


# Small images, and a ResNet-10 half as wide as timm's, a quarter of its weights: the smallest
# BatchNorm network that shows the effect.
SMALL = {"channels": [32, 64, 128, 256], "stem_width": 16}
TO_EXPERTS = ("expert-{set}",)
TO_BOTH = (*TO_EXPERTS, "hcs-sample")
TINY: dict[str, Any] = {
    "img_size": 32, "epochs": 30, "batch_size": 128, "lr": 2e-3, "warmup_epochs": 2,
    "smoothing": 0.1, "crop_scale": (0.6, 1.0), "rotation_degrees": 0.0, "workers": 0,
    "cache": True, "mixed_precision": "no", "val_max_sets": 1,
}  # fmt: skip
TASK1 = {**TINY, "model": "resnet10t", "model_kwargs": SMALL}


def small_twin(aug: str, stem: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The twin of the small network, or the network behind another stem."""
    return {
        **TASK1, "model": "dwg_resnet10t", "model_kwargs": {**SMALL, **(stem or {})},
        "channel_aug": aug, **changes,
    }  # fmt: skip


task1 = Benchmark(
    conditions="tinyimagenet25-32px-30ep",
    channels="RGB",
    questions=every_subset("RGB"),
    split="first 25 classes",
    seeds=(0, 1, 2),
    arms={
        **experts(TASK1, "RGB", ("trained", "mask", *UNTRAINED)),
        "hcs-sample": Arm(small_twin("hcs-sample"), ("trained", "anonymous"), against=TO_EXPERTS),
        "none": Arm(small_twin("none"), ("trained", "anonymous"), against=TO_BOTH),
        "shuffle": Arm(small_twin("shuffle"), ("anonymous",), against=TO_BOTH),
        "hcs-sample-anonymous": Arm(
            small_twin("hcs-sample", channel_identity="anonymous"), ("anonymous",), against=TO_BOTH
        ),
        "prior": Arm(
            small_twin("hcs-sample", {"stem": "prior", "prior": "nearest"}), against=TO_BOTH
        ),
        "zero_fill": Arm(small_twin("hcs-sample", {"stem": "zero_fill"}), against=TO_BOTH),
        "replicate": Arm(
            small_twin("hcs-sample", {"stem": "prior", "prior": "mean"}), against=TO_BOTH
        ),
        "hcs-sample-3x": Arm(small_twin("hcs-sample", epochs=90), against=TO_BOTH),
    },
)

FLAGSHIP: dict[str, Any] = {
    "model": "dwg_densenet121", "img_size": 32, "limit": 12500, "epochs": 12, "batch_size": 64,
    "channels_last": True, "workers": 0, "cache": True, "val_max_sets": 1,
    "mixed_precision": "bf16",
}  # fmt: skip


def flagship_arms(**changes: Any) -> dict[str, Arm]:
    """DenseNet-121 alone and behind the stem, in three ways of training."""
    config = {**FLAGSHIP, **changes}
    return {
        "expert-RGB": Arm(
            {**config, "model": "densenet121", "channel_aug": "none"},
            ("trained", "mask", *UNTRAINED),
        ),
        "hcs-sample": Arm(
            {**config, "channel_aug": "hcs-sample"}, ("trained", "anonymous"),
            against=("expert-RGB", "expert-RGB|zero", "none"),
        ),
        "shuffle": Arm(
            {**config, "channel_aug": "shuffle"}, ("anonymous",),
            against=("expert-RGB", "none|anonymous", "hcs-sample|anonymous"),
        ),
        "none": Arm(
            {**config, "channel_aug": "none"}, ("trained", "anonymous"),
            against=("expert-RGB", "expert-RGB|zero"),
        ),
    }  # fmt: skip


flagship = Benchmark(
    conditions="tinyimagenet50-32px-12500images-12ep",
    channels="RGB",
    questions=every_subset("RGB"),
    arms=flagship_arms(),
)
#: The size that a GPU takes.
flagship60 = replace(
    flagship,
    conditions="tinyimagenet50-64px-60ep",
    seeds=(0, 1, 2),
    arms=flagship_arms(img_size=64, limit=None, epochs=60),
)

LITE0: dict[str, Any] = {
    "pretrained": True, "model_kwargs": {"pretrained_cfg_overlay": {"file": "{lite0}"}},
}  # fmt: skip
FINETUNE: dict[str, Any] = {
    **LITE0, "model": "tf_efficientnet_lite0", "img_size": 64, "limit": 6250, "epochs": 6,
    "batch_size": 32, "lr": 3e-3, "crop_scale": (0.6, 1.0), "rotation_degrees": 0.0, "workers": 0,
    "cache": True, "mixed_precision": "no", "val_max_sets": 1, "channels_last": True,
}  # fmt: skip


def fine_tuned(budget: int, stem: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Lite0 behind a stem, with the budget of so many experts."""
    kwargs = {**FINETUNE["model_kwargs"], **(stem or {})}
    return {
        **FINETUNE, "model": "dwg_tf_efficientnet_lite0", "model_kwargs": kwargs,
        "epochs": budget * FINETUNE["epochs"], "channel_aug": "hcs-sample",
    }  # fmt: skip


MEAN_FILL = {"stem": "prior", "prior": "mean"}
finetune = Benchmark(
    conditions="tinyimagenet50-64px-6250images-6ep",
    channels="RGB",
    questions=every_subset("RGB"),
    arms={
        **experts(FINETUNE, "RGB", ("trained", "mask", "zero", "mean", "measured")),
        **{
            f"twin-{budget}x": Arm(fine_tuned(budget), against=TO_EXPERTS) for budget in (1, 2, 3)
        },
        "zero-fill": Arm(fine_tuned(1, {"stem": "zero_fill"}), against=(*TO_EXPERTS, "twin-1x")),
        "mean-fill": Arm(fine_tuned(1, MEAN_FILL), against=(*TO_EXPERTS, "twin-1x")),
        "zero-fill-3x": Arm(fine_tuned(3, {"stem": "zero_fill"}), against=(*TO_EXPERTS, "twin-3x")),
        "mean-fill-3x": Arm(fine_tuned(3, MEAN_FILL), against=(*TO_EXPERTS, "twin-3x")),
        # The classifier is that of the expert for RGB: only what mixes the channels is trained.
        "stem-only": Arm(
            {
                **FINETUNE, "model": "local-dir:{run:expert-RGB}", "pretrained": False,
                "model_kwargs": {}, "adapt": True, "train_only": "stem",
                "channel_aug": "hcs-sample",
            },
            against=TO_EXPERTS,
        ),
    },
)  # fmt: skip

FILLS = ("zero", "gray", "mean", "nearest", "spectral", "measured", "measured-matched")
ESTIMATED = ("zero", "mean", "spectral", "measured")
transfer = Benchmark(
    conditions="tinyimagenet50-160px-imagenet",
    channels="RGB",
    questions=every_subset("RGB"),
    arms={
        "lite0": Arm(
            {"img_size": 160},
            ("trained", "mask", *FILLS, *(f"{fill}, estimated" for fill in ESTIMATED)),
            untrained=True, against=("lite0|zero",),
        )
    },
)  # fmt: skip

#: In the order of the files: B8A is last.
BANDS = "B01+B02+B03+B04+B05+B06+B07+B08+B09+B10+B11+B12+B8A"
QUARTER = {"channels": [16, 32, 64, 128], "stem_width": 16}
K6 = "R+G+B+B06+B08+B11"
#: Each band has a kernel; R, G and B have those of the ImageNet weights.
K13 = "R+G+B+B01+B05+B06+B07+B08+B09+B10+B11+B12+B8A"
EUROSAT: dict[str, Any] = {
    "channels": BANDS, "value_scale": 10000.0, "img_size": 64, "epochs": 60, "batch_size": 16,
    "workers": 0, "cache": True, "mixed_precision": "no", "vflip": 0.5, "crop_scale": (1.0, 1.0),
    "crop_ratio": (1.0, 1.0), "rotation_degrees": 0.0, "eval_max_sets": 13, "val_max_sets": 1,
    "eval_orders": ("in order",),
}  # fmt: skip


def many_bands() -> Sets:
    """All, all but one, what cameras have, each alone, and twenty sets of a random size."""
    bands = ChannelSet.parse(BANDS)
    everything = tuple(range(len(bands)))
    rng = seeded_rng("eurosat subsets", 0)
    drawn = []
    for _ in range(20):
        drawn.append(tuple(sorted(rng.sample(everything, rng.randint(1, len(bands))))))
    return {
        "all": [everything],
        "all but one": [everything[:i] + everything[i + 1 :] for i in everything],
        "RGB": [bands.index("B04+B03+B02")],
        "RGB+NIR": [bands.index("B04+B03+B02+B08")],
        "one": [(i,) for i in everything],
        "random": drawn,
    }


def scratch(model: str, **changes: Any) -> dict[str, Any]:
    """A ResNet-10 a quarter as wide as timm's, from random weights."""
    return {**EUROSAT, "model": model, "model_kwargs": QUARTER, **changes}


def lite(model: str, **changes: Any) -> dict[str, Any]:
    """EfficientNet-Lite0 from its ImageNet weights, 20 epochs."""
    return {**EUROSAT, **LITE0, "model": model, "epochs": 20, "lr": 3e-3, **changes}


def own_kernels(**changes: Any) -> dict[str, Any]:
    """Each band has virtual channel and kernels of its own, as a twin for 13 bands has them."""
    return scratch("dwg_resnet10t", virtual_channels=BANDS, **changes)


SCRATCH = {
    "k3": scratch("dwg_resnet10t", virtual_channels="RGB"),
    "k6-design": scratch("dwg_resnet10t", virtual_channels=K6),
    "k13": own_kernels(),
    "k13-prior": own_kernels(model_kwargs={**QUARTER, "stem": "prior"}),
    "k13-share0": own_kernels(full_share=0.0),
    "k13-share25": own_kernels(full_share=0.25),
    "k13-share75": own_kernels(full_share=0.75),
    "k13-spectral": own_kernels(model_kwargs={**QUARTER, "prior": "spectral"}),
    "k13-nearest": own_kernels(model_kwargs={**QUARTER, "prior": "nearest"}),
    "k13-matched": own_kernels(model_kwargs={**QUARTER, "prior_scale": "matched"}),
    "zero-fill": own_kernels(model_kwargs={**QUARTER, "stem": "zero_fill"}),
    "mean-fill": own_kernels(model_kwargs={**QUARTER, **MEAN_FILL}),
}
PRETRAINED = {
    "lite-k3": lite("dwg_tf_efficientnet_lite0", virtual_channels="RGB"),
    "lite-k6-design": lite("dwg_tf_efficientnet_lite0", virtual_channels=K6),
    "lite-k13": lite("dwg_tf_efficientnet_lite0", virtual_channels=K13),
    "lite-k13-all": lite("dwg_tf_efficientnet_lite0", virtual_channels=K13, channel_aug="none"),
}
eurosat = Benchmark(
    conditions="eurosat13-64px-60ep",
    channels=BANDS,
    questions=many_bands(),
    split="by place",
    folds=5,
    arms={
        "plain": Arm(scratch("resnet10t", channel_aug="none"), UNTRAINED),
        "plain-masked": Arm(
            scratch("resnet10t", channel_aug="hcs-mask"), UNTRAINED, against=("plain|zero",)
        ),
        **{
            name: Arm(config, against=("plain|zero", "plain|measured"))
            for name, config in SCRATCH.items()
        },
        "lite-tiled": Arm(lite("tf_efficientnet_lite0", channel_aug="none"), UNTRAINED),
        **{
            name: Arm(config, against=("lite-tiled|zero", "lite-tiled|measured"))
            for name, config in PRETRAINED.items()
        },
    },
)

#: Transformers of as many parameters, 16 tokens an image and 16 for each of its channels.
VIT = {"img_size": 64, "patch_size": 16, "depth": 4}
PEERS = {
    "k13": own_kernels(),
    "dofa": scratch("dwg_dofa_resnet10t", model_kwargs={
        **QUARTER, "width": 32, "num_tokens": 32, "feedforward": 128
    }),
    "channel-vit": scratch("dwg_channel_vit", lr=1e-3, model_kwargs={
        **VIT, "virtual_channels": BANDS, "embed_dim": 128, "num_heads": 4
    }),
    "vit-k13": scratch("dwg_vit_tiny_patch16_224", lr=1e-3, virtual_channels=BANDS, model_kwargs={
        **VIT, "embed_dim": 96, "num_heads": 3
    }),
}  # fmt: skip
peers_on_eurosat = replace(
    eurosat, arms={name: Arm(config, against=("k13", "vit-k13")) for name, config in PEERS.items()}
)

CONTRASTS = "brightfield+DNA+darkfield"
STAINS: dict[str, Any] = {
    "channels": CONTRASTS, "new_names": True, "model": "resnet10t", "model_kwargs": SMALL,
    "img_size": 40, "epochs": 30, "batch_size": 64, "vflip": 0.5, "crop_scale": (0.8, 1.0),
    "workers": 0, "cache": True, "mixed_precision": "no", "val_max_sets": 1,
}  # fmt: skip


def stained(aug: str, stem: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The twin of the small network on three contrasts, which are its own virtual channels."""
    return {
        **STAINS, "model": "dwg_resnet10t", "model_kwargs": {**SMALL, **(stem or {})},
        "channel_aug": aug, **changes,
    }  # fmt: skip


stains = Benchmark(
    conditions="jurkat3-40px-30ep",
    channels=CONTRASTS,
    questions=every_subset(CONTRASTS),
    split="by class",
    folds=5,
    arms={
        **experts(STAINS, CONTRASTS, ("trained", "mask", "zero", "mean", "measured")),
        "hcs-sample": Arm(stained("hcs-sample"), against=TO_EXPERTS),
        "none": Arm(stained("none"), against=TO_BOTH),
        # What no wavelength tells: each of three virtual channels begins as the mean of all.
        "rgb": Arm(stained("hcs-sample", virtual_channels="RGB"), against=TO_BOTH),
        "zero_fill": Arm(stained("hcs-sample", {"stem": "zero_fill"}), against=TO_BOTH),
        "mean-fill": Arm(stained("hcs-sample", MEAN_FILL), against=TO_BOTH),
    },
)


@register_model
def resnet34_stride1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A ResNet34 for small images: its first convolution and its pooling keep every pixel."""
    model = timm.create_model("resnet34", pretrained=pretrained, **kwargs)
    model.conv1.stride = (1, 1)
    model.maxpool = nn.Identity()
    cfg = {**model.pretrained_cfg, "architecture": "resnet34_stride1"}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


TASK2: dict[str, Any] = {
    **TINY, "epochs": 20, "lr": 8e-3, "mixed_precision": "bf16", "channels_last": True,
    "channel_aug": "none",
}  # fmt: skip
BAR = ("resnet34",)
task2 = Benchmark(
    conditions="tinyimagenet25-32px-20ep",
    channels="RGB",
    questions=every_subset("RGB"),
    split="first 25 classes",
    seeds=(0, 1, 2),
    arms={
        "resnet34": Arm({**TASK2, "model": "resnet34", "lr": 4e-3}, own=True),
        "resnet34_stride1": Arm(
            {**TASK2, "model": "resnet34_stride1", "lr": 4e-3}, own=True, against=BAR
        ),
        **{
            name: Arm({**TASK2, "model": name}, own=True, against=(*BAR, "resnet34_stride1"))
            for name in ("rrdb_small", "rrdb_rnn_small", "rrdb_rnn_base")
        },
        "no-recurrence": Arm(
            {**TASK2, "model": "rrdb_rnn_small", "model_kwargs": {"steps": 0}}, own=True,
            against=(*BAR, "rrdb_rnn_small"),
        ),
        "dwg_rrdb_rnn_small": Arm(
            {**TASK2, "model": "dwg_rrdb_rnn_small", "channel_aug": "hcs-sample"}, against=BAR
        ),
    },
)  # fmt: skip

BENCHMARKS: dict[str, Benchmark] = {
    "transfer": transfer,
    "task1": task1,
    "flagship": flagship,
    "flagship60": flagship60,
    "finetune": finetune,
    "eurosat": eurosat,
    "peers": peers_on_eurosat,
    "stains": stains,
    "task2": task2,
}

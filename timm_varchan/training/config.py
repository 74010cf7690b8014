"""What a run does: frozen dataclasses whose fields are the flags, their comments the help.

Nothing heavy is imported here: `timm-varchan train --help` reads this file alone.
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from timm_varchan.errors import UserError
from timm_varchan.input_spec import PixelFlags

#: The file of an output folder that holds the configuration of its run.
MARK = "run.json"


@dataclass(frozen=True)
class Bound:
    """The values that a number may have: from `low` to `high`, `high` itself only if `closed`."""

    low: float
    high: float = float("inf")
    closed: bool = True

    def problem(self, value: float) -> str | None:
        """What the value must be, where it is not."""
        if self.low <= value and (value <= self.high if self.closed else value < self.high):
            return None
        if self.high == float("inf"):
            return f"{self.low:g} or more"
        return f"in {self.low:g}..{self.high:g}" + ("" if self.closed else f", below {self.high:g}")


Count = Annotated[int, Bound(1)]
Number = Annotated[int, Bound(0)]
Amount = Annotated[float, Bound(0)]
Fraction = Annotated[float, Bound(0, 1)]
Below1 = Annotated[float, Bound(0, 1, closed=False)]


def _key_values(words: list[str]) -> dict[str, Any]:
    """`name=value` words; a value is a Python literal, else text."""
    found = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"{word!r} needs the form NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


#: Name, folder or repository, the first word of a command.
Model = Positional[
    Annotated[str, arg(metavar="MODEL", help="name, folder, local-dir:FOLDER or hf-hub:ORG/NAME")]
]

KeyValues = Annotated[
    dict[str, Any],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE",
        instance_from_str=_key_values,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda values: [f"{k}={v!r}" for k, v in values.items()],
    ),
]


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """What the files are and how they are read."""

    #: what the planes are, in order: RGB, B02+B08, a product (eurosat), a JSON file
    channels: str | None = None
    #: let --channels say names that nobody knows: they are learned; or name=, name@461nm
    new_names: bool = False
    #: which files are one image, as "{image}_w{channel}.tif"; none: every file
    planes: str | None = None
    image_column: str | None = None  # column of the images
    label_column: str | None = None  # column of the labels
    train_split: str | None = None  # what the source calls its training split
    validation_split: str | None = None  # what it calls its validation split
    test_split: str | None = None  # what it calls its test split
    skip_corrupt: bool = False  # leave out images that cannot be read

    @property
    def splits(self) -> dict[str, str]:
        """What the source calls its splits, where that was said."""
        named = {name: getattr(self, f"{name}_split") for name in ("train", "validation", "test")}
        return {name: source for name, source in named.items() if source is not None}


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Which images are used."""

    dataset: str = "synthetic"  # 'synthetic', folder, Parquet or list file, or hub name
    use: str | None = None  # only these channels of the images, as B04+B03+B02
    img_size: Count | None = None  # height and width; the saved model's, 64 to train
    crop_pct: Fraction | None = None  # fraction kept in evaluation; the saved model's, else 1
    limit: int | None = None  # at most so many images a split, as many of each class
    preview: bool = False  # write preview.png: what training sees of the data
    #: fraction of train set apart if there is no validation; 0.1, or as the model was trained
    validation_fraction: Fraction | None = None
    data_seed: int = 0  # of synthetic images, limit and validation fraction
    workers: Number = 2  # processes that load data, for each process that trains


@dataclass(frozen=True, kw_only=True)
class AugmentationFlags:
    """What training does to images and channels."""

    crop_scale: tuple[float, float] = (0.35, 1.0)  # fraction of the area that crops keep
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of crops
    hflip: Fraction = 0.5  # probability of a horizontal flip
    vflip: Fraction = 0.0  # probability of a vertical flip (images from above)
    rotation_degrees: Amount = 15.0  # rotations are drawn from plus to minus this
    #: random operations on any planes: RandAugment, TrivialAugment
    auto_augment: Literal["none", "rand", "trivial"] = "none"
    erase_prob: Fraction = 0.0  # probability that a rectangle is erased
    mixup: Amount = 0.0  # alpha of mixup
    cutmix: Amount = 0.0  # alpha of cutmix
    #: what is done to a batch's channels; shuffle implies --channel-identity anonymous
    channel_aug: Literal["none", "shuffle", "hcs", "hcs-sample", "hcs-mask"] = "hcs-sample"
    #: fraction of images with all channels under hcs; 0.5 from five channels on, else 0
    full_share: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is trained."""

    model: str = "dwg_test_resnet"  # a timm model, its twin 'dwg_...', or local-dir:FOLDER
    model_kwargs: KeyValues = field(default_factory=dict)  # further arguments of create_model
    #: start from pretrained weights; a named twin then learns nothing in its stem (`stem=prior`)
    pretrained: bool = False
    adapt: bool = False  # put a stem into a model that has none (local-dir:, hf-hub:)
    #: whether training tells the model the channels
    channel_identity: Literal["named", "anonymous"] = "named"
    train_only: Literal["all", "head", "stem"] = "all"  # all else stays as it is
    #: what a new twin's kernels are for; RGB and every further band, 16 at most
    virtual_channels: str | None = None
    drop_path: Below1 = 0.0  # rate of stochastic depth, where the model has it


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Optimizer, schedule and loss."""

    epochs: Count = 15  # times through the training images
    batch_size: Count = 32  # images a forward pass and process
    grad_accum_steps: Count = 1  # forward passes an update
    lr: Amount = 2e-3  # highest learning rate
    min_lr: Amount = 0.0  # learning rate at the end
    warmup_epochs: Number = 1  # epochs over which the learning rate rises
    opt: str = "adamw"  # a timm optimizer
    #: a timm scheduler, stepped every update
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant", "none"] = "cosine"
    weight_decay: Amount = 0.05  # weight decay; none on biases and norms
    layer_decay: Fraction | None = None  # factor of the learning rate from layer to layer
    smoothing: Below1 = 0.0  # label smoothing
    class_weights: Literal["none", "balanced"] = "none"  # balanced: rare classes weigh more
    clip_grad: Amount | None = None  # largest norm of the gradient
    ema_decay: Below1 | None = None  # keep, test and save an average of the weights
    seed: int = 0  # of weights, order, augmentation and channel draws


@dataclass(frozen=True, kw_only=True)
class SpeedFlags:
    """Precision, memory, time."""

    mixed_precision: Literal["no", "bf16", "fp16"] | None = None  # by default as launched
    channels_last: bool = True  # keep images and kernels in the channels_last layout
    compile: bool = False  # torch.compile; one or two graphs for all channel sets
    grad_checkpointing: bool = False  # less memory; BatchNorm takes every batch up twice
    cache: bool = False  # decode training images once and keep them in memory
    streaming: bool = False  # read training images as they come (hub, Parquet files)
    epoch_images: Count | None = None  # with --streaming: what counts as an epoch


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """How channel sets are tested."""

    #: default (at most 40), all, a number, or sets: RGB,B08,B04+B12
    sets: Annotated[str, arg(aliases=["--eval-sets", "--eval-max-sets"])] = "default"
    missing: str | None = None  # also the set without these channels, as B10+B11
    #: how the model meets a channel set; as it was trained by default
    eval_modes: tuple[Literal["named", "anonymous", "mask"], ...] | None = None
    #: order of the planes; shuffled by default only where it can matter
    eval_orders: tuple[Literal["in order", "shuffled"], ...] | None = None
    eval_batch_size: Count = 128  # images a batch and process
    #: estimate BatchNorm's buffers anew for every set, on so many training images
    eval_statistics: Number = 0

    def to_json(self) -> dict[str, Any]:
        """What JSON gives back: a configuration that was written and read compares equal."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Folder, checkpoints, log."""

    recipe: Literal["report", "modern"] | None = None  # named defaults of all other flags
    output_dir: str = "output"  # folder of the run
    resume: str | None = None  # 'auto': the run in the output folder; or a checkpoint folder
    checkpoint_steps: Number = 0  # also save after every so many updates
    val_max_sets: Number = 8  # channel sets of the validation after every epoch
    #: which one is tested and saved; best where validation and test images differ, else last
    eval_checkpoint: Literal["last", "best"] | None = None
    push_to_hub: str | None = None  # after training push model and card there, as ORG/NAME
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # log there too
    expect_processes: int | None = None  # stop unless so many processes work together


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    RunFlags,
    EvaluationFlags,
    SpeedFlags,
    TrainingFlags,
    ModelFlags,
    AugmentationFlags,
    PixelFlags,
    SourceFlags,
    DataFlags,
):
    """Train a model for any number of channels, then test it on every channel set."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.channel_aug == "shuffle":  # of which the model hears nothing
            object.__setattr__(self, "channel_identity", "anonymous")
        for is_wrong, cure in (
            (self.mixes and self.batch_size % 2,
             f"--batch-size is {self.batch_size}; --mixup and --cutmix mix pairs, so it must be "
             f"even."),
            (self.streaming and self.use is not None,
             "--use takes planes out of images that are there: leave --streaming out, or name only "
             "the planes that the stream has with --channels."),
            (self.streaming and (self.epoch_images is None or self.cache),
             "--streaming needs --epoch-images N (how long a stream is nobody knows before its "
             "end), and nothing of it can be kept: leave --cache out."),
            (self.streaming and self.class_weights == "balanced",
             "--class-weights balanced counts the labels first, which a stream does not allow: "
             "leave --streaming out."),
        ):  # fmt: skip
            if is_wrong:
                raise UserError(cure)

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.output_dir)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class ComparedFlags:
    """What is evaluated, compared with what, and written where."""

    model: Model
    #: run folder or predictions.npz to compare with, set by set, on the same images
    baseline: str | None = None
    #: folder for tables and pictures; else they are only printed
    output: Annotated[str | None, arg(aliases=["--output-dir"])] = None
    seed: int = 0  # of drawn sets, permutations and intervals


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(EvaluationFlags, PixelFlags, SourceFlags, DataFlags, ComparedFlags):
    """Accuracy on channel sets: which channels matter, and what is lost without them."""

    def __post_init__(self) -> None:
        check_values(self)


AnyFlags = TypeVar("AnyFlags")


def as_fields(cls: type[AnyFlags], values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a dataclass from what JSON or YAML holds.

    Raises:
        UserError: A name that is no field.
    """
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    found = {name.replace("-", "_"): value for name, value in values.items()}
    unknown = sorted(found.keys() - names)
    if unknown:
        raise UserError(f"There is no flag --{unknown[0].replace('_', '-')}. See --help.")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def check_values(flags: Any) -> None:
    """Refuse values that are out of their range or none of the choices.

    Raises:
        UserError: Names the flag, the value and what it must be.
    """
    for name, hint in get_type_hints(type(flags), include_extras=True).items():
        value = getattr(flags, name)
        rules = [*_rules(hint)]
        choices = [c for rule in rules if isinstance(rule, tuple) for c in rule]
        flag = "--" + name.replace("_", "-")
        for part in value if isinstance(value, tuple) else (value,):
            if choices and part is not None and part not in choices:
                raise UserError(f"{flag} is {part!r}. Choose from: {', '.join(choices)}.")
            problems = (r.problem(part) for r in rules if isinstance(r, Bound) and part is not None)
            if problem := next(filter(None, problems), None):
                raise UserError(f"{flag} is {part}; it must be {problem}.")


def _rules(hint: Any) -> Iterator[Bound | tuple[str, ...]]:
    """The bounds and choices anywhere in an annotation."""
    if getattr(hint, "__origin__", None) is Literal:
        yield get_args(hint)
        return
    for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        if isinstance(part, Bound):
            yield part
        elif not isinstance(part, str):
            yield from _rules(part)


#: By the name that `--recipe` takes. `report`: the reference report's optimizer, crops and channels
#: (Chia-Ming Lee, Deep Learning Assignment II, github.com/ming0531/DL-Assignment-2). `modern`: what
#: networks are trained with today; the ingredients of ResNet strikes back, arXiv:2110.00476 (there
#: LAMB and binary cross entropy), and of ConvNeXt, arXiv:2201.03545.
RECIPES: dict[str, TrainConfig] = {
    "report": TrainConfig(
        recipe="report", epochs=200, batch_size=16, opt="adam", lr=1e-3, sched="constant",
        warmup_epochs=0, weight_decay=0.0, crop_scale=(0.35, 1.0), hflip=0.5,
        rotation_degrees=15.0, channel_aug="shuffle",
    ),
    "modern": TrainConfig(
        recipe="modern", epochs=100, batch_size=128, opt="adamw", lr=2e-3, min_lr=1e-5,
        warmup_epochs=5, weight_decay=0.05, smoothing=0.1, clip_grad=1.0, ema_decay=0.9998,
        drop_path=0.05, crop_scale=(0.25, 1.0), rotation_degrees=0.0, auto_augment="trivial",
        erase_prob=0.25, mixup=0.1, cutmix=1.0,
    ),
}  # fmt: skip

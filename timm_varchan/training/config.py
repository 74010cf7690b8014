"""One frozen configuration a run: its fields are the flags of `hf_train.py`, a recipe sets many."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from timm_varchan.channels import ChannelSet
from timm_varchan.data import NO_DATA
from timm_varchan.errors import UserError
from timm_varchan.training.launch import stop
from timm_varchan.views import CHANNEL_AUGS, MODES, ORDERS

__all__ = ["MARK", "RECIPES", "TrainConfig", "flag", "parse_args"]

#: The groups of `--help` and what stands under their names.
GROUPS = {
    "data": "where images and labels come from, and how they are read",
    "augmentation": "what training does to images and channels",
    "model": "what is trained",
    "training": "optimizer, schedule and loss",
    "speed": "precision, memory, time",
    "evaluation": "how every channel set is tested",
    "run": "folder, checkpoints, log",
}
#: The file of an output folder that holds the configuration of its run.
MARK = "run.json"
#: Height and width of the images where nothing else is said.
DEFAULT_PIXELS = 64
_SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant", "none")
_PRECISIONS = ("no", "bf16", "fp16")
#: What `must=` of an option may say besides the smallest value.
_SHARE, _BELOW_1 = "in 0..1", "in 0..1, below 1"


def _option(
    group: str,
    default: Any,
    text: str,
    choices: Iterable[str] | None = None,
    must: float | str | None = None,
) -> Any:
    """A field that becomes a flag in a group of `--help`; `must` bounds its values."""
    metadata = {"group": group, "help": text, "choices": choices and tuple(choices), "must": must}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_data = partial(_option, "data")
_augmentation = partial(_option, "augmentation")
_model = partial(_option, "model")
_training = partial(_option, "training")
_speed = partial(_option, "speed")
_evaluation = partial(_option, "evaluation")
_run = partial(_option, "run")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run does. The text of every field is the help of its flag."""

    dataset: str = _data("synthetic", "'synthetic', folder, Parquet or list file, or hub name")
    channels: str | None = _data(
        None, "what the planes are, in order: RGB, B02+B08, ...; or a JSON file"
    )
    new_names: bool = _data(
        False, "let --channels say names that nobody knows: they are learned; or name=, name@461nm"
    )
    use: str | None = _data(None, "only these channels of the images, as B04+B03+B02")
    img_size: int | None = _data(None, "height and width; the saved model's, 64 to train", must=1)
    limit: int | None = _data(None, "at most so many images a split, as many of each class")
    image_column: str | None = _data(None, "column of the images")
    label_column: str | None = _data(None, "column of the labels")
    train_split: str | None = _data(None, "what the source calls its training split")
    validation_split: str | None = _data(None, "what it calls its validation split")
    test_split: str | None = _data(None, "what it calls its test split")
    validation_fraction: float = _data(0.1, "share of train set apart if there is no validation")
    value_scale: float | None = _data(
        None, "divide stored numbers by this, such as 10000; by default by their type's largest"
    )
    no_data: str = _data("refuse", "pixels that hold no data", NO_DATA)
    skip_corrupt: bool = _data(False, "leave out images that cannot be read")
    data_seed: int = _data(0, "of synthetic images, limit and validation fraction")
    crop_pct: float | None = _data(
        None, "share kept in evaluation; the saved model's, else 1", must=_SHARE
    )
    cache: bool = _data(False, "decode training images once and keep them in memory")
    streaming: bool = _data(False, "read training images as they come (hub, Parquet files)")
    epoch_images: int | None = _data(None, "with --streaming: what counts as an epoch", must=1)
    workers: int = _data(2, "processes that load data, for each process that trains", must=0)
    prefetch: int = _data(2, "batches that a worker loads ahead", must=1)

    crop_scale: tuple[float, float] = _augmentation(
        (0.35, 1.0), "share of the area that crops keep"
    )
    crop_ratio: tuple[float, float] = _augmentation((3 / 4, 4 / 3), "width over height of crops")
    hflip: float = _augmentation(0.5, "probability of a horizontal flip", must=_SHARE)
    vflip: float = _augmentation(
        0.0, "probability of a vertical flip (images from above)", must=_SHARE
    )
    rotation_degrees: float = _augmentation(
        15.0, "rotations are drawn from plus to minus this", must=0
    )
    auto_augment: str = _augmentation(
        "none", "random operations on any planes: RandAugment, TrivialAugment",
        ("none", "rand", "trivial"),
    )  # fmt: skip
    erase_prob: float = _augmentation(0.0, "probability that a rectangle is erased", must=_SHARE)
    mixup: float = _augmentation(0.0, "alpha of mixup", must=0)
    cutmix: float = _augmentation(0.0, "alpha of cutmix", must=0)
    channel_aug: str = _augmentation(
        "hcs-sample", "what is done to a batch's channels", CHANNEL_AUGS
    )
    full_share: float | None = _augmentation(
        None,
        "share of images with all channels under hcs; 0.5 from five channels on, else 0",
        must=_SHARE,
    )

    model: str = _model("dwg_test_resnet", "a timm model, its twin 'dwg_...', or local-dir:FOLDER")
    model_kwargs: dict[str, Any] = _model({}, "further arguments of timm.create_model")  # noqa: RUF009
    pretrained: bool = _model(False, "start from pretrained weights")
    adapt: bool = _model(False, "put a stem into a model that has none (local-dir:, hf-hub:)")
    channel_identity: str = _model(
        "named", "whether training tells the model the channels", ("named", "anonymous")
    )
    train_only: str = _model(
        "all", "'head' or 'stem': all else stays as it is", ("all", "head", "stem")
    )
    virtual_channels: str | None = _model(
        None,
        "what a new twin's kernels are for; RGB and every further band, 16 at most",
    )
    drop_path: float = _model(
        0.0, "rate of stochastic depth, where the model has it", must=_BELOW_1
    )

    epochs: int = _training(15, "times through the training images", must=1)
    batch_size: int = _training(32, "images a forward pass and process", must=1)
    grad_accum_steps: int = _training(1, "forward passes an update", must=1)
    lr: float = _training(2e-3, "highest learning rate", must=0)
    min_lr: float = _training(0.0, "learning rate at the end", must=0)
    warmup_epochs: int = _training(1, "epochs over which the learning rate rises", must=0)
    opt: str = _training("adamw", "a timm optimizer")
    sched: str = _training("cosine", "a timm scheduler, stepped every update", _SCHEDULES)
    weight_decay: float = _training(0.05, "weight decay; none on biases and norms", must=0)
    layer_decay: float | None = _training(
        None, "factor of the learning rate from layer to layer", must=_SHARE
    )
    smoothing: float = _training(0.0, "label smoothing", must=_BELOW_1)
    clip_grad: float | None = _training(None, "largest norm of the gradient", must=0)
    ema_decay: float | None = _training(
        None, "keep, test and save an average of the weights", must=_BELOW_1
    )
    seed: int = _training(0, "of weights, order, augmentation and channel draws")

    mixed_precision: str | None = _speed(None, "as accelerate was launched, or", _PRECISIONS)
    channels_last: bool = _speed(False, "keep images and kernels in the channels_last layout")
    compile: bool = _speed(False, "torch.compile; one or two graphs for all channel sets")
    grad_checkpointing: bool = _speed(
        False, "less memory for more time; BatchNorm takes every batch up twice"
    )

    eval_sets: str = _evaluation(
        "default", "which sets: default (at most 40), all, RGB,B08,B04+B12 or a number of them"
    )
    missing: str | None = _evaluation(None, "also the set without these channels, as B10+B11")
    eval_modes: tuple[str, ...] | None = _evaluation(
        None, "how the model meets a channel set; as it was trained by default", MODES
    )
    eval_orders: tuple[str, ...] | None = _evaluation(
        None, "order of the planes; shuffled by default only where it can matter", ORDERS
    )
    eval_max_sets: int | None = _evaluation(None, "the same as --eval-sets N")
    baseline: str | None = _evaluation(None, "saved model to compare with, set by set")
    eval_batch_size: int = _evaluation(128, "images a batch and process", must=1)
    eval_checkpoint: str = _evaluation("last", "which one is evaluated and saved", ("last", "best"))
    eval_only: str | None = _evaluation(None, "evaluate this saved model folder, train nothing")
    eval_statistics: int = _evaluation(
        0, "estimate BatchNorm's statistics anew for every set, on so many training images", must=0
    )
    val_max_sets: int = _evaluation(8, "channel sets of the validation after every epoch", must=0)

    recipe: str | None = _run(None, "named defaults of all other flags")
    output_dir: str = _run("output", "folder of the run")
    resume: str | None = _run(None, "'auto': the run in the output folder; or a checkpoint folder")
    checkpoint_steps: int = _run(
        0, "also save after every so many updates; 0: after epochs only", must=0
    )
    push_to_hub: str | None = _run(None, "after training push model and card there, as ORG/NAME")
    push_public: bool = _run(False, "a new repository of --push-to-hub is not private")
    trackers: tuple[str, ...] = _run((), "log there too", ("tensorboard", "wandb"))
    expect_processes: int | None = _run(None, "stop unless so many processes work together")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check(field)
        for is_wrong, cure in (
            (self.mixes and self.batch_size % 2,
             f"--batch-size is {self.batch_size}; --mixup and --cutmix mix pairs, so it must be "
             f"even."),
            (self.push_to_hub is not None and self.eval_only is not None,
             f"--push-to-hub is for after training, but --eval-only trains nothing. Push with: "
             f"python -m timm_varchan push {self.eval_only} {self.push_to_hub}"),
            (self.streaming and self.use is not None,
             "--use takes planes out of images that are there: leave --streaming out, or name only "
             "the planes that the stream has with --channels."),
            (self.streaming and (self.epoch_images is None or self.cache),
             "--streaming needs --epoch-images N (how long a stream is nobody knows before its "
             "end), and nothing of it can be kept: leave --cache out."),
            (self.eval_max_sets is not None and self.eval_sets != "default",
             "--eval-sets and --eval-max-sets say the same: leave one of them out."),
        ):  # fmt: skip
            if is_wrong:
                raise UserError(cure)

    def _check(self, field: dataclasses.Field[Any]) -> None:
        """Refuse a value that is out of its range or none of the choices."""
        value, must = getattr(self, field.name), field.metadata["must"]
        choices = field.metadata["choices"]
        if value is None:
            return
        if must in (_SHARE, _BELOW_1):
            is_wrong = not (0 <= value <= 1) or (must == _BELOW_1 and value == 1)
        else:
            is_wrong, must = must is not None and not value >= must, f"{must} or more"
        if is_wrong:
            raise UserError(f"{flag(field.name)} is {value}; it must be {must}.")
        given = value if isinstance(value, tuple) else (value,)
        if choices is not None and not set(given) <= set(choices):
            raise UserError(f"{flag(field.name)} is {value!r}. Choose from: {', '.join(choices)}.")

    def channel_set(self) -> ChannelSet | None:
        """What `channels` says, or None where it says nothing.

        Raises:
            UserError: What `ChannelSet.parse` refuses.
        """
        if self.channels is None:
            return None
        return ChannelSet.parse(self.channels, new_names=self.new_names)

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.output_dir)

    @property
    def pixels(self) -> int:
        """Height and width of the images."""
        return DEFAULT_PIXELS if self.img_size is None else self.img_size

    @property
    def planned_sets(self) -> str:
        """Which sets are evaluated, as `plan_sets` takes it."""
        return self.eval_sets if self.eval_max_sets is None else str(self.eval_max_sets)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    def to_json(self) -> dict[str, Any]:
        """What JSON gives back: a configuration that was written and read compares equal."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """What `to_json` gave, of this version or of an earlier one.

        Raises:
            ValueError: Values that no flag takes.
        """
        known = {field.name for field in dataclasses.fields(cls)} & set(values)
        fields: dict[str, Any] = {
            name: tuple(values[name]) if isinstance(values[name], list) else values[name]
            for name in known
        }
        return cls(**fields)


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def report() -> TrainConfig:
    """The reference report's: Adam, 200 epochs, crops, flips, rotations, shuffled channels.

    The model is not told the channels. The report does not print its crops and rotations: those
    are the package's defaults.
    Source: Chia-Ming Lee, Deep Learning Assignment II, github.com/ming0531/DL-Assignment-2.
    """
    return TrainConfig(
        recipe="report",
        epochs=200,
        batch_size=16,
        opt="adam",
        lr=1e-3,
        sched="constant",
        warmup_epochs=0,
        weight_decay=0.0,
        crop_scale=(0.35, 1.0),
        hflip=0.5,
        rotation_degrees=15.0,
        channel_aug="shuffle",
        channel_identity="anonymous",
    )


def modern() -> TrainConfig:
    """What networks are trained with today, for any number of channels.

    AdamW, cosine with warm-up, TrivialAugment, mixup and cutmix, label smoothing, erasing,
    stochastic depth, averaged weights.
    Source: the ingredients of ResNet strikes back, arXiv:2110.00476 (there LAMB and binary cross
    entropy), and of ConvNeXt, arXiv:2201.03545.
    """
    return TrainConfig(
        recipe="modern",
        epochs=100,
        batch_size=128,
        opt="adamw",
        lr=2e-3,
        min_lr=1e-5,
        warmup_epochs=5,
        weight_decay=0.05,
        smoothing=0.1,
        clip_grad=1.0,
        ema_decay=0.9998,
        drop_path=0.05,
        crop_scale=(0.25, 1.0),
        rotation_degrees=0.0,
        auto_augment="trivial",
        erase_prob=0.25,
        mixup=0.1,
        cutmix=1.0,
        channel_aug="hcs-sample",
    )


#: By the name that `--recipe` takes.
RECIPES: dict[str, Callable[[], TrainConfig]] = {"report": report, "modern": modern}


def parse_args(args: Sequence[str] | None = None) -> TrainConfig:
    """The configuration of a command line, `sys.argv` by default.

    With `--resume` the flags of the run in the output folder hold where none is given.

    Raises:
        SystemExit: Wrong flags or values, after saying which.
    """
    parser = _parser(_defaults(args))
    values: dict[str, Any] = vars(parser.parse_args(args))
    values["model_kwargs"] = dict(values["model_kwargs"])
    try:
        return TrainConfig.from_json(values)
    except ValueError as error:
        parser.error(str(error))


def _defaults(args: Sequence[str] | None) -> TrainConfig:
    """What holds where no flag says otherwise: the run to resume, a recipe, or the usual."""
    first = _Parser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--resume", "--output-dir"):
        first.add_argument(name)
    given = first.parse_known_args(args)[0]
    mark = Path(given.output_dir or TrainConfig.output_dir) / MARK
    if given.resume not in (None, "none") and mark.is_file():
        try:
            return TrainConfig.from_json(json.loads(mark.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            first.error(f"{mark} holds no run ({error}). Choose another --output-dir.")
    return RECIPES[given.recipe]() if given.recipe in RECIPES else TrainConfig()


def _parser(defaults: TrainConfig) -> argparse.ArgumentParser:
    """An argument parser with a flag for every field."""
    parser = _Parser(
        usage="%(prog)s [--recipe {" + ",".join(RECIPES) + "}] [--FLAG VALUE ...]",
        description="Train a model for any number of channels, then test it on every channel set.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    groups = {name: parser.add_argument_group(name, text) for name, text in GROUPS.items()}
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        options = _argument(field, hints[field.name])
        options["default"] = getattr(defaults, field.name)
        groups[field.metadata["group"]].add_argument(flag(field.name), **options)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, which is the last also under a launcher."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message.rstrip('.')}. All flags: python hf_train.py --help", code=2)


class _Help(argparse.HelpFormatter):
    """Shows the defaults that are some."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS, (), {}):
            return text
        if default is False or isinstance(action, argparse.BooleanOptionalAction):
            return f"{text} ({'on' if default else 'off'})"
        shown = " ".join(map(_short, default)) if isinstance(default, tuple) else _short(default)
        return f"{text} ({shown})".replace("%", "%%")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """The keywords of `add_argument` for a field of some type."""
    choices = tuple(RECIPES) if field.name == "recipe" else field.metadata["choices"]
    options: dict[str, Any] = {"help": field.metadata["help"]}
    optional = type(None) in get_args(hint)
    kind = next(t for t in get_args(hint) if t is not type(None)) if optional else hint
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if str(kind).startswith("dict"):
        return options | {"type": _key_value, "nargs": "*", "metavar": "NAME=VALUE"}
    if str(kind).startswith("tuple"):
        parts = get_args(kind)
        options["nargs"] = "*" if parts[-1] is Ellipsis else len(parts)
        kind = parts[0]
    if choices is not None:
        return options | {"choices": choices, "metavar": "{" + ",".join(choices) + "}"}
    options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    return options | {"type": _or_none(kind) if optional else kind}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type whose value may be 'none', which takes back what a recipe says."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = getattr(kind, "__name__", "value")
    return convert


def _key_value(text: str) -> tuple[str, Any]:
    """`name=value`; the value is a Python literal, else text."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} needs the form name=value.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value

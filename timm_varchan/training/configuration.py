"""One frozen configuration a run; its fields are the flags of `hf_train.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from timm_varchan.channels import ChannelSet, read_channels
from timm_varchan.data import NO_DATA
from timm_varchan.errors import UserError
from timm_varchan.evaluation import MODES, ORDERS
from timm_varchan.views import CHANNEL_AUGS

__all__ = ["GROUPS", "TrainConfig", "flag"]

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


def _option(group: str, default: Any, text: str, choices: Iterable[str] | None = None) -> Any:
    """A field that becomes a flag in a group of `--help`."""
    metadata = {"group": group, "help": text, "choices": choices and tuple(choices)}
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
    img_size: int | None = _data(None, "height and width; the saved model's, 64 to train")
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
    crop_pct: float | None = _data(None, "share kept in evaluation; the saved model's, else 1")
    cache: bool = _data(False, "decode training images once and keep them in memory")
    streaming: bool = _data(False, "read training images as they come (hub, Parquet files)")
    epoch_images: int | None = _data(None, "with --streaming: what counts as an epoch")
    workers: int = _data(2, "processes that load data, for each process that trains")
    prefetch: int = _data(2, "batches that a worker loads ahead")

    crop_scale: tuple[float, float] = _augmentation(
        (0.35, 1.0), "share of the area that crops keep"
    )
    crop_ratio: tuple[float, float] = _augmentation((3 / 4, 4 / 3), "width over height of crops")
    hflip: float = _augmentation(0.5, "probability of a horizontal flip")
    vflip: float = _augmentation(0.0, "probability of a vertical flip (images from above)")
    rotation_degrees: float = _augmentation(15.0, "rotations are drawn from plus to minus this")
    auto_augment: str = _augmentation(
        "none", "random operations on any planes: RandAugment, TrivialAugment",
        ("none", "rand", "trivial"),
    )  # fmt: skip
    erase_prob: float = _augmentation(0.0, "probability that a rectangle is erased")
    mixup: float = _augmentation(0.0, "alpha of mixup")
    cutmix: float = _augmentation(0.0, "alpha of cutmix")
    channel_aug: str = _augmentation(
        "hcs-sample", "what is done to a batch's channels", CHANNEL_AUGS
    )
    full_share: float | None = _augmentation(
        None, "share of images with all channels under hcs; 0.5 from five channels on, else 0"
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
    drop_path: float = _model(0.0, "rate of stochastic depth, where the model has it")

    epochs: int = _training(15, "times through the training images")
    batch_size: int = _training(32, "images a forward pass and process")
    grad_accum_steps: int = _training(1, "forward passes an update")
    lr: float = _training(2e-3, "highest learning rate")
    min_lr: float = _training(0.0, "learning rate at the end")
    warmup_epochs: int = _training(1, "epochs over which the learning rate rises")
    opt: str = _training("adamw", "a timm optimizer")
    sched: str = _training("cosine", "a timm scheduler, stepped every update", _SCHEDULES)
    weight_decay: float = _training(0.05, "weight decay; none on biases and norms")
    layer_decay: float | None = _training(None, "factor of the learning rate from layer to layer")
    smoothing: float = _training(0.0, "label smoothing")
    clip_grad: float | None = _training(None, "largest norm of the gradient")
    ema_decay: float | None = _training(None, "keep, test and save an average of the weights")
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
    eval_batch_size: int = _evaluation(128, "images a batch and process")
    eval_checkpoint: str = _evaluation("last", "which one is evaluated and saved", ("last", "best"))
    eval_only: str | None = _evaluation(None, "evaluate this saved model folder, train nothing")
    eval_statistics: int = _evaluation(
        0, "estimate BatchNorm's statistics anew for every set, on so many training images"
    )
    val_max_sets: int = _evaluation(8, "channel sets of the validation after every epoch")

    recipe: str | None = _run(None, "named defaults of all other flags")
    output_dir: str = _run("output", "folder of the run")
    resume: str | None = _run(None, "'auto': the run in the output folder; or a checkpoint folder")
    checkpoint_steps: int = _run(0, "also save after every so many updates; 0: after epochs only")
    push_to_hub: str | None = _run(None, "after training push model and card there, as ORG/NAME")
    push_public: bool = _run(False, "a new repository of --push-to-hub is not private")
    trackers: tuple[str, ...] = _run((), "log there too", ("tensorboard", "wandb"))
    expect_processes: int | None = _run(None, "stop unless so many processes work together")

    def __post_init__(self) -> None:
        for name, low in (
            ("img_size", 1), ("epochs", 1), ("batch_size", 1), ("eval_batch_size", 1),
            ("grad_accum_steps", 1), ("workers", 0), ("prefetch", 1), ("warmup_epochs", 0),
            ("lr", 0), ("min_lr", 0), ("weight_decay", 0), ("mixup", 0), ("cutmix", 0),
            ("rotation_degrees", 0), ("drop_path", 0), ("clip_grad", 0), ("checkpoint_steps", 0),
            ("eval_statistics", 0), ("epoch_images", 1), ("val_max_sets", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise UserError(f"{flag(name)} is {value}; it must be {low} or more.")
        for name in ("hflip", "vflip", "erase_prob", "crop_pct", "layer_decay", "full_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{flag(name)} is {value}; it must be in 0..1.")
        for name in ("smoothing", "ema_decay", "drop_path"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{flag(name)} is {value}; it must be in 0..1, below 1.")
        if self.mixes and self.batch_size % 2:
            raise UserError(
                f"--batch-size is {self.batch_size}; --mixup and --cutmix mix pairs, so it must be "
                f"even."
            )
        self._check_push()
        self._check_streaming()
        self._check_sets()
        for field in dataclasses.fields(self):
            self._check_choice(field)

    def _check_streaming(self) -> None:
        if self.streaming and self.use is not None:
            raise UserError(
                "--use takes planes out of images that are there: leave --streaming out, or name "
                "only the planes that the stream has with --channels."
            )
        if self.streaming and (self.epoch_images is None or self.cache):
            raise UserError(
                "--streaming needs --epoch-images N (how long a stream is nobody knows before its "
                "end), and nothing of it can be kept: leave --cache out."
            )

    def _check_push(self) -> None:
        if self.push_to_hub is not None and self.eval_only is not None:
            raise UserError(
                f"--push-to-hub is for after training, but --eval-only trains nothing. Push with: "
                f"python -m timm_varchan push {self.eval_only} {self.push_to_hub}"
            )

    def _check_choice(self, field: dataclasses.Field[Any]) -> None:
        value, choices = getattr(self, field.name), field.metadata["choices"]
        given = value if isinstance(value, tuple) else (value,)
        if choices is not None and value is not None and not set(given) <= set(choices):
            raise UserError(f"{flag(field.name)} is {value!r}. Choose from: {', '.join(choices)}.")

    def _check_sets(self) -> None:
        if self.eval_max_sets is not None and self.eval_sets != "default":
            raise UserError("--eval-sets and --eval-max-sets say the same: leave one of them out.")

    def channel_set(self) -> ChannelSet | None:
        """What `channels` says, or None where it says nothing.

        Raises:
            UserError: What `read_channels` refuses.
        """
        if self.channels is None:
            return None
        return read_channels(self.channels, new_names=self.new_names)

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
        """A JSON-serialisable form."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        """What `to_json` gave, of this version or of an earlier one.

        Raises:
            ValueError: Values that no flag takes.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name in known
        }
        return cls(**fields)


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def _plain(value: Any) -> Any:
    """What JSON gives back: a configuration that was written and read compares equal."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value

"""One frozen configuration a run; its fields are the flags of `hf_train.py`."""

from __future__ import annotations

import argparse
import ast
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args, get_type_hints

from timm_varchan.evaluation import MAX_SETS, MODES, ORDERS
from timm_varchan.training.channel_draws import CHANNEL_AUGS

__all__ = ["TrainConfig"]

#: Height and width of the images where nothing else is said.
DEFAULT_PIXELS = 64
_SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "constant", "none")


def _option(group: str, default: Any, text: str, choices: Iterable[str] | None = None) -> Any:
    """A field that becomes a flag in a group of `--help`."""
    metadata = {"group": group, "help": text, "choices": choices and tuple(choices)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_data = partial(_option, "data")
_model = partial(_option, "model")
_training = partial(_option, "training")
_evaluation = partial(_option, "evaluation")
_run = partial(_option, "run")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run does. The text of every field is the help of its flag."""

    dataset: str = _data("synthetic", "'synthetic', folder, Parquet or list file, or hub name")
    channels: str | None = _data(None, "what the planes are, in order: RGB, B02+B08, ...")
    img_size: int | None = _data(None, "height and width; the saved model's, 64 to train")
    limit: int | None = _data(None, "at most so many images a split")
    image_column: str | None = _data(None, "column of the images")
    label_column: str | None = _data(None, "column of the labels")
    train_split: str | None = _data(None, "what the source calls its training split")
    validation_split: str | None = _data(None, "what it calls its validation split")
    test_split: str | None = _data(None, "what it calls its test split")
    validation_fraction: float = _data(0.1, "share of train set apart if there is no validation")
    value_scale: float | None = _data(None, "what stored numbers are divided by (10000)")
    skip_corrupt: bool = _data(False, "leave out images that cannot be read")
    data_seed: int = _data(0, "of synthetic images, limit and validation fraction")
    crop_pct: float | None = _data(None, "share kept in evaluation; the saved model's, else 1")
    workers: int = _data(2, "processes that load data, for each process that trains")

    model: str = _model("dwg_test_resnet", "a timm model, its twin 'dwg_...', or local-dir:FOLDER")
    model_kwargs: dict[str, Any] = _model({}, "further arguments of timm.create_model")  # noqa: RUF009
    pretrained: bool = _model(False, "start from pretrained weights")
    channel_identity: str = _model(
        "named", "whether training tells the model the channels", ("named", "anonymous")
    )

    epochs: int = _training(15, "times through the training images")
    batch_size: int = _training(32, "images a step and process")
    lr: float = _training(2e-3, "highest learning rate")
    min_lr: float = _training(0.0, "learning rate at the end")
    warmup_epochs: int = _training(1, "epochs over which the learning rate rises")
    opt: str = _training("adamw", "a timm optimizer")
    sched: str = _training("cosine", "a timm scheduler, stepped every update", _SCHEDULES)
    weight_decay: float = _training(0.05, "weight decay; none on biases and norms")
    smoothing: float = _training(0.0, "label smoothing")
    clip_grad: float | None = _training(None, "largest norm of the gradient")
    channel_aug: str = _training("hcs-sample", "what is done to a batch's channels", CHANNEL_AUGS)
    seed: int = _training(0, "of weights, order, augmentation and channel draws")

    eval_modes: tuple[str, ...] | None = _evaluation(
        None, "how the model meets a channel set; what it can by default", MODES
    )
    eval_orders: tuple[str, ...] = _evaluation(ORDERS, "order of the planes", ORDERS)
    eval_max_sets: int = _evaluation(MAX_SETS, "of more subsets than this, a sample of each size")
    eval_batch_size: int = _evaluation(128, "images a batch and process")
    eval_checkpoint: str = _evaluation("last", "which one is evaluated and saved", ("last", "best"))
    eval_only: str | None = _evaluation(None, "evaluate this saved model folder, train nothing")

    output_dir: str = _run("output", "folder of the run")
    resume: str | None = _run(None, "'auto': the run in the output folder; or a checkpoint folder")
    expect_processes: int | None = _run(None, "stop unless so many processes work together")

    def __post_init__(self) -> None:
        for name, low in (
            ("img_size", 1), ("epochs", 1), ("batch_size", 1), ("eval_batch_size", 1),
            ("workers", 0), ("warmup_epochs", 0), ("lr", 0), ("min_lr", 0), ("weight_decay", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ValueError(f"{flag(name)} is {value}; it must be {low} or more.")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"--smoothing is {self.smoothing}; it must be in 0..1, below 1.")
        for field in dataclasses.fields(self):
            self._check_choice(field)

    @property
    def pixels(self) -> int:
        """Height and width of the images."""
        return DEFAULT_PIXELS if self.img_size is None else self.img_size

    def _check_choice(self, field: dataclasses.Field[Any]) -> None:
        value, choices = getattr(self, field.name), field.metadata["choices"]
        given = value if isinstance(value, tuple) else (value,)
        if choices is not None and value is not None and not set(given) <= set(choices):
            raise ValueError(f"{flag(field.name)} is {value!r}. Choose from: {', '.join(choices)}.")

    @classmethod
    def parser(cls, **kwargs: Any) -> argparse.ArgumentParser:
        """An argument parser with a flag for every field."""
        parser = argparse.ArgumentParser(
            formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs
        )
        groups: dict[str, Any] = {}
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            name = field.metadata["group"]
            if name not in groups:
                groups[name] = parser.add_argument_group(name)
            groups[name].add_argument(flag(field.name), **_argument(field, hints[field.name]))
        return parser

    @classmethod
    def from_args(cls, args: Sequence[str] | None = None) -> TrainConfig:
        """The configuration of a command line, `sys.argv` by default.

        Raises:
            SystemExit: Wrong flags or values, after saying which.
        """
        parser = cls.parser(description="Train a model for any number of channels.")
        values: dict[str, Any] = vars(parser.parse_args(args))
        try:
            return cls(**{k: _frozen(v) for k, v in values.items()})
        except ValueError as error:
            parser.error(str(error))

    def to_args(self) -> list[str]:
        """The flags that differ from the defaults, which `from_args` reads to the same."""
        args: list[str] = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == getattr(type(self)(), field.name):
                continue
            if isinstance(value, bool):
                args.append(flag(field.name) if value else flag(f"no_{field.name}"))
            elif isinstance(value, dict):
                args += [flag(field.name), *(f"{k}={v!r}" for k, v in value.items())]
            elif isinstance(value, tuple):
                args += [flag(field.name), *value]
            else:
                args += [flag(field.name), str(value)]
        return args

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """The keywords of `add_argument` for a field of some type."""
    types = [t for t in get_args(hint) if t is not type(None)] if get_args(hint) else [hint]
    kind = hint if str(hint).startswith(("tuple", "dict")) else types[0]
    common = {"help": field.metadata["help"], "default": field.default}
    if field.metadata["choices"] is not None:
        common["choices"] = field.metadata["choices"]
    if kind is bool:
        return common | {"action": argparse.BooleanOptionalAction}
    if str(kind).startswith("tuple"):
        return common | {"nargs": "+", "type": str}
    if str(kind).startswith("dict"):
        return common | {"action": _KeyValues, "nargs": "*", "default": {}, "metavar": "NAME=VALUE"}
    return common | {"type": kind}


class _KeyValues(argparse.Action):
    """Collects `name=value`; values are Python literals, else text."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        result = {}
        for item in values:
            name, separator, text = item.partition("=")
            if not separator:
                parser.error(f"{option_string} {item!r} needs the form name=value.")
            try:
                result[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                result[name] = text
        setattr(namespace, self.dest, result)


def _plain(value: Any) -> Any:
    """What JSON gives back: a configuration that was written and read compares equal."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

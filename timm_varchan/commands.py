"""The commands of `timm-varchan`: their flags as dataclasses, and what each does.

What is heavy is imported where it is used, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro
import yaml
from tyro.conf import OmitArgPrefixes, Positional, arg

from timm_varchan.errors import UserError, needs
from timm_varchan.input_spec import InputSpec, PixelFlags
from timm_varchan.training.config import (
    MARK,
    RECIPES,
    EvaluateConfig,
    Model,
    SourceFlags,
    TrainConfig,
    as_fields,
)

if TYPE_CHECKING:
    from torch import Tensor

    from timm_varchan.channels import ChannelSet
    from timm_varchan.data import ImageData, ImageSplit
    from timm_varchan.hub import SavedModel
    from timm_varchan.predict import Prediction

_UNREADABLE = 3
#: Files that a line about several names.
_NUM_NAMED = 5

Flags = TypeVar("Flags")


def parse(
    cls: type[Flags], words: Sequence[str], prog: str, defaults: Flags | None = None
) -> Flags:
    """Read the flags of a command, whose dataclass inherits its groups of `--help`.

    Args:
        cls: A dataclass without fields of its own, over one dataclass a group.
        words: The command line after the command's name.
        prog: The command, for the help.
        defaults: What holds where no flag says otherwise.

    Raises:
        SystemExit: After `--help` (0) or wrong flags (2).
        UserError: Values out of range.
    """
    groups = [base for base in reversed(cls.__mro__) if is_group(base)]
    members: list[Any] = []
    for base in groups:
        name, marked = base.__name__.removesuffix("Flags").lower(), Annotated[base, OmitArgPrefixes]
        if defaults is None:
            members.append((name, marked))
        else:
            given = {f.name: getattr(defaults, f.name) for f in fields(base)}
            members.append((name, marked, field(default=base(**given))))
    joined: type[Any] = make_dataclass("Flags", members, frozen=True, kw_only=True)
    flags = tyro.cli(joined, args=list(words), prog=prog, description=cls.__doc__)
    return cls(
        **{f.name: getattr(flag, f.name) for flag in vars(flags).values() for f in fields(flag)}
    )


def is_group(cls: type) -> bool:
    """Whether a class is a dataclass that combines no others."""
    return [dataclasses.is_dataclass(base) for base in cls.__mro__].count(True) == 1


# Training and evaluation --------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FileFlags:
    """A file of flags, which flags on the command line override."""

    config: str | None = None  # YAML or JSON: NAME: VALUE lines, or run.json of another run


@dataclass(frozen=True, kw_only=True)
class Train(TrainConfig, FileFlags):
    """Train a model for any number of channels, then test it on channel sets."""


def train_config(words: Sequence[str]) -> TrainConfig:
    """The configuration of a command line; `--resume`, `--config` and `--recipe` give defaults."""
    given = {
        name: words[i + 1] if "=" not in word else word.partition("=")[2]
        for i, word in enumerate(words)
        for name in ("config", "recipe", "resume", "output-dir")
        if word.split("=")[0].replace("_", "-") == f"--{name}"
        and ("=" in word or i + 1 < len(words))
    }
    values: dict[str, Any] = {}
    if given.get("recipe") in RECIPES:
        values |= RECIPES[given["recipe"]].to_json()
    if "config" in given:
        read = yaml.safe_load(Path(given["config"]).read_text(encoding="utf-8"))
        if not isinstance(read, dict):
            raise UserError(f"{given['config']} holds no flags. Write lines of NAME: VALUE.")
        values |= read
    mark = Path(given.get("output-dir", values.get("output_dir", TrainConfig.output_dir))) / MARK
    if given.get("resume", "None") != "None" and mark.is_file():
        values = json.loads(mark.read_text(encoding="utf-8"))
    defaults = Train(**as_fields(TrainConfig, values))
    flags = parse(Train, words, "timm-varchan train", defaults)
    return TrainConfig(**{f.name: getattr(flags, f.name) for f in fields(TrainConfig)})


def train(words: Sequence[str]) -> int:
    """Train, evaluate, report."""
    config = train_config(words)
    _log()
    with needs("train"):
        from timm_varchan.training.report import closing
        from timm_varchan.training.train import Interrupted, run
    try:
        outcome = run(config)
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            again = ["timm-varchan", "train", "--resume", "auto", "--output-dir", config.output_dir]
            print(f"Stopped; a checkpoint is saved. Go on with:\n{shlex.join(again)}", flush=True)
        return 128 + stopped.number
    if outcome.is_main:
        print(f"\n{closing(outcome.results, outcome.folder)}")
        if config.push_to_hub is not None:
            return push(str(config.folder / "model"), config.push_to_hub)
    return 0


def evaluate(words: Sequence[str]) -> int:
    """Judge a saved model on channel sets."""
    config = parse(EvaluateConfig, words, "timm-varchan evaluate")
    _log()
    from timm_varchan.training.report import closing
    from timm_varchan.training.train import evaluate as judge

    outcome = judge(config)
    if outcome.is_main:
        print(closing(outcome.results, outcome.folder))
    return 0


def _log() -> None:
    """The log as lines on the error stream."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _say_retries_once() -> None:
    """Of the requests that huggingface_hub repeats, say the first failure and the first wait."""
    lines: set[int] = set()

    def once(record: logging.LogRecord) -> bool:
        is_new = record.lineno not in lines
        lines.add(record.lineno)
        return is_new

    logging.getLogger("huggingface_hub.utils._http").addFilter(once)


# Using a model ------------------------------------------------------------------------------------


#: Image files and folders.
Files = Positional[Annotated[tuple[str, ...], arg(metavar="FILES", help="image files, folders")]]
Data = Positional[
    Annotated[str, arg(metavar="DATA", help="folder, Parquet or list file, or hub name")]
]


@dataclass(frozen=True, kw_only=True)
class LoadFlags:
    """What differs from what was saved with the model."""

    pretrained: bool = True  # --no-pretrained: random weights, to try something out
    img_size: int | None = None  # height and width in pixels

    def load(self, model: str, pixels: PixelFlags) -> SavedModel:
        """The saved model, its input as the flags say."""
        from timm_varchan import hub

        saved = hub.load(model, pretrained=self.pretrained)
        spec = InputSpec.of(saved.spec, img_size=self.img_size, **pixels.flags)
        hub.check_img_size(saved.model, self.img_size)
        return replace(saved, spec=spec)


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """What the images are."""

    channels: str | None = None  # planes of the files, as GB, B02+B08 or anonymous
    mean: tuple[float, ...] | None = None  # means, for all or each channel
    std: tuple[float, ...] | None = None  # deviations, for all or each channel


@dataclass(frozen=True, kw_only=True)
class AnswerFlags:
    """What is told, where to, and how fast."""

    top: int = 5  # classes to show
    min_probability: float = 0.0  # a likeliest class below it is no answer
    json: bool = False  # one JSON object a line
    #: a table of the files (.csv); the map of one scene (.tif, or .csv a cell; needs [geo])
    output: str | None = None
    tile: int | None = None  # pixels a side of a scene's windows; the model's
    stride: int | None = None  # pixels between windows; half of a window
    batch_size: int = 32  # images at once
    workers: int = 0  # processes that decode


def predict(
    model: Model, files: Files, answer: AnswerFlags, images: ImageFlags, load: LoadFlags,
    pixels: PixelFlags,
) -> int:  # fmt: skip
    """Classify image files into lines or a table, or one large scene into a map."""
    from tqdm import tqdm

    from timm_varchan.predict import find_images, missing_channels, write_table
    from timm_varchan.predict import predict as classify

    saved = load.load(model, pixels)
    spec = InputSpec.of(saved.spec, channels=images.channels)
    is_map = answer.output and answer.output.endswith((".tif", ".tiff"))
    if answer.output and (is_map or answer.tile or answer.stride):
        return _predict_scene(saved, files, spec, answer, images)
    found_files = find_images(files)
    if missing := missing_channels(saved.model, spec.channels):
        print(missing, file=sys.stderr)
    found = classify(
        saved.model, found_files, spec, mean=images.mean, std=images.std, top=answer.top,
        min_probability=answer.min_probability, batch_size=answer.batch_size,
        num_workers=answer.workers,
    )  # fmt: skip
    found = write_table(found, answer.output) if answer.output else found
    unread: dict[str, list[Prediction]] = {}  # by the reason, numbers in it aside
    for prediction in tqdm(
        found, total=len(found_files), unit="file", disable=len(found_files) == 1
    ):
        if prediction.error is not None:
            unread.setdefault(re.sub(r"[\d.,]+", "0", prediction.error), []).append(prediction)
        _say_answer(prediction, answer)
    for first, *others in unread.values():
        names = [str(prediction.file) for prediction in others[:_NUM_NAMED]] + ["..."] * bool(
            others[_NUM_NAMED:]
        )
        more = f" ({len(others)} more files likewise: {', '.join(names)})" if others else ""
        print(f"{first.file}: not read, {first.error}{more}", file=sys.stderr)
    if unread:
        count = sum(map(len, unread.values()))
        print(f"{count} of {len(found_files)} files could not be read.", file=sys.stderr)
    return _UNREADABLE if unread else 0


def _say_answer(found: Prediction, answer: AnswerFlags) -> None:
    """A line for a file, beside the bar."""
    from tqdm import tqdm

    if answer.json:
        classes = [{"name": name, "probability": value} for name, value in found.classes]
        line = {"file": str(found.file), "classes": classes, "error": found.error}
        tqdm.write(json.dumps(line))
    elif found.error is None and not answer.output:
        sure = "" if found.is_sure else "not sure: "
        shown = "  ".join(f"{name} {value:6.1%}" for name, value in found.classes)
        tqdm.write(f"{found.file}  {sure}{shown}")


def _predict_scene(
    saved: SavedModel, files: Sequence[str], spec: InputSpec, answer: AnswerFlags,
    images: ImageFlags,
) -> int:  # fmt: skip
    """Windows of one large scene into a raster or table of classes."""
    from tqdm import tqdm

    from timm_varchan.scenes import predict_scene

    if len(files) != 1:
        raise UserError(f"--output {answer.output} is of one scene, {len(files)} files came.")
    if images.mean and images.std:
        spec = replace(spec, channels=spec.channels.with_stats(images.mean, images.std))
    rows = predict_scene(
        saved.model, files[0], str(answer.output), spec, tile=answer.tile, stride=answer.stride,
        min_probability=answer.min_probability, batch_size=answer.batch_size,
    )  # fmt: skip
    invalid, summary = 0.0, tuple[str, ...]()
    with tqdm(unit="row") as bar:
        for row in rows:
            bar.total, invalid, summary = row.total, invalid + row.invalid_share, row.summary
            bar.update(row.done - bar.n)
    print(f"{answer.output}: {invalid / max(1, bar.n):.1%} of the pixels hold no data.")
    print("\n".join(summary))
    return 0


def look(
    model: Model,
    files: Files,
    images: ImageFlags,
    load: LoadFlags,
    pixels: PixelFlags,
    *,
    output: Annotated[str, arg(help="picture to write")] = "stem.png",
    sets: Annotated[tuple[str, ...], arg(help="channel sets to compare, as RGB GB B")] = (),
    limit: Annotated[int, arg(help="images to show, of several classes")] = 2,
) -> int:
    """A picture of what the first layer makes of images: planes, kernels and answers."""
    import torch

    from timm_varchan.data import Reading
    from timm_varchan.evaluation import parse_sets, spread
    from timm_varchan.models import has_stems
    from timm_varchan.plots import plot_stem
    from timm_varchan.predict import ImageFiles, find_images

    saved = load.load(model, pixels)
    spec = InputSpec.of(saved.spec, channels=images.channels)
    assert spec.img_size is not None  # which every loaded model has
    chosen = spread(find_images(files), limit)
    reading = Reading(spec, partial=has_stems(saved.model))
    reader = ImageFiles(chosen, reading, (images.mean, images.std), (spec.img_size, spec.crop_pct))
    names: list[str] = []
    read: list[torch.Tensor] = []
    shown = spec.channels
    for file, image, shown_here in (reader[i] for i in range(len(chosen))):
        if isinstance(image, str):
            print(f"{file}: not read, {image}", file=sys.stderr)
        elif read and shown_here != shown:
            print(f"{file}: left out, it has {shown_here}, {names[0]} {shown}", file=sys.stderr)
        else:
            shown = shown_here
            names.append(file.name)
            read.append(image)
    if not read:
        raise UserError("None of the files could be read.")
    places = parse_sets(shown, " ".join(sets)) if sets else None
    print(plot_stem(saved.model, torch.stack(read), shown, output, sets=places, names=names))
    return _UNREADABLE if len(read) < len(chosen) else 0


def export(
    model: Model,
    output: Positional[Annotated[str, arg(metavar="FILE", help="file that ends in .onnx or .pt2")]],
    load: LoadFlags,
    pixels: PixelFlags,
    *,
    channels: Annotated[
        str | None, arg(help="one channel set, as GB; by default any number of channels")
    ] = None,
    fixed_size: Annotated[bool, arg(help="do not try other image sizes")] = False,
) -> int:
    """Write ONNX or torch.export, a file that other programs run, compared with the model first."""
    from timm_varchan.errors import ToolError
    from timm_varchan.export import export as write

    saved = load.load(model, pixels)
    chosen = None if channels is None else saved.select(channels)
    try:
        result = write(
            saved.model, output, saved.spec, channels=chosen, dynamic_size=not fixed_size
        )
    except (ValueError, RuntimeError) as error:  # the two that it promises, whatever went wrong
        raise ToolError(str(error)) from error
    for check in result.checks:
        shape = " x ".join(map(str, check.shape))
        print(f"input {shape:18}  largest difference {check.difference:.2e} of {check.scale:.2e}")
    if result.fixed_because:
        print(f"Height and width are fixed. {result.fixed_because}.")
    takes = "any number of" if result.num_channels is None else result.num_channels
    print(f"{result.path}: {takes} channels, checked.")
    return 0


def fold(
    model: Model,
    output: Positional[Annotated[str, arg(metavar="FOLDER", help="folder to save to")]],
    load: LoadFlags,
    pixels: PixelFlags,
    *,
    channels: Annotated[str, arg(help="the channel set, as GB")],
    data: Annotated[
        str | None, arg(help="images to calibrate on (train) and compare on (validation)")
    ] = None,
    limit: Annotated[int, arg(help="images a split")] = 512,
    skip_corrupt: Annotated[bool, arg(help="leave out images that cannot be read")] = False,
) -> int:
    """A plain timm model for one channel set, and what folding the mixer into it changes."""
    from timm_varchan import hub
    from timm_varchan.folding import fold as folding
    from timm_varchan.folding import measure_change

    if Path(output).resolve() == Path(model.removeprefix("local-dir:")).resolve():
        raise UserError(f"The output {output} is the model itself: name another folder.")
    saved = load.load(model, pixels)
    wanted = saved.select(channels)
    train, test = (None, None) if data is None else _splits(data, saved, model, limit, skip_corrupt)
    images = None if train is None else (x for x, _ in _batches(train, saved.spec, wanted))
    folded = folding(saved.model, wanted, images)
    measured = test or train
    if measured is not None:
        other = "other" if test is not None and train is not None else "the same"
        change = measure_change(saved.model, folded, _batches(measured, saved.spec, wanted), wanted)
        print(change.told(other))
    architecture = str(folded.pretrained_cfg["architecture"])  # type: ignore[index]
    if architecture.endswith("_folded"):
        raise UserError(
            f"The first convolution standardises its weights, so no plain timm model of this "
            f"architecture has the folded kernels. Export instead: timm-varchan export "
            f"{model} FILE.onnx --channels {channels}"
        )
    hub.save(folded, output, replace(saved.spec, channels=wanted))
    print(f"{output}: {architecture} with {len(wanted)} channels, {wanted}.")
    return 0


def _splits(
    source: str, saved: SavedModel, model: str, limit: int, skip_corrupt: bool
) -> tuple[ImageSplit | None, ImageSplit | None]:
    """Images to calibrate on, and to compare on: not those that the model was trained on."""
    from timm_varchan.data import load_data, load_fingerprints, unseen

    # Without a network it takes long until the hub refuses what is no path.
    if not (source == "synthetic" or "/" in source or Path(source).exists()):
        raise UserError(
            f"There is no file or folder {source}. Give one, 'synthetic', or ORG/NAME of the hub."
        )
    data = load_data(source, saved.spec, limit=limit, skip_corrupt=skip_corrupt)
    test = data.validation or data.test
    trained = load_fingerprints(model.removeprefix("local-dir:")).get("train")
    compared = test or data.train
    if trained is not None and compared is not None:
        test = unseen(compared, trained, source)
    return data.train, test


def _batches(
    split: ImageSplit, spec: InputSpec, wanted: ChannelSet
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches of the wanted channels, and labels."""
    from torch.utils.data import DataLoader

    from timm_varchan.data import TransformedSplit, eval_transform

    assert spec.img_size is not None
    transform = eval_transform(
        spec.img_size, spec.channels, crop_pct=spec.crop_pct, no_data=spec.no_data
    )
    planes = list(spec.channels.index(wanted))
    for x, labels in DataLoader(TransformedSplit(split, transform), batch_size=32):
        yield x[:, planes], labels


# Publishing and data ------------------------------------------------------------------------------


def push(
    folder: Positional[
        Annotated[str, arg(metavar="FOLDER", help="what hub.save or a training run wrote")]
    ],
    repo_id: Positional[Annotated[str, arg(metavar="ORG/NAME", help="the repository")]],
    *,
    public: Annotated[bool, arg(help="a new repository is not private")] = False,
    revision: Annotated[str | None, arg(help="the branch; main")] = None,
    message: Annotated[str, arg(help="of the commit")] = "Add model",
    license: Annotated[
        str | None, arg(help="of the weights, as the hub spells it, for the card")
    ] = None,
) -> int:
    """Upload a saved model to the hub, with a card where there is none of the user's own."""
    from timm_varchan import hub
    from timm_varchan.cards import CARD, write_card

    card = Path(folder) / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    if (Path(folder) / hub.CONFIG).is_file() and (not text or "local-dir:" in text):
        write_card(folder, source=f"hf-hub:{repo_id}", license=license)
    address = hub.push(
        folder, repo_id, private=not public, revision=revision, commit_message=message
    )
    print(address)
    return 0


def _data(source: str, flags: SourceFlags, pixels: PixelFlags) -> ImageData:
    """The data that flags describe."""
    from timm_varchan.channels import ChannelSet
    from timm_varchan.data import load_data

    channels = flags.channels
    return load_data(
        source,
        channels=channels and ChannelSet.parse(channels, new_names=flags.new_names),
        planes=flags.planes,
        splits=flags.splits,
        image_column=flags.image_column,
        label_column=flags.label_column,
        skip_corrupt=flags.skip_corrupt,
        allow_absent=True,
        **pixels.flags,
    )


def measure(
    data: Data,
    source: SourceFlags,
    pixels: PixelFlags,
    *,
    num_images: Annotated[int, arg(help="images to look at")] = 1000,
    output: Annotated[str | None, arg(help="JSON file to write, for train --channels")] = None,
) -> int:
    """Mean, deviation and correlation of the channels of data, once for all runs."""
    from timm_varchan.channels import write_channels
    from timm_varchan.data import measure_split

    split = next(iter(_data(data, source, pixels).splits.values()))
    measured, invalid = measure_split(split, num_images)
    for channel, fraction in zip(measured, invalid, strict=True):
        without = f"  no data in {fraction:.2%}" if fraction else ""
        print(f"{channel.label:12} mean {channel.mean:.5g}  std {channel.std:.5g}{without}")
    if output:
        print(write_channels(measured, output))
    return 0


def preview(
    data: Data,
    source: SourceFlags,
    pixels: PixelFlags,
    *,
    output: Annotated[str, arg(help="picture to write")] = "preview.png",
) -> int:
    """A picture of what training would read, and what speaks against it."""
    from timm_varchan.data.preview import preview_data
    from timm_varchan.plots import plot_preview

    found = preview_data(_data(data, source, pixels))
    print("\n".join((found.title, *found.lines, str(plot_preview(found, output)))))
    return 0


def channels(
    product: Positional[
        Annotated[str | None, arg(metavar="PRODUCT", help="show its planes, as eurosat")]
    ] = None,
) -> int:
    """List the products whose planes have a name, or the planes of one."""
    from timm_varchan.channels import ChannelSet
    from timm_varchan.products import PRODUCTS

    if product is None:
        for name, about in PRODUCTS.items():
            print(f"{name:20}{len(about.bands):3}  {about.about}")
            print(f"{'':25}{' '.join(about.bands)}")
            print(f"{'':25}source: {about.source}")
        return 0
    for plane, channel in enumerate(ChannelSet.parse(product), start=1):
        print(f"plane {plane:2}  {channel.label:16}{channel.wavelength_nm:8g} nm")
    return 0


def call(command: str, words: Sequence[str]) -> int:
    """Run a command with the words after its name; its exit code."""
    function: Callable[..., int] = globals()[command]
    _say_retries_once()
    if command in ("train", "evaluate"):
        return function(words)
    return tyro.cli(
        function, args=list(words), prog=f"timm-varchan {command}", config=(OmitArgPrefixes,)
    )

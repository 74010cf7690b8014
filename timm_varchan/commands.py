"""The commands of `timm-varchan`: their flags as dataclasses, and what each does.

What is heavy is imported where it is used, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
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
    TrainConfig,
    as_fields,
)

if TYPE_CHECKING:
    from torch import Tensor

    from timm_varchan.channels import ChannelSet
    from timm_varchan.data import ImageData, ImageSplit
    from timm_varchan.hub import SavedModel

_UNREADABLE = 3

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
        from timm_varchan.results import markdown_page
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
        print(f"\n{markdown_page(outcome.results)}\n{closing(outcome.results, outcome.folder)}")
        if config.push_to_hub is not None:
            folder = str(config.folder / "model")
            return push(Push(folder=folder, repo_id=config.push_to_hub))
    return 0


def evaluate(config: EvaluateConfig) -> int:
    """Judge a saved model on channel sets."""
    _log()
    from timm_varchan.results import markdown_page
    from timm_varchan.training.report import closing
    from timm_varchan.training.train import evaluate as judge

    outcome = judge(config)
    if outcome.is_main:
        print(f"{markdown_page(outcome.results)}\n{closing(outcome.results, outcome.folder)}")
    return 0


def _log() -> None:
    """The log as lines on the error stream; what other packages repeat is said once."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    seen: set[str] = set()

    def once(record: logging.LogRecord) -> bool:
        """Whether the same place of the code said nothing yet: a retry says it again."""
        place = f"{record.pathname}:{record.lineno}"
        known = place in seen
        seen.add(place)
        return not known

    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(once)


# Using a model ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """The model, and what differs from what was saved with it."""

    #: name, folder, local-dir:FOLDER or hf-hub:ORG/NAME
    model: Positional[Annotated[str, arg(metavar="MODEL")]]
    pretrained: bool = True  # --no-pretrained: random weights, to try something out
    img_size: int | None = None  # height and width in pixels

    def load(self) -> SavedModel:
        """The saved model, its input as the flags say."""
        from timm_varchan import hub

        saved = hub.load(self.model, pretrained=self.pretrained)
        said = self.said if isinstance(self, PixelFlags) else {}
        saved = replace(saved, spec=InputSpec.of(saved.spec, img_size=self.img_size, **said))
        hub.check_img_size(saved.model, self.img_size)
        return saved


@dataclass(frozen=True, kw_only=True)
class ImageFlags:
    """The images."""

    files: Positional[Annotated[tuple[str, ...], arg(metavar="FILES")]]  # image files and folders
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


@dataclass(frozen=True, kw_only=True)
class Predict(AnswerFlags, PixelFlags, ImageFlags, ModelFlags):
    """Classify image files into lines or a table, or one large scene into a map."""


def predict(flags: Predict) -> int:
    """Classes of every file, a line each."""
    from tqdm import tqdm

    from timm_varchan.predict import find_images, missing_channels, write_table
    from timm_varchan.predict import predict as classify

    saved = flags.load()
    spec = InputSpec.of(saved.spec, channels=flags.channels)
    if flags.output and (flags.output.endswith((".tif", ".tiff")) or flags.tile or flags.stride):
        return _predict_scene(flags, saved, spec)
    files = find_images(flags.files)
    if missing := missing_channels(saved.model, spec.channels):
        print(missing, file=sys.stderr)
    found = classify(
        saved.model, files, spec, mean=flags.mean, std=flags.std, top=flags.top,
        min_probability=flags.min_probability, batch_size=flags.batch_size,
        num_workers=flags.workers,
    )  # fmt: skip
    found = write_table(found, flags.output) if flags.output else found
    unreadable = 0
    for answer in tqdm(found, total=len(files), unit="file", disable=len(files) == 1):
        unreadable += answer.error is not None
        if flags.json:
            classes = [{"name": name, "probability": value} for name, value in answer.classes]
            line = {"file": str(answer.file), "classes": classes, "error": answer.error}
            tqdm.write(json.dumps(line))
        elif answer.error is not None:
            tqdm.write(f"{answer.file}: not read, {answer.error}", file=sys.stderr)
        elif not flags.output:
            sure = "" if answer.is_sure else "not sure: "
            shown = "  ".join(f"{name} {value:6.1%}" for name, value in answer.classes)
            tqdm.write(f"{answer.file}  {sure}{shown}")
    if unreadable:
        print(f"{unreadable} of {len(files)} files could not be read.", file=sys.stderr)
    return _UNREADABLE if unreadable else 0


def _predict_scene(flags: Predict, saved: SavedModel, spec: InputSpec) -> int:
    """Windows of one large scene into a raster or table of classes."""
    from tqdm import tqdm

    from timm_varchan.scenes import predict_scene

    if len(flags.files) != 1:
        raise UserError(f"--output {flags.output} is of one scene, {len(flags.files)} files came.")
    if flags.mean and flags.std:
        spec = replace(spec, channels=spec.channels.with_stats(flags.mean, flags.std))
    rows = predict_scene(
        saved.model, flags.files[0], str(flags.output), spec, tile=flags.tile,
        stride=flags.stride, min_probability=flags.min_probability, batch_size=flags.batch_size,
    )  # fmt: skip
    invalid, summary = 0.0, tuple[str, ...]()
    with tqdm(unit="row") as bar:
        for row in rows:
            bar.total, invalid, summary = row.total, invalid + row.invalid_share, row.summary
            bar.update(row.done - bar.n)
    print(f"{flags.output}: {invalid / max(1, bar.n):.1%} of the pixels hold no data.")
    print("\n".join(summary))
    return 0


@dataclass(frozen=True, kw_only=True)
class PictureFlags:
    """The picture."""

    output: str = "stem.png"  # picture to write
    sets: tuple[str, ...] = ()  # channel sets to compare, as RGB GB B
    limit: int = 2  # images to show, of several classes


@dataclass(frozen=True, kw_only=True)
class Look(PictureFlags, PixelFlags, ImageFlags, ModelFlags):
    """A picture of what the first layer makes of images."""


def look(flags: Look) -> int:
    """Planes, kernels and answers of the stem."""
    import torch

    from timm_varchan.data import Reading
    from timm_varchan.evaluation import parse_sets, spread
    from timm_varchan.models import has_stems
    from timm_varchan.plots import plot_stem
    from timm_varchan.predict import ImageFiles, find_images

    saved = flags.load()
    spec = InputSpec.of(saved.spec, channels=flags.channels)
    assert spec.img_size is not None  # which every loaded model has
    files = spread(find_images(flags.files), flags.limit)  # of several classes
    reading = Reading(spec, partial=has_stems(saved.model))
    reader = ImageFiles(files, reading, (flags.mean, flags.std), (spec.img_size, spec.crop_pct))
    names: list[str] = []
    images: list[torch.Tensor] = []
    shown = spec.channels
    for file, image, there in (reader[i] for i in range(len(files))):
        if isinstance(image, str):
            print(f"{file}: not read, {image}", file=sys.stderr)
        elif images and there != shown:
            print(f"{file}: left out, it has {there}, {names[0]} {shown}", file=sys.stderr)
        else:
            shown = there
            names.append(file.name)
            images.append(image)
    if not images:
        raise UserError("None of the files could be read.")
    sets = parse_sets(shown, " ".join(flags.sets)) if flags.sets else None
    print(plot_stem(saved.model, torch.stack(images), shown, flags.output, sets=sets, names=names))
    return _UNREADABLE if len(images) < len(files) else 0


@dataclass(frozen=True, kw_only=True)
class ExportedFlags:
    """What is written."""

    output: Positional[Annotated[str, arg(metavar="FILE")]]  # file that ends in .onnx or .pt2
    channels: str | None = None  # one channel set, as GB; by default any number of channels
    fixed_size: bool = False  # do not try other image sizes


@dataclass(frozen=True, kw_only=True)
class Export(ExportedFlags, PixelFlags, ModelFlags):
    """Write ONNX or torch.export, compared with the model first."""


def export(flags: Export) -> int:
    """A file that other programs run."""
    from timm_varchan.errors import ToolError
    from timm_varchan.export import export as write

    saved = flags.load()
    channels = None if flags.channels is None else saved.select(flags.channels)
    try:
        result = write(
            saved.model, flags.output, saved.spec, channels=channels,
            dynamic_size=not flags.fixed_size,
        )  # fmt: skip
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


@dataclass(frozen=True, kw_only=True)
class FoldedFlags:
    """For which channels, compared on which images, and where to."""

    output: Positional[Annotated[str, arg(metavar="FILE")]]  # folder to save to
    channels: str  # the channel set, as GB
    data: str | None = None  # images to calibrate on (train) and compare on (validation)
    limit: int = 512  # images a split
    skip_corrupt: bool = False  # leave out images that cannot be read


@dataclass(frozen=True, kw_only=True)
class Fold(FoldedFlags, PixelFlags, ModelFlags):
    """A plain timm model for one channel set."""


def fold(flags: Fold) -> int:
    """Fold the mixer into the first convolution and say what that changes."""
    from timm_varchan import hub
    from timm_varchan.folding import fold as folding
    from timm_varchan.folding import measure_change

    if Path(flags.output).resolve() == Path(flags.model.removeprefix("local-dir:")).resolve():
        raise UserError(f"The output {flags.output} is the model itself: name another folder.")
    saved = flags.load()
    wanted = saved.select(flags.channels)
    train = test = None
    if flags.data:
        from timm_varchan.data import load_data, load_fingerprints, unseen

        # Without a network it takes long until the hub refuses what is no path.
        if not (flags.data == "synthetic" or "/" in flags.data or Path(flags.data).exists()):
            raise UserError(
                f"There is no file or folder {flags.data}. Give one, 'synthetic', or ORG/NAME of "
                f"the hub."
            )
        data = load_data(flags.data, saved.spec, limit=flags.limit, skip_corrupt=flags.skip_corrupt)
        train, test = data.train, data.validation or data.test
        trained = load_fingerprints(flags.model.removeprefix("local-dir:")).get("train")
        compared = test or train
        if trained is not None and compared is not None:
            test = unseen(compared, trained, flags.data)
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
            f"{flags.model} FILE.onnx --channels {flags.channels}"
        )
    hub.save(folded, flags.output, replace(saved.spec, channels=wanted))
    print(f"{flags.output}: {architecture} with {len(wanted)} channels, {wanted}.")
    return 0


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


@dataclass(frozen=True, kw_only=True)
class PushFlags:
    """What goes where."""

    #: what hub.save or a training run wrote
    folder: Positional[Annotated[str, arg(metavar="FOLDER")]]
    repo_id: Positional[Annotated[str, arg(metavar="ORG/NAME")]]  # ORG/NAME
    public: bool = False  # a new repository is not private
    revision: str | None = None  # the branch; main
    message: str = "Add model"  # of the commit
    license: str | None = None  # of the weights, as the hub spells it, for the card


@dataclass(frozen=True, kw_only=True)
class Push(PushFlags):
    """Upload a saved model to the hub, with a card that says how to load it from there."""


def push(flags: Push) -> int:
    """Write the card where there is none of the user's own, and upload."""
    from timm_varchan import hub
    from timm_varchan.cards import CARD, write_card

    card = Path(flags.folder) / CARD
    told = card.read_text(encoding="utf-8") if card.is_file() else ""
    if (Path(flags.folder) / hub.CONFIG).is_file() and (not told or "local-dir:" in told):
        write_card(flags.folder, source=f"hf-hub:{flags.repo_id}", license=flags.license)
    print(
        hub.push(
            flags.folder, flags.repo_id, private=not flags.public, revision=flags.revision,
            commit_message=flags.message,
        )
    )  # fmt: skip
    return 0


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """The data and how they are read."""

    #: folder, Parquet or list file, or hub name
    data: Positional[Annotated[str, arg(metavar="DATA")]]
    channels: str | None = None  # planes of the files, as GB or B02+B08
    new_names: bool = False  # take a name that nobody knows for a channel
    #: which files are one image, as "{image}_w{channel}.tif"; none: every file
    planes: str | None = None
    image_column: str | None = None  # column of the images
    label_column: str | None = None  # column of the labels
    train_split: str | None = None  # what the source calls its training split
    skip_corrupt: bool = False  # leave out images that cannot be read

    def load(self) -> ImageData:
        """The data."""
        from timm_varchan.channels import ChannelSet
        from timm_varchan.data import load_data

        given = {f.name: getattr(self, f.name) for f in fields(SourceFlags)}
        source, split, new = (given.pop(name) for name in ("data", "train_split", "new_names"))
        given |= self.said if isinstance(self, PixelFlags) else {}
        if self.channels is not None:
            given["channels"] = ChannelSet.parse(self.channels, new_names=new)
        splits = {} if split is None else {"train": split}
        return load_data(source, splits=splits, allow_absent=True, **given)


@dataclass(frozen=True, kw_only=True)
class MeasuredFlags:
    """How much is measured, and where to."""

    num_images: int = 1000  # images to look at
    output: str | None = None  # JSON file to write, for train --channels


@dataclass(frozen=True, kw_only=True)
class Measure(MeasuredFlags, PixelFlags, SourceFlags):
    """Mean, deviation and correlation of the channels of data, once for all runs."""


def measure(flags: Measure) -> int:
    """Measure, print, write."""
    from timm_varchan.channels import write_channels
    from timm_varchan.data import measure_split

    split = next(iter(flags.load().splits.values()))
    measured, invalid = measure_split(split, flags.num_images)
    for channel, fraction in zip(measured, invalid, strict=True):
        without = f"  no data in {fraction:.2%}" if fraction else ""
        print(f"{channel.label:12} mean {channel.mean:.5g}  std {channel.std:.5g}{without}")
    if flags.output:
        print(write_channels(measured, flags.output))
    return 0


@dataclass(frozen=True, kw_only=True)
class PreviewFlags:
    """Where to."""

    output: str = "preview.png"  # picture to write


@dataclass(frozen=True, kw_only=True)
class Preview(PreviewFlags, PixelFlags, SourceFlags):
    """A picture of what training would read, and what speaks against it."""


def preview(flags: Preview) -> int:
    """Look, print, draw."""
    from timm_varchan.data.preview import preview_data
    from timm_varchan.plots import plot_preview

    found = preview_data(flags.load())
    print("\n".join((found.title, *found.lines, str(plot_preview(found, flags.output)))))
    return 0


@dataclass(frozen=True, kw_only=True)
class ProductFlags:
    """Which product."""

    #: show its planes, as eurosat
    product: Positional[Annotated[str | None, arg(metavar="PRODUCT")]] = None


@dataclass(frozen=True, kw_only=True)
class Products(ProductFlags):
    """List the products whose planes have a name."""


def channels(flags: Products) -> int:
    """The products, or the planes of one."""
    from timm_varchan.channels import ChannelSet
    from timm_varchan.products import PRODUCTS

    if flags.product is None:
        for name, product in PRODUCTS.items():
            print(f"{name:20}{len(product.bands):3}  {product.about}")
            print(f"{'':25}{' '.join(product.bands)}")
            print(f"{'':25}source: {product.source}")
        return 0
    for plane, channel in enumerate(ChannelSet.parse(flags.product), start=1):
        print(f"plane {plane:2}  {channel.label:16}{channel.wavelength_nm:8g} nm")
    return 0


#: Flags and function of every command that `timm-varchan` reads by `parse`.
COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "evaluate": (EvaluateConfig, evaluate),
    "predict": (Predict, predict),
    "look": (Look, look),
    "export": (Export, export),
    "fold": (Fold, fold),
    "push": (Push, push),
    "preview": (Preview, preview),
    "measure": (Measure, measure),
    "channels": (Products, channels),
}


def call(command: str, words: Sequence[str]) -> int:
    """Run a command with the words after its name; its exit code."""
    if command == "train":
        return train(words)
    cls, function = COMMANDS[command]
    return function(parse(cls, words, f"timm-varchan {command}"))

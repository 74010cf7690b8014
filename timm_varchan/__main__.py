"""`python -m timm_varchan`: measure, predict, evaluate, export, fold, push, run other programs.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong arguments, 3 some image files
could not be read.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from timm_varchan import hub
from timm_varchan.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    from torch import nn

    from timm_varchan.channels import ChannelSet
    from timm_varchan.data import ImageSplit

_UNREADABLE = 3
#: Unexplained share of a virtual channel's variance from which `predict` names it.
_POOR = 0.05


def _load(args: argparse.Namespace) -> tuple[hub.SavedModel, ChannelSet | None]:
    """The model with what the flags say of size and scale, and the channels that they name."""
    saved = hub.load(args.model, pretrained=not args.no_pretrained)
    saved = replace(
        saved,
        img_size=args.img_size or saved.img_size,
        value_scale=args.value_scale or saved.value_scale,
    )
    return saved, saved.select(args.channels) if args.channels else None


def _predict(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from timm_varchan.predict import find_images, predict

    saved, channels = _load(args)
    settings: dict[str, Any] = {
        "channels": channels or saved.channels,
        "img_size": saved.img_size,
        "class_names": saved.class_names,
        "value_scale": saved.value_scale,
        "no_data": args.no_data,
        "batch_size": args.batch_size,
    }
    if args.output:
        return _predict_scene(args, saved, settings)
    files = find_images(args.files)
    _tell_expected_error(saved.model, settings["channels"])
    predictions = predict(
        saved.model,
        files,
        crop_pct=saved.crop_pct,
        mean=args.mean,
        std=args.std,
        top=args.top,
        num_workers=args.workers,
        **settings,
    )
    unreadable = 0
    for one in tqdm(predictions, total=len(files), unit="file", disable=len(files) == 1):
        unreadable += one.error is not None
        classes = [{"name": name, "probability": value} for name, value in one.classes]
        if args.json:
            line = {"file": str(one.file), "classes": classes, "error": one.error}
            tqdm.write(json.dumps(line))
        elif one.error is not None:
            tqdm.write(f"{one.file}: not read, {one.error}", file=sys.stderr)
        else:
            shown = "  ".join(f"{name} {value:6.1%}" for name, value in one.classes)
            tqdm.write(f"{one.file}  {shown}")
    if unreadable:
        print(f"{unreadable} of {len(files)} files could not be read.", file=sys.stderr)
    return _UNREADABLE if unreadable else 0


def _tell_expected_error(model: nn.Module, channels: ChannelSet) -> None:
    """Say on the error stream what the channels that are missing cost, where that is known."""
    from timm_varchan.channels import ANONYMOUS
    from timm_varchan.models import expected_error, has_stems, stems

    told = has_stems(model) and stems(model)[0].channels != ANONYMOUS
    if not told or channels.is_anonymous:
        return
    shares = expected_error(model, channels)
    poor = {name: share for name, share in shares.items() if share >= _POOR}
    if poor:
        shown = ", ".join(f"{name} {share:.0%}" for name, share in poor.items())
        print(
            f"{channels} cannot tell all of the model's virtual channels; share of the variance "
            f"that stays unknown: {shown}.",
            file=sys.stderr,
        )


def _predict_scene(
    args: argparse.Namespace, saved: hub.SavedModel, settings: dict[str, Any]
) -> int:
    """Windows of one large scene into a raster or table of classes."""
    from tqdm import tqdm

    from timm_varchan.scenes import predict_scene

    if len(args.files) != 1:
        raise UserError(f"--output is for one scene, {len(args.files)} files came.")
    if args.mean and args.std:
        settings["channels"] = settings["channels"].with_stats(args.mean, args.std)
    rows = predict_scene(
        saved.model, args.files[0], args.output, tile=args.tile, stride=args.stride, **settings
    )
    invalid = 0.0
    with tqdm(unit="row") as bar:
        for row in rows:
            bar.total, invalid = row.total, invalid + row.invalid_share
            bar.update(row.done - bar.n)
    print(f"{args.output}: {invalid / max(1, bar.n):.1%} of the pixels hold no data.")
    return 0


def _look(args: argparse.Namespace) -> int:
    import torch

    from timm_varchan.data import Reading
    from timm_varchan.evaluation import parse_sets, spread
    from timm_varchan.input_spec import InputSpec
    from timm_varchan.plots import plot_stem
    from timm_varchan.predict import ImageFiles, find_images

    saved, channels = _load(args)
    channels = channels or saved.channels
    files = spread(find_images(args.files), args.limit)  # of several classes
    spec = InputSpec.of(channels=channels, value_scale=saved.value_scale, no_data=args.no_data)
    reading = Reading(spec)
    size = (saved.img_size, saved.crop_pct)
    reader = ImageFiles(files, reading, (args.mean, args.std), size)
    names, images = [], []
    for file, image, _ in (reader[i] for i in range(len(files))):
        if isinstance(image, str):
            print(f"{file}: not read, {image}", file=sys.stderr)
        else:
            names.append(file.name)
            images.append(image)
    if not images:
        raise UserError("None of the files could be read.")
    path = plot_stem(
        saved.model,
        torch.stack(images),
        channels,
        args.output,
        sets=parse_sets(channels, " ".join(args.sets)) if args.sets else None,
        names=names,
    )
    print(path)
    return _UNREADABLE if len(images) < len(files) else 0


def _evaluate(args: argparse.Namespace) -> int:
    import logging
    import tempfile
    from contextlib import ExitStack

    from timm_varchan.results import markdown_page
    from timm_varchan.training import TrainConfig, run

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    given = {
        name: getattr(args, name)
        for name in (
            "dataset", "channels", "img_size", "value_scale", "image_column", "label_column",
            "train_split", "validation_split", "test_split", "limit", "skip_corrupt", "eval_sets",
            "missing", "baseline", "eval_batch_size", "workers", "no_data",
        )
    }  # fmt: skip
    with ExitStack() as stack:
        folder = args.output or stack.enter_context(tempfile.TemporaryDirectory())
        config = TrainConfig(
            eval_only=args.model,
            output_dir=folder,
            eval_modes=tuple(args.eval_modes) if args.eval_modes else None,
            mixed_precision="no",
            **_split_of(args),
            **given,
        )
        print(markdown_page(run(config).results))
    if args.output:
        print(f"Written to {args.output}/: all sets in sets.csv, everything in results.json.")
    return 0


def _split_of(args: argparse.Namespace) -> dict[str, Any]:
    """How images are set apart: as somebody asks, as training on the same data did, or not."""
    fraction, seed = args.validation_fraction, args.data_seed
    trained = Path(args.model.removeprefix("local-dir:")) / "results.json"
    if fraction is None and trained.is_file():
        config = json.loads(trained.read_text(encoding="utf-8")).get("config", {})
        if Path(str(config.get("dataset"))).name == Path(args.dataset).name:
            fraction, seed = config.get("validation_fraction"), config.get("data_seed", seed)
    return {"validation_fraction": fraction or 0.0, "data_seed": seed}


def _channels(args: argparse.Namespace) -> int:
    from timm_varchan.channels import ChannelSet
    from timm_varchan.products import PRODUCTS

    if args.product is None:
        for name, product in PRODUCTS.items():
            print(f"{name:20}{len(product.bands):3}  {product.about}")
            print(f"{'':25}{' '.join(product.bands)}")
            print(f"{'':25}source: {product.source}")
        return 0
    for plane, channel in enumerate(ChannelSet.parse(args.product), start=1):
        print(f"plane {plane:2}  {channel.label:16}{channel.wavelength_nm:8g} nm")
    return 0


def _export(args: argparse.Namespace) -> int:
    from timm_varchan.errors import ToolError
    from timm_varchan.export import export

    saved, chosen = _load(args)
    metadata = {
        "class_names": saved.class_names,
        "channels": (chosen or saved.channels).with_scale(saved.value_scale).to_dict(),
        "img_size": saved.img_size,
        "crop_pct": saved.crop_pct,
    }
    try:
        result = export(
            saved.model,
            args.output,
            channels=chosen,
            img_size=saved.img_size,
            dynamic_size=not args.fixed_size,
            metadata=metadata,
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


def _fold(args: argparse.Namespace) -> int:
    from timm_varchan.data import load_data
    from timm_varchan.folding import fold, measure_change

    saved, _ = _load(args)
    wanted = saved.select(args.channels)
    train = test = None
    if args.data:
        # Without a network it takes long until the hub refuses what is no path.
        if not (args.data == "synthetic" or "/" in args.data or Path(args.data).exists()):
            raise UserError(
                f"There is no file or folder {args.data}. Give one, 'synthetic', or ORG/NAME of "
                f"the hub."
            )
        data = load_data(
            args.data,
            channels=saved.channels,
            class_names=saved.class_names or None,
            limit=args.limit,
            value_scale=saved.value_scale,
        )
        train, test = data.train, data.validation or data.test
    images = None if train is None else (x for x, _ in _batches(train, saved, wanted))
    folded = fold(saved.model, wanted, images)
    measured = test or train
    if measured is not None:
        change = measure_change(saved.model, folded, _batches(measured, saved, wanted), wanted)
        print(
            f"On {change.num_images} {'other' if test and train else 'the same'} images: logits "
            f"change by {change.mean_logit:.2g} (at most {change.max_logit:.2g}; their deviation "
            f"is {change.logit_std:.2g}), first class equal {change.agreement:.1%}"
        )
        if change.difference is not None:
            low, high = change.difference.low, change.difference.high
            print(
                f"accuracy {change.accuracy:.1%} -> {change.folded_accuracy:.1%} "
                f"(difference {change.difference.difference:+.1%}, 95 % interval {low:+.1%} to "
                f"{high:+.1%})"
            )
    architecture = str(folded.pretrained_cfg["architecture"])  # type: ignore[index]
    if architecture.endswith("_folded"):
        raise UserError(
            f"The first convolution standardises its weights, so no plain timm model of this "
            f"architecture has the folded kernels. Export instead: python -m timm_varchan export "
            f"{args.model} FILE.onnx --channels {args.channels}"
        )
    hub.save(
        folded,
        args.output,
        class_names=saved.class_names,
        channels=wanted,
        img_size=saved.img_size,
        crop_pct=saved.crop_pct,
        value_scale=saved.value_scale,
    )
    print(f"{args.output}: {architecture} with {len(wanted)} channels, {wanted}.")
    return 0


def _batches(
    split: ImageSplit, saved: hub.SavedModel, wanted: ChannelSet
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches of the wanted channels, and labels."""
    from torch.utils.data import DataLoader

    from timm_varchan.data import TransformedSplit, eval_transform

    transform = eval_transform(saved.img_size, saved.channels, crop_pct=saved.crop_pct)
    planes = list(saved.channels.index(wanted))
    for x, labels in DataLoader(TransformedSplit(split, transform), batch_size=32):
        yield x[:, planes], labels


def _card(args: argparse.Namespace) -> int:
    from timm_varchan.cards import write_card

    print(write_card(args.folder, source=args.source, license=args.license))
    return 0


def _push(args: argparse.Namespace) -> int:
    from timm_varchan.cards import CARD, write_card

    card = Path(args.folder) / CARD
    told = card.read_text(encoding="utf-8") if card.is_file() else ""
    if (Path(args.folder) / hub.CONFIG).is_file() and (not told or "local-dir:" in told):
        write_card(args.folder, source=f"hf-hub:{args.repo_id}")
    address = hub.push(
        args.folder,
        args.repo_id,
        private=not args.public,
        revision=args.revision,
        commit_message=args.message,
    )
    print(address)
    return 0


def _run_program(words: Sequence[str]) -> int:
    """Run what `python` would run for these words, as `__main__`; what it raises is its own.

    Args:
        words: `SCRIPT` or `-m MODULE`, then its arguments.
    """
    is_module = list(words[:1]) == ["-m"]
    name, *arguments = list(words[is_module:]) or [""]
    problem = None
    if not name or (name.startswith("-") and not is_module):
        problem = "Name a program: python -m timm_varchan run SCRIPT | -m MODULE [ARGS]"
    elif is_module and not _is_module(name):
        problem = f"There is no module {name}. Install it, or give the path of a script."
    elif not is_module and not os.path.exists(name):
        problem = f"There is no script {name}. For a module: run -m {name}"
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    sys.argv = [name, *arguments]
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(name))
        runpy.run_path(name, run_name="__main__")
    return 0


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a package before a dot
        return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m timm_varchan",
        description="Use a trained model, or run another program with the twins.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", help="name, folder, local-dir:FOLDER or hf-hub:ORG/NAME")
    model.add_argument("--no-pretrained", action="store_true", help="random weights, to try out")
    model.add_argument("--img-size", type=int, help="height and width in pixels (the model's)")
    model.add_argument(
        "--value-scale", type=float, help="divide stored numbers by this (the model's)"
    )

    images = argparse.ArgumentParser(add_help=False)
    images.add_argument("files", nargs="+", help="image files and folders")
    images.add_argument("--channels", help="planes of the files, as GB, B02+B08 or anonymous")
    images.add_argument(
        "--no-data",
        default="refuse",
        choices=("refuse", "mean", "predict", "keep"),
        help="pixels without data: refuse the file, put the mean there, predict, keep (refuse)",
    )
    images.add_argument("--mean", type=float, nargs="+", help="means, for all or each channel")
    images.add_argument("--std", type=float, nargs="+", help="deviations, for all or each channel")

    predict = commands.add_parser("predict", parents=[model, images], help="classify image files")
    predict.set_defaults(run=_predict)
    predict.add_argument("--top", type=int, default=5, help="classes to show (5)")
    predict.add_argument("--json", action="store_true", help="one JSON object a line")
    predict.add_argument("--batch-size", type=int, default=32, help="images at once (32)")
    predict.add_argument("--output", help="classes of one scene: .tif or .csv (needs [geo])")
    predict.add_argument("--tile", type=int, help="pixels a side of its windows (the model's)")
    predict.add_argument("--stride", type=int, help="pixels between windows (half of a window)")
    predict.add_argument("--workers", type=int, default=0, help="processes that decode (0)")

    commands.add_parser("measure", help="mean, deviation and correlation of data")

    look = commands.add_parser(
        "look", parents=[model, images], help="a picture of what the stem makes of images"
    )
    look.set_defaults(run=_look)
    look.add_argument("--output", default="stem.png", help="picture to write (stem.png)")
    look.add_argument("--sets", nargs="+", help="channel sets to compare, as RGB GB B")
    look.add_argument("--limit", type=int, default=3, help="images to show (3)")

    _add_evaluate(commands)
    products = commands.add_parser("channels", help="list the products whose planes have a name")
    products.set_defaults(run=_channels)
    products.add_argument("product", nargs="?", help="show its planes, as eurosat")

    export = commands.add_parser("export", parents=[model], help="write ONNX or torch.export")
    export.set_defaults(run=_export)
    export.add_argument("output", help="file that ends in .onnx or .pt2")
    export.add_argument("--channels", help="one channel set, as GB (any number of channels)")
    export.add_argument("--fixed-size", action="store_true", help="do not try other image sizes")

    fold = commands.add_parser("fold", parents=[model], help="a plain timm model for one set")
    fold.set_defaults(run=_fold)
    fold.add_argument("output", help="folder to save to")
    fold.add_argument("--channels", required=True, help="the channel set, as GB")
    fold.add_argument("--data", help="images to calibrate on (train) and compare on (validation)")
    fold.add_argument("--limit", type=int, default=512, help="images a split (512)")

    card = commands.add_parser("card", help="write the model card of a saved folder")
    card.set_defaults(run=_card)
    card.add_argument("folder", help="what hub.save or a training run wrote")
    card.add_argument("--source", help="where people will load it from, as hf-hub:ORG/NAME")
    card.add_argument("--license", help="of the weights, as the hub spells it")

    push = commands.add_parser("push", help="upload a saved folder to the hub")
    push.set_defaults(run=_push)
    push.add_argument("folder", help="what hub.save or a training run wrote")
    push.add_argument("repo_id", help="ORG/NAME")
    push.add_argument("--public", action="store_true", help="a new repository is not private")
    push.add_argument("--revision", help="the branch (main)")
    push.add_argument("--message", default="Add model", help="of the commit")

    run = commands.add_parser("run", help="run another program with the twins registered")
    run.add_argument("program", metavar="SCRIPT | -m MODULE", help="as python would take it")
    run.add_argument("arguments", nargs="*", metavar="ARGS", help="of the program")
    return parser


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="accuracy on channel sets: which channels matter, what is lost without"
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", help="name, folder, local-dir:FOLDER or hf-hub:ORG/NAME")
    evaluate.add_argument("--dataset", required=True, help="folder, Parquet or list file, hub name")
    evaluate.add_argument("--missing", help="also the set without these channels, as B10+B11")
    evaluate.add_argument("--baseline", help="another model to compare with, set by set")
    evaluate.add_argument(
        "--eval-sets", default="default", help="default, all, RGB,B08,... or a number of sets"
    )
    evaluate.add_argument("--eval-modes", nargs="+", help="named, anonymous, mask (as trained)")
    evaluate.add_argument("--output", help="folder for tables and pictures; else only printed")
    evaluate.add_argument("--channels", help="planes of the images in their order (the model's)")
    evaluate.add_argument("--img-size", type=int, help="height and width (the model's)")
    evaluate.add_argument("--value-scale", type=float, help="divide by this (the model's)")
    evaluate.add_argument("--no-data", default="refuse", help="pixels without data: see predict")
    evaluate.add_argument("--limit", type=int, help="at most so many images")
    for split in ("train", "validation", "test"):
        evaluate.add_argument(f"--{split}-split", help=f"what the source calls its {split} split")
    evaluate.add_argument(
        "--validation-fraction",
        type=float,
        help="share of train to test on (as training did, or 0)",
    )
    evaluate.add_argument("--data-seed", type=int, default=0, help="as in training (0)")
    evaluate.add_argument("--image-column", help="column of the images")
    evaluate.add_argument("--label-column", help="column of the labels")
    evaluate.add_argument("--skip-corrupt", action="store_true", help="leave out unreadable images")
    evaluate.add_argument("--eval-batch-size", type=int, default=128, help="images at once (128)")
    evaluate.add_argument("--workers", type=int, default=2, help="processes that decode (2)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can cure are one line."""
    for stream in (sys.stdout, sys.stderr):  # names that a console's code page lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["run"] and words[1:2] not in (["-h"], ["--help"]):
        return _run_program(words[1:])
    try:
        if words[:1] == ["measure"]:  # its own parser: nothing else imports what reads data
            from timm_varchan.data.measure import main as measure

            return measure(words[1:], prog="python -m timm_varchan measure")
        args = _parser().parse_args(words)
        return int(args.run(args))
    except (UserError, OSError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

"""Export to ONNX and to `torch.export`, checked against the model before anything is written."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.models._input import get_model_input_config
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet, ChannelSetLike
from timm_varchan.errors import UserError, needs
from timm_varchan.folding import fold
from timm_varchan.input_spec import InputSpec
from timm_varchan.models import has_stems, share, stems
from timm_varchan.models.adapt import parse_channels

__all__ = ["Check", "Exported", "export"]

#: Channel counts that a file for any number of channels is checked with.
CHECK_COUNTS = (1, 3, 5, 12)
FORMATS = (".onnx", ".pt2")
#: Largest difference from the model's answers, relative to the largest of them.
TOLERANCE = 1e-3
#: A batch or channel count of 1 would be frozen; 5 channels are no model's default.
_EXAMPLE_BATCH, _EXAMPLE_CHANNELS = 2, 5
_CAUSE_LENGTH = 200


@dataclass(frozen=True)
class Check:
    """One comparison with the model on random input of a shape: largest difference and output."""

    shape: tuple[int, ...]
    difference: float
    scale: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= TOLERANCE * max(self.scale, 1e-6)


@dataclass(frozen=True)
class Exported:
    """What was written, with the comparisons, all within the tolerance.

    `num_channels` and `img_size` (height and width, in pixels) are None where the file takes any.
    """

    path: Path
    num_channels: int | None
    img_size: tuple[int, int] | None
    fixed_because: str | None
    checks: tuple[Check, ...]


def export(
    model: nn.Module,
    path: str | Path,
    spec: InputSpec | None = None,
    *,
    channels: ChannelSetLike | None = None,
    dynamic_size: bool = True,
    **fields: Any,
) -> Exported:
    """Write a model as ONNX (`.onnx`) or as a program of `torch.export` (`.pt2`).

    The batch is dynamic. So is the number of channels under the default rule and for `"anonymous"`;
    a named set has its own number. Height and width are dynamic where the backbone takes others.
    The file is compared with the model (onnxruntime, or `torch.export.load`) for 1, 3, 5 and 12
    channels and two sizes, and stands in its place only if they agree.

    Args:
        model: A classifier with or without a stem; it is not changed.
        path: Where to; the ending says the format.
        spec: What an image must be like to enter the model; as JSON under the key `timm_varchan` of
            the file's metadata. Its `img_size` is that of the input, by default the model's.
        channels: The channel set; by default what `set_channels` told the model.
        dynamic_size: Whether to try other heights and widths at all.
        **fields: Fields of the spec, in place of its own, as `img_size=224`.

    Returns:
        What was written and checked.

    Raises:
        ValueError: Another ending, channels that the model cannot serve, or a model that answers
            with anything else than one tensor.
        MissingExtraError: A package is missing.
        RuntimeError: The model cannot be exported, the file cannot be run, or it does not answer as
            the model does.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"{path.name} ends in neither of {', '.join(FORMATS)}: name it so.")
    with needs("export"):
        for package in ("onnx", "onnxruntime", "onnxscript") if path.suffix == ".onnx" else ():
            importlib.import_module(package)
    model, counts = _for_channels(model, channels)
    if channels is not None and spec is None:
        channels = parse_channels(model, channels)
    spec = InputSpec.of(spec, channels=channels, **fields)
    sizes, because = _sizes(model, counts[-1], spec.img_size, dynamic_size)
    static = _folded(model) if len(counts) == 1 else model
    text = json.dumps(replace(spec, img_size=sizes[0][0]).to_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        new = Path(folder) / path.name
        try:
            _write(static, new, counts, sizes, text)
        except RuntimeError as error:
            if len(sizes) == 1:
                raise
            sizes, because = sizes[:1], f"With dynamic ones {error}"
            _write(static, new, counts, sizes, text)
        checks = tuple(_checks(model, new, counts, sizes))
        failed = [check for check in checks if not check.passed]
        if failed:
            worst = max(failed, key=lambda check: check.difference)
            raise RuntimeError(
                f"The exported model differs from the model by {worst.difference:.2g} (outputs up "
                f"to {worst.scale:.2g}) for an input {worst.shape}; nothing was written. Try the "
                f"other format of {', '.join(FORMATS)}, or fold the model first."
            )
        for file in Path(folder).iterdir():  # weights above 2 GB stand beside the file
            os.replace(file, path.parent / file.name)
    return Exported(
        path=path,
        num_channels=None if len(counts) > 1 else counts[0],
        img_size=None if len(sizes) > 1 else sizes[0],
        fixed_because=because,
        checks=checks,
    )


def _for_channels(
    model: nn.Module, channels: ChannelSetLike | None
) -> tuple[nn.Module, tuple[int, ...]]:
    """A copy over the same weights, in evaluation mode, told its channels; the counts it takes."""
    if not has_stems(model):
        count = int(model.in_chans)  # type: ignore[arg-type]
        if channels is not None and len(ChannelSet.parse(channels)) != count:
            raise ValueError(
                f"The model takes {count} channels and has no stem for others, but the channels "
                f"are {ChannelSet.parse(channels)}. Export a dwg_ twin."
            )
        if model.training:
            raise ValueError("The model is in training mode. Call model.eval() first.")
        return model, (count,)
    current = stems(model)[0].channels
    if channels is None and isinstance(current, tuple):
        raise ValueError("The model is set to a mixed batch. Name one channel set to export.")
    model = share(model, current if channels is None else channels).eval()
    mixer = stems(model)[0]
    if isinstance(mixer.channels, ChannelSet) and len(mixer.channels):
        return model, (len(mixer.channels),)
    return model, CHECK_COUNTS if mixer.supports_anonymous else (len(mixer.default_channels),)


def _folded(model: nn.Module) -> nn.Module:
    """The model without its stems, where their coefficients depend on the channels alone."""
    channels = stems(model)[0].channels if has_stems(model) else None
    try:
        return fold(model, channels) if isinstance(channels, ChannelSet) else model
    except UserError:  # they depend on the image, or stand before no convolution
        return model


def _sizes(
    model: nn.Module, num_channels: int, img_size: int | None, dynamic: bool
) -> tuple[list[tuple[int, int]], str | None]:
    """The model's height and width, another one if it takes any, and why not if it does not."""
    height, width = get_model_input_config(model)["input_size"][-2:]
    if img_size is not None:
        height = width = img_size
    _try(model, num_channels, (height, width))
    if not dynamic:
        return [(height, width)], "As asked for"
    cause = ""
    for other in ((height + 32, width + 64), (2 * height, width)):
        try:
            _try(model, num_channels, other)
        except ValueError as error:
            cause = str(error).rstrip(".")
        else:
            return [(height, width), other], None
    return [(height, width)], cause


@torch.no_grad()
def _try(model: nn.Module, num_channels: int, size: tuple[int, int]) -> None:
    try:
        answer = model(_input(model, (1, num_channels, *size)))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"The backbone does not take {size[0]} x {size[1]} px: {_line(error)}"
        ) from error
    if not isinstance(answer, Tensor):
        raise ValueError(
            f"The model answers with a {type(answer).__name__}, and only models that answer with "
            f"one tensor can be exported: create it without features_only=True, or wrap it."
        )


def _line(error: BaseException) -> str:
    """The first line of an error, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_CAUSE_LENGTH]


def _input(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(like)


def _write(
    model: nn.Module,
    path: Path,
    counts: Sequence[int],
    sizes: Sequence[tuple[int, int]],
    metadata: str,
) -> None:
    """Export with the dynamic axes that are wanted."""
    num_channels = counts[0] if len(counts) == 1 else _EXAMPLE_CHANNELS
    example = _input(model, (_EXAMPLE_BATCH, num_channels, *sizes[-1]))
    axes: dict[int, Any] = {0: torch.export.Dim("batch")}
    if len(counts) > 1:
        axes[1] = torch.export.Dim("channels")
    if len(sizes) > 1:
        axes |= {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    try:
        if path.suffix == ".onnx":
            _write_onnx(model, example, axes, path, metadata)
        else:
            program = torch.export.export(model, (example,), dynamic_shapes=(axes,))
            torch.export.save(program, path, extra_files={"timm_varchan": metadata})
    except Exception as error:  # the exporters raise what the traced code raises
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter's own first lines are instructions
            cause = cause.__cause__
        raise RuntimeError(
            f"the model cannot be exported as {path.suffix} ({type(cause).__name__}: "
            f"{_line(cause)})"
        ) from error


def _write_onnx(
    model: nn.Module, example: Tensor, axes: dict[int, Any], path: Path, metadata: str
) -> None:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        dynamic_shapes=(axes,),
        input_names=["image"],
        output_names=["logits"],
        custom_translation_table={torch.ops.aten.linalg_vector_norm.default: _onnx_norm},
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["timm_varchan"] = metadata
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        for axis, name in ((2, "height"), (3, "width")):
            if value.shape is not None and axis < len(value.shape) and axis in axes:
                value.shape[axis] = name
    program.save(str(path))


def _onnx_norm(
    x: Any, ord: float = 2.0, dim: Sequence[int] = (), keepdim: bool = False, dtype: int = -1
) -> Any:
    """The norm of a plane in operators whose shapes onnxruntime can infer before int8.

    Its `quant_pre_process` fails at ReduceL2 with a TypeError.
    """
    op = importlib.import_module("onnxscript").opset18
    assert ord == 2.0, "the stem takes no other norm"
    return op.Sqrt(op.ReduceSum(op.Mul(x, x), list(dim), keepdims=keepdim))


def _checks(
    model: nn.Module, path: Path, counts: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> Iterator[Check]:
    """Compare the written file with the model: every count at every size, batches of 1 and 3."""
    with _running(model):
        answer = _reader(path)
    for batch, size in zip((1, 3), (sizes[0], sizes[-1]), strict=True):
        for num_channels in counts:
            x = _input(model, (batch, num_channels, *size))
            with torch.no_grad():
                expected = model(x)
                with _running(model):
                    actual = answer(x)
            difference = (actual.to(expected) - expected).abs().max().item()
            yield Check(tuple(x.shape), difference, expected.abs().max().item())


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """Errors of whatever runs the written file, which has exceptions of its own, in one line."""
    try:
        yield
    except Exception as error:
        dtype = next(model.parameters()).dtype
        raise RuntimeError(
            f"The exported file cannot be run ({type(error).__name__}: {_line(error)}); nothing "
            f"was written. Try the other format of {', '.join(FORMATS)}"
            + ("." if dtype == torch.float32 else f", or model.float(): its weights are {dtype}.")
        ) from error


def _reader(path: Path) -> Callable[[Tensor], Tensor]:
    """The written file as a function."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.cpu().numpy()})[0])

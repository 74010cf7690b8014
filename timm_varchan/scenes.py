"""A map of classes of a scene that does not fit into memory: windows with overlap, row by row.

Needs rasterio (`pip install 'timm-varchan[geo]'`). A window of `tile` pixels is classified every
`stride` pixels; each cell of `stride` pixels gets the mean of the probabilities of the windows that
cover it. In memory are one row of windows and the cells that it covers; what is done is kept beside
the output, so that a run that was stopped goes on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

import numpy as np
import torch
from torch import Tensor, nn

from timm_varchan.channels import ChannelSet
from timm_varchan.data import Reading, eval_transform, scale_values
from timm_varchan.data.decode import Planes
from timm_varchan.data.plane_names import PlaneNames, names_of
from timm_varchan.data.reading import fit
from timm_varchan.errors import ImageError, UserError
from timm_varchan.input_spec import InputSpec
from timm_varchan.models import has_stems
from timm_varchan.plots import class_colours, plot_classes
from timm_varchan.predict import FAR, for_channels, spec_for

__all__ = ["SceneRow", "predict_scene"]

logger = logging.getLogger(__name__)

#: A window of which more than this holds no data gets no answer, filled or not.
_MOST_MISSING = 0.5
#: Of decoded blocks that GDAL keeps; its own choice is a twentieth of the machine's memory.
_CACHE_MIB = 128
#: Metres of a degree of latitude.
_DEGREE_M = 111_320.0


@dataclass(frozen=True)
class SceneRow:
    """Progress: a row of windows.

    Args:
        done: Rows that are done.
        total: Rows in all.
        invalid_share: Fraction of the pixels of this row that hold no data.
        summary: Lines about the whole map, of the last row: ground size of a cell, area by class.
    """

    done: int
    total: int
    invalid_share: float
    summary: tuple[str, ...] = ()


class _Scene:
    """A raster file whose bands are a model's channels.

    Args:
        path: What rasterio opens: a file, an address, a file in an archive.
        spec: The channels, found by the bands' descriptions or wavelengths where these tell them;
            what is done about pixels without data.
        partial: Whether bands may be missing.

    Raises:
        UserError: No rasterio, a file that it does not open, other bands than the channels, numbers
            that are not real, a place that the map could not keep.
    """

    def __init__(self, path: str | Path, spec: InputSpec, partial: bool) -> None:
        try:
            import rasterio
        except ImportError as error:
            raise UserError(
                "Scenes are read by rasterio, which is not installed: pip install "
                "'timm-varchan[geo]'."
            ) from error
        self._environment = rasterio.Env(GDAL_CACHEMAX=_CACHE_MIB)
        try:
            with self._environment:
                self.file: Any = rasterio.open(path)
        except rasterio.errors.RasterioIOError as error:
            raise UserError(f"Cannot open the scene {path}: {error}.") from error
        self.height, self.width = self.file.height, self.file.width
        self.version: Any = (self.file.shape, self.file.dtypes)  # of an address nothing else tells
        if os.path.exists(path):
            self.version = (os.stat(path).st_size, os.stat(path).st_mtime_ns)
        self._check()
        self.bands, self.names, self.channels = self._find_bands(spec.channels, partial)
        self.keeps = spec.no_data == "keep"
        policy = "keep" if self.keeps else "mean"
        self.reading = Reading(replace(spec, channels=self.channels, no_data=policy))

    def _check(self) -> None:
        """Refuse what would come out as something else."""
        kinds = [kind.name for kind in self.file.colorinterp]
        inverted = self.file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
        unread = {"palette", "cyan", "magenta", "hue", "lightness", "Y"} & set(kinds)
        if inverted or unread:
            raise UserError(
                f"The colours of {self.file.name} are {'white-is-zero' if inverted else kinds}; "
                f"write it as bands or RGB."
            )
        if any("complex" in str(dtype) for dtype in self.file.dtypes):
            raise UserError(
                f"The numbers of {self.file.name} are complex ({self.file.dtypes[0]}). Write "
                f"amplitudes, or real and imaginary part as bands."
            )
        if self.file.rpcs is not None and self.file.transform.is_identity and not self.file.gcps[0]:
            raise UserError(
                f"{self.file.name} lies by rational polynomials (RPC), which a map of cells cannot "
                f"keep. Bring it to coordinates first: gdalwarp -rpc SCENE NEW."
            )

    def _find_bands(
        self, channels: ChannelSet, partial: bool
    ) -> tuple[list[int], PlaneNames, ChannelSet]:
        """Bands from 1 in the channels' order, what is said of them, and the channels."""
        kinds = [kind.name for kind in self.file.colorinterp]
        indexes = [i for i, kind in enumerate(kinds, start=1) if kind != "alpha"]
        tags_by_kind = {kind.lower(): {-1: text} for kind, text in self.file.tags().items()}
        for place, i in enumerate(indexes):
            tags = {**self.file.tags(i), **self.file.tags(i, ns="IMAGERY")}
            tags["description"] = self.file.descriptions[i - 1] or ""
            for kind, text in tags.items():
                tags_by_kind.setdefault(kind.lower(), {})[place] = text
        names = names_of(tags_by_kind, len(indexes))
        # its own numbers stand for the bands, so that they are fitted as an image's planes are
        numbers = np.asarray(indexes, np.float32)[:, None, None]
        try:
            found, taken = fit(Planes(numbers, names=names), channels, partial=partial)
        except ImageError as error:
            raise UserError(f"{self.file.name}: {error}.") from error
        bands = [int(band) for band in found.image[:, 0, 0]]
        factor, offset = (np.asarray(x, np.float32) for x in (self.file.scales, self.file.offsets))
        index = [band - 1 for band in bands]
        is_scaled = (factor[index] != 1).any() or (offset[index] != 0).any()
        scaling = (factor[index][:, None, None], offset[index][:, None, None])
        return bands, PlaneNames(scaling=scaling if is_scaled else None), taken

    def strip(self, top: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Rows of the scene, padded to a size, and where they hold no data (not the padding).

        Returns:
            Planes `(C, height, width)`, float32 or as stored; missing values `(height, width)`,
            bool.
        """
        inside = min(height, self.height - top)
        window = ((top, top + inside), (0, self.width))
        with self._environment:
            image = self.file.read(self.bands, window=window)
            masks = self.file.read_masks(self.bands, window=window) != 0
        if image.dtype.kind == "f":
            image = image.astype(np.float32, copy=False)
        planes = Planes(image, valid=None if masks.all() else masks, names=self.names)
        try:
            read, _ = self.reading.part(planes, may_be_empty=not self.keeps)
        except ImageError as error:
            raise UserError(f"{self.file.name}, rows from {top}: {error}.") from error
        missing = torch.zeros(height, width, dtype=torch.bool)
        if read.is_floating_point():
            missing[:inside, : self.width] = read.isnan().any(0)
        padded = (0, width - self.width, 0, height - inside)
        if any(padded):
            # beyond the scene there is the mean, which the transforms put for NaN
            read = nn.functional.pad(scale_values(read), padded, value=torch.nan)
        return read, missing

    def places(self, rows: np.ndarray, columns: np.ndarray) -> tuple[Any, Any]:
        """Coordinates x and y of places in pixels, by the transform or by ground control points."""
        from rasterio.transform import GCPTransformer

        points = self.file.gcps[0]
        if points:
            with GCPTransformer(points) as transformer:
                return transformer.xy(rows, columns, offset="ul")
        a, b, left, d, e, top = tuple(self.file.transform)[:6]
        return a * columns + b * rows + left, d * columns + e * rows + top


class _Partial:
    """Classes and probabilities of the rows that are done, kept beside the output.

    Args:
        output: The output.
        shape: Rows and columns of cells.
        fingerprint: Of everything that the answer depends on; other partial results are not used.
    """

    def __init__(self, output: Path, shape: tuple[int, int], fingerprint: str) -> None:
        self._numbers = output.with_name(output.name + ".part.npy")
        self._about = output.with_name(output.name + ".part.json")
        self._fingerprint, self.done = fingerprint, 0
        mode = "w+"
        if self._about.is_file() and self._numbers.is_file():
            about = json.loads(self._about.read_text(encoding="utf-8"))
            if about["fingerprint"] == fingerprint:
                mode, self.done = "r+", about["done"]
        self.cells: np.memmap[Any, Any] = np.lib.format.open_memmap(
            self._numbers, mode=mode, dtype=np.float32, shape=(2, *shape)
        )

    def write(self, row: int, classes: np.ndarray, probabilities: np.ndarray) -> None:
        """Keep a row of cells."""
        self.cells[0, row], self.cells[1, row] = classes, probabilities
        self.cells.flush()
        self.done = row + 1
        new = self._about.with_suffix(".new")
        new.write_text(json.dumps({"fingerprint": self._fingerprint, "done": self.done}))
        os.replace(new, self._about)

    def remove(self) -> None:
        """Take the files away."""
        self._numbers.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)


class _Grid(NamedTuple):
    """Cells and windows of a scene: a window covers `span` cells a side."""

    tile: int
    stride: int
    rows: int
    columns: int

    @property
    def span(self) -> int:
        """Cells that a window covers, a side."""
        return self.tile // self.stride

    @property
    def windows(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return max(1, self.rows - self.span + 1), max(1, self.columns - self.span + 1)


def predict_scene(
    model: nn.Module,
    scene: str | Path,
    output: str | Path,
    spec: InputSpec | None = None,
    *,
    tile: int | None = None,
    stride: int | None = None,
    min_probability: float = 0.0,
    batch_size: int = 64,
    **fields: Any,
) -> Iterator[SceneRow]:
    """Classify a scene in windows; iterate to the end, and the output is there.

    Args:
        model: A classifier; see `timm_varchan.predict.predict`.
        scene: A GeoTIFF, COG or whatever else rasterio opens.
        output: `.tif` for a raster of classes with the scene's georeference, colours and class
            names (numbers of classes, 255 or 65535 where there is no answer), with the
            probabilities in `NAME_probability.tif` and a picture in `NAME.png`; or `.csv` with a
            line a cell.
        spec: What the scene is like: channels with mean and deviation (the bands are found by their
            descriptions where these name them, else taken in order), image size, class names, and
            what is done about windows in which pixels hold no data: `refuse` gives no answer,
            `mean` and `predict` fill them where no more than half of the window is missing, `keep`
            takes the stored numbers.
        tile: Pixels a side of a window, resized to the image size, which is also the default.
        stride: Pixels between windows, a divisor of `tile`; half of it by default.
        min_probability: A cell whose likeliest class is below it gets no answer.
        batch_size: Windows at once.
        **fields: Fields of the `InputSpec` in place of its own, as `InputSpec.of` takes them.

    Yields:
        Progress, a row of windows each. A run that was stopped goes on where it was.

    Raises:
        UserError: No rasterio, a scene that cannot be read, other bands than the channels, values
            that are on another scale, a tile that is no multiple of the stride.
    """
    spec, output = spec_for(model, spec, fields), Path(output)
    wanted, img_size = spec.channels, spec.img_size
    if img_size is None:
        raise UserError("Nothing says the image size. Give img_size=, such as 64.")
    if output.suffix.lower() not in (".tif", ".tiff", ".csv"):
        raise UserError(f"The output is {output}; it must end in .tif or .csv.")
    for name in (output.name, f"{output.stem}_probability{output.suffix}", f"{output.stem}.png"):
        place, source = output.with_name(name), Path(str(scene))
        if place.exists() and source.exists() and place.samefile(source):
            raise UserError(f"The output {output} would be written over the scene: name another.")
    tile = tile or img_size
    stride = stride or max(1, tile // 2)
    if tile < 1 or stride < 1 or tile % stride:
        raise UserError(f"The tile is {tile} pixels, the stride {stride}; it must divide the tile.")
    opened = _Scene(scene, spec, partial=has_stems(model))
    if len(opened.channels) < len(wanted):
        logger.warning(
            "The scene has %d of the %d channels: %s.", len(opened.channels), len(wanted),
            opened.channels,
        )  # fmt: skip
    wanted = opened.channels
    grid = _Grid(tile, stride, -(-opened.height // stride), -(-opened.width // stride))
    transform = eval_transform(img_size, wanted, crop_pct=1.0, no_data=spec.no_data)
    ready = for_channels(model, wanted)
    about = (str(scene), opened.version, wanted.to_dict(), spec.to_dict(), grid, _digest(model))
    fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()
    partial = _Partial(output, (grid.rows, grid.columns), fingerprint)
    most = 0.0 if spec.no_data == "refuse" else _MOST_MISSING

    def classify(windows: Tensor, missing: Tensor) -> tuple[Tensor | None, np.ndarray]:
        places = (missing.float().mean((1, 2)) <= most).nonzero().flatten()
        parts = [
            _probabilities(ready, torch.stack([transform(windows[i]) for i in part]))
            for part in torch.split(places, batch_size)
            if len(part)
        ]
        return (torch.cat(parts) if parts else None), places.numpy()

    written = _Map(output, opened, grid, spec.class_names, min_probability)
    return _run(opened, grid, classify, partial, written)


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _probabilities(model: nn.Module, x: Tensor) -> Tensor:
    """`(N, classes)` of transformed windows; refuses what lies on another scale."""
    away = x.abs().mean().item()
    if away > FAR:
        raise UserError(
            f"The scene's values lie {away:,.0f} standard deviations from the model's means: "
            f"another scale. Say --value-scale."
        )
    with torch.inference_mode():
        return model(x.to(next(model.parameters()))).float().softmax(-1).cpu()


def _run(
    scene: _Scene,
    grid: _Grid,
    classify: Callable[[Tensor, Tensor], tuple[Tensor | None, np.ndarray]],
    partial: _Partial,
    written: _Map,
) -> Iterator[SceneRow]:
    """Row by row of windows; `total` and `covered` hold the cells that these can reach."""
    span, (num_rows, num_columns) = grid.span, grid.windows
    width = (num_columns - 1) * grid.stride + grid.tile
    covered = np.zeros((span, num_columns + span - 1), np.float32)
    total = np.zeros((*covered.shape, 0), np.float32)
    # Cells that are not done are also covered by windows above them.
    for row in range(max(0, partial.done - span + 1), num_rows):
        strip, missing = scene.strip(row * grid.stride, grid.tile, width)
        windows = strip.unfold(2, grid.tile, grid.stride).movedim(2, 0)
        found, places = classify(windows, missing.unfold(1, grid.tile, grid.stride).movedim(1, 0))
        if found is not None:
            if not total.shape[2]:
                total = np.zeros((*covered.shape, found.shape[1]), np.float32)
            for across in range(span):
                total[:, places + across] += found.numpy()
                covered[:, places + across] += 1
        for done in range(span if row == num_rows - 1 else 1):
            if partial.done <= row + done < grid.rows:
                _keep_row(partial, row + done, total[0, : grid.columns], covered[0, : grid.columns])
            for kept in (total, covered):
                kept[:-1], kept[-1] = kept[1:].copy(), 0
        summary = written.write(partial.cells) if row == num_rows - 1 else ()
        yield SceneRow(row + 1, num_rows, missing.float().mean().item(), summary)
    partial.remove()


def _keep_row(partial: _Partial, row: int, total: np.ndarray, covered: np.ndarray) -> None:
    """The likeliest class of each cell and its mean probability, NaN where no window answers."""
    is_covered = covered > 0
    classes = np.full(len(covered), np.nan, np.float32)
    probabilities = classes.copy()
    if is_covered.any():
        mean = total[is_covered] / covered[is_covered][:, None]
        classes[is_covered], probabilities[is_covered] = mean.argmax(1), mean.max(1)
    partial.write(row, classes, probabilities)


@dataclass(frozen=True)
class _Map:
    """What becomes of the cells.

    Args:
        output: The file.
        scene: Where they lie.
        grid: How many pixels they are.
        names: Of the classes; numbers without.
        min_probability: Below it there is no answer.
    """

    output: Path
    scene: _Scene
    grid: _Grid
    names: tuple[str, ...]
    min_probability: float

    def name(self, number: int) -> str:
        """What a class is called."""
        return self.names[number] if self.names else str(number)

    def write(self, cells: np.ndarray) -> tuple[str, ...]:
        """Write classes and probabilities `(2, rows, columns)`; lines that sum them up."""
        output, probabilities = self.output, np.asarray(cells[1])
        classes = np.where(probabilities >= self.min_probability, cells[0], np.nan)
        areas, lines = self._areas(classes)
        new = output.with_name(f".{output.stem}.new{output.suffix}")
        if output.suffix.lower() == ".csv":
            self._write_csv(new, classes, probabilities)
        else:
            is_wide = len(self.names) > 255 or np.nanmax(classes, initial=0) >= 255
            empty, dtype = (65535, np.uint16) if is_wide else (255, np.uint8)
            found = np.where(np.isnan(classes), empty, classes).astype(dtype)
            count = max(len(self.names), 1 + int(np.nanmax(classes, initial=0)))
            self._write_raster(new, found, empty, [self.name(i) for i in range(count)])
            beside = output.with_name(f"{output.stem}_probability{output.suffix}")
            self._write_raster(beside, probabilities, np.nan, [])
            legend = {i: f"{self.name(i)} {text}" for i, text in areas.items()}
            plot_classes(classes, legend, count, output.with_suffix(".png"))
        os.replace(new, output)
        return tuple(lines)

    def _areas(self, classes: np.ndarray) -> tuple[dict[int, str], list[str]]:
        """What is said of the area of every class that there is, the largest first; all lines."""
        size = self._ground_size()
        answers = classes[~np.isnan(classes)].astype(int)
        counts = np.bincount(answers)
        texts = {}
        for number in sorted(np.flatnonzero(counts).tolist(), key=lambda i: -counts[i]):
            area = "" if size is None else f", {counts[number] * size[0] * size[1] / 1e6:.4g} km2"
            texts[number] = f"{counts[number] / len(answers):.1%}{area}"
        side = f"{self.grid.stride} x {self.grid.stride} pixels"
        side += "" if size is None else f", {size[0]:.4g} x {size[1]:.4g} m"
        lines = [
            f"A cell is {side}; {classes.size - len(answers):,} of {classes.size:,} cells "
            f"have no answer."
        ]
        return texts, [*lines, *(f"  {self.name(i)}: {text}" for i, text in texts.items())]

    def _ground_size(self) -> tuple[float, float] | None:
        """Width and height of a cell in metres, in the middle of the scene; None: nobody knows."""
        file = self.scene.file
        if file.crs is None or file.gcps[0]:
            return None
        a, b, _, d, e, _ = tuple(file.transform)[:6]
        width, height = (self.grid.stride * math.hypot(*pair) for pair in ((a, d), (b, e)))
        if file.crs.is_projected:
            metres = file.crs.linear_units_factor[1]
            return width * metres, height * metres
        middle = self.scene.places(np.array([file.height / 2]), np.array([file.width / 2]))[1]
        return width * _DEGREE_M * math.cos(math.radians(float(middle[0]))), height * _DEGREE_M

    def _write_raster(
        self, path: Path, cells: np.ndarray, empty: float, names: Sequence[str]
    ) -> None:
        import rasterio
        from rasterio.control import GroundControlPoint

        file = self.scene.file
        a, b, left, d, e, top = tuple(file.transform)[:6]
        step = self.grid.stride
        points, crs = file.gcps
        place = {
            "crs": file.crs,
            "transform": rasterio.Affine(a * step, b * step, left, d * step, e * step, top),
        }
        if points:  # carried over to the cells
            cell_points = [
                GroundControlPoint(p.row / step, p.col / step, p.x, p.y, p.z, p.id, p.info)
                for p in points
            ]
            place = {"crs": crs, "gcps": cell_points}
        with rasterio.open(
            path, "w", driver="GTiff", count=1, height=self.grid.rows, width=self.grid.columns,
            dtype=cells.dtype, nodata=empty, compress="deflate", **place,
        ) as raster:  # fmt: skip
            if names:
                raster.update_tags(**{f"CLASS_{i}": name for i, name in enumerate(names)})
                colours = class_colours(len(names))
                table = {i: (*colour, 255) for i, colour in enumerate(colours)}
                raster.write_colormap(1, {**table, int(empty): (0, 0, 0, 0)})
            raster.write(cells, 1)
        if names:  # GDAL keeps the names of categories beside the file, whatever its final name
            written = "".join(f"<Category>{escape(name)}</Category>" for name in names)
            self.output.with_name(self.output.name + ".aux.xml").write_text(
                f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{written}</CategoryNames>'
                f"</PAMRasterBand></PAMDataset>\n",
                encoding="utf-8",
            )

    def _write_csv(self, path: Path, classes: np.ndarray, probabilities: np.ndarray) -> None:
        columns = np.arange(self.grid.columns)
        with open(path, "w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(("row", "column", "x", "y", "class", "probability"))
            for row in range(self.grid.rows):
                middle = np.full(len(columns), (row + 0.5) * self.grid.stride)
                x, y = self.scene.places(middle, (columns + 0.5) * self.grid.stride)
                for column, place in enumerate(zip(map(float, x), map(float, y), strict=True)):
                    number, probability = classes[row, column], probabilities[row, column]
                    name = "" if np.isnan(number) else self.name(int(number))
                    sure = "" if np.isnan(probability) else f"{probability:.4f}"
                    lines.writerow((row, column, *place, name, sure))

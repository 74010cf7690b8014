r"""Images a second that `timm_varchan.data` reads, against the plainest way to read the same bytes.

Images of 13 planes of 64 x 64 in 16 bits, made here, as `.npy` and TIFF in class folders and as
Parquet with the bytes of `.npy`. In every round each image is read once by an `ImageSplit` and once
by numpy or tifffile alone (Parquet: `datasets` without any decoding, then numpy), in one process on
one thread; the ratio of a round's times is the figure. Then the same through the augmentation of
training, and through torchvision's crop, flip, normalisation and rotation of the plain reader's
images.

    python bench/loading.py --output bench/results/0.1.0/loading.json
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tifffile
import torch
from arms_cli import machine, write_report
from tables import loading_table
from timing import Clock, interleave, ratios, spread
from torchvision.transforms import v2

from timm_varchan.data import TransformedSplit, load_data, train_transform

NUM_CHANNELS, PIXELS = 13, 64


def make_folder(
    root: Path, suffix: str, images: np.ndarray, compression: str | None = None
) -> list[Path]:
    """Class folders with one file an image; the files, sorted."""
    files = []
    for number, image in enumerate(images):
        file = root / "train" / f"class{number % 2}" / f"{number:05d}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".npy":
            np.save(file, image)
        else:
            tifffile.imwrite(file, image, photometric="minisblack", compression=compression)
        files.append(file)
    return sorted(files)


def npy_bytes(image: np.ndarray) -> bytes:
    """What `numpy.save` writes."""
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


def make_parquet(root: Path, images: np.ndarray) -> datasets.Dataset:
    """A Parquet file with the bytes of `.npy`, and its rows read by `datasets` alone."""
    root.mkdir()
    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    labels = [i % 2 for i in range(len(images))]
    columns = {"image": [npy_bytes(x) for x in images], "label": labels}
    file = root / "train.parquet"
    datasets.Dataset.from_dict(columns, features).to_parquet(str(file))
    return datasets.load_dataset("parquet", data_files=str(file), split="train")


def torchvisions() -> Callable[[np.ndarray], torch.Tensor]:
    """The same augmentation, put together from torchvision's transforms."""
    steps = v2.Compose([
        v2.RandomResizedCrop(PIXELS, scale=(0.35, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.Normalize([0.1] * NUM_CHANNELS, [0.1] * NUM_CHANNELS),
        v2.RandomRotation(15, interpolation=v2.InterpolationMode.BILINEAR),
    ])  # fmt: skip
    return lambda image: steps(torch.from_numpy(image).to(torch.float32) / 65535)


def both(read: Callable[[Any], np.ndarray], steps: Callable[[Any], object], item: Any) -> object:
    """Read one image and transform it."""
    return steps(read(item))


def read_all(read: Callable[[Any], object], items: Iterable[Any]) -> None:
    """Read every image once."""
    for item in items:
        read(item)


def measure(folder: Path, num_images: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each format."""
    shape = (num_images, NUM_CHANNELS, PIXELS, PIXELS)
    images = np.random.default_rng(0).integers(0, 10_000, shape, np.uint16)
    npy, tif = (make_folder(folder / s[1:], s, images) for s in (".npy", ".tif"))
    packed = make_folder(folder / "deflate", ".tif", images // 64 * 64, "deflate")
    parquet = make_parquet(folder / "parquet", images)
    numbers = range(num_images)
    plain: dict[str, tuple[str, Callable[[Any], np.ndarray], Iterable[Any]]] = {
        ".npy files": ("npy", np.load, npy),
        "TIFF files": ("tif", tifffile.imread, tif),
        "TIFF files, deflate": ("deflate", tifffile.imread, packed),
        "Parquet, bytes of .npy": (
            "parquet", lambda i: np.load(io.BytesIO(parquet[i]["image"])), numbers
        ),
    }  # fmt: skip
    steps_of_torchvision = torchvisions()
    rows = []
    for name, (source, read, items) in plain.items():
        data = load_data(str(folder / source))
        split = data.train
        assert split is not None
        same = sorted(x.numpy().tobytes() for x, _ in split)
        assert same == sorted(np.ascontiguousarray(read(item)).tobytes() for item in items)
        channels = data.channels.with_stats([0.1] * NUM_CHANNELS, [0.1] * NUM_CHANNELS)
        augmented = TransformedSplit(split, train_transform(PIXELS, channels))
        steps = interleave(
            {
                "ours": partial(read_all, split.__getitem__, numbers),
                "plain": partial(read_all, read, items),
                "augmented": partial(read_all, augmented.__getitem__, numbers),
                "torchvision": partial(read_all, partial(both, read, steps_of_torchvision), items),
            },
            Clock(torch.device("cpu")), rounds=rounds, warmup=1,
        )  # fmt: skip
        rows.append({
            "format": name,
            "images_per_second": {k: spread([num_images / s for s in v]) for k, v in steps.items()},
            # of the plain speed: the plain reader's time over ours
            "of_plain": ratios({"plain": steps["plain"], "ours": steps["ours"]})["ours"],
            "of_torchvision": ratios(
                {"plain": steps["torchvision"], "ours": steps["augmented"]}
            )["ours"],
        })  # fmt: skip
    return rows


def main() -> None:
    """Make the images, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--machine", default="one thread", help="in words")
    parser.add_argument("--output", type=Path, required=True, help="file; the table beside it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.num_images, args.rounds)
    summary = {"settings": {"num_images": args.num_images, "rounds": args.rounds},
               "machine": machine(args), "rows": rows}  # fmt: skip
    write_report(args.output, summary, loading_table(summary))


if __name__ == "__main__":
    main()

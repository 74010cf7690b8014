"""The command that rebuilds the 50-class subset, on a made-up miniature of the public data."""

import io
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import tiny_imagenet as tiny  # noqa: E402

WNIDS = ["n01", "n02", "n03", "n04"]
CLASSES = ["n01_fish", "n03_goose"]


def encoded(seed, quality=75):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def table(rows):
    columns = {"image": [{"bytes": b, "path": p} for b, p, _ in rows],
               "label": [label for *_, label in rows]}  # fmt: skip
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=WNIDS)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def source(*, names=True, quality=75):
    """Four classes of 12 training and 4 validation images, as the hub has them."""
    train = [(encoded(100 * k + i, quality), f"{WNIDS[k]}_{i}.JPEG" if names else None, k)
             for k in range(4) for i in range(12)]  # fmt: skip
    valid = [(encoded(5000 + 4 * k + i, quality), f"val_{4 * k + i}.JPEG" if names else None, k)
             for i in range(4) for k in range(4)]  # fmt: skip
    return {"train": table(train), "valid": table(valid)}


@pytest.fixture
def plan():
    """Classes 0 and 2, and two validation images of each."""
    rows = [(encoded(100 * k + i), f"{WNIDS[k]}_{i}.JPEG") for k in (0, 2) for i in range(12)]
    rows.sort(key=lambda row: row[1])
    random.Random(0).shuffle(rows)
    digests = [tiny.digest(b) for b, _ in rows]
    classes = {
        name: " ".join(f"{n}:{tiny.digest(encoded(5000 + n))[:8]}" for n in numbers)
        for name, numbers in zip(CLASSES, ((1, 3), (8, 11)), strict=True)
    }
    return {"classes": classes, "train_digest": tiny.digest_all(digests),
            "train_set_digest": tiny.digest_all(sorted(digests))}  # fmt: skip


def read(folder):
    files = {s: str(folder / f"{s}.parquet") for s in ("train", "validation")}
    return datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("names", [True, False])
def test_the_subset_is_rebuilt_by_names_or_by_content(names, plan, tmp_path):
    same = tiny.rebuild(source(names=names), tmp_path, plan)
    assert same["training images"]
    assert same["validation images"]
    data = read(tmp_path)
    assert data["train"].features["label"].names == CLASSES
    assert data["train"].num_rows == 24
    assert data["validation"]["label"][:] == [0, 0, 1, 1]
    assert data["validation"][2]["image"].size == (8, 8)
    if names:  # without them the order is another one, which is said
        assert same["order of the training images"]
        files = sorted(f"{w}_{i}.JPEG" for w in ("n01", "n03") for i in range(12))
        random.Random(0).shuffle(files)
        stored = data["train"].cast_column("image", datasets.Image(decode=False))
        assert [row["image"]["path"] for row in stored] == files
        assert data["train"]["label"][:] == [0 if file.startswith("n01") else 1 for file in files]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("valid"), r"splits train and validation, not \['train'\]"),
        (lambda s: s.update(train=s["train"].rename_column("label", "y")), "columns image and"),
        (lambda s: s.update(valid=s["valid"].select(range(4))), "3 validation images are not in"),
        (lambda s: s.update(train=s["train"].cast_column(
            "label", datasets.ClassLabel(names=["a", "b", "c", "d"]))),
         r"lacks 2 of 2 classes, such as n01_fish"),
    ],
)  # fmt: skip
def test_a_source_that_lacks_something_is_refused(plan, tmp_path, change, message):
    given = source()
    change(given)
    with pytest.raises(ValueError, match=message):
        tiny.rebuild(given, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


def test_the_command_says_whether_all_is_the_same(plan, tmp_path, monkeypatch, capsys):
    datasets.DatasetDict(source(quality=40)).save_to_disk(tmp_path / "public")
    monkeypatch.setattr(tiny.rebuild, "__defaults__", (plan,))
    argv = ["tiny_imagenet.py", f"--source={tmp_path / 'public'}", f"--output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        tiny.main()
    assert stop.value.code == 3
    assert "validation images: NOT the same" in capsys.readouterr().out
    assert read(tmp_path / "out")["validation"].num_rows == 4, "recognised by their names"
    datasets.DatasetDict(source()).save_to_disk(tmp_path / "right")
    argv[1] = f"--source={tmp_path / 'right'}"
    tiny.main()
    assert "order of the training images: the same" in capsys.readouterr().out

"""Predictions of real files, also by the command."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import timm
import torch
from conftest import randomise
from PIL import Image

import timm_varchan
from timm_varchan import RGB, ChannelSet, hub
from timm_varchan.__main__ import main
from timm_varchan.data import eval_transform, read_image
from timm_varchan.predict import find_images, missing_channels, predict, write_table

NAMES = ("ant", "bee", "cow")
BANDS = ChannelSet.parse("B02+B03+B04+B08").with_stats([0.1] * 4, [0.2] * 4)


@pytest.fixture
def model():
    return randomise(timm.create_model("dwg_test_resnet", num_classes=3).eval())


@pytest.fixture
def images(tmp_path):
    """One image a format, an unreadable one and a text file, in a folder."""
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels).save(folder / "b.JPG", format="JPEG")
    tifffile.imwrite(folder / "c.tif", pixels.astype(np.uint16) * 257, photometric="rgb")
    np.save(folder / "below" / "d.npy", pixels.astype(np.float32) / 255)
    (folder / "e.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("no image either")
    return folder


@pytest.fixture
def saved(model, tmp_path):
    return hub.save(
        model, tmp_path / "m", class_names=NAMES, channels=RGB, img_size=64, crop_pct=1.0
    )


def test_every_format_and_an_unreadable_file(model, images):
    files = find_images([images])
    assert [file.name for file in files] == ["a.png", "b.JPG", "d.npy", "c.tif", "e.png"]
    options = {"channels": RGB, "img_size": 64, "class_names": NAMES, "top": 2}
    found = {p.file.name: p for p in predict(model, files, **options, batch_size=2)}
    assert found["e.png"].error == "it is no image"
    assert found["e.png"].classes == ()
    x = eval_transform(64, RGB, crop_pct=1.0)(read_image(images / "a.png", RGB))
    expected = model(x[None])[0].softmax(0).topk(2)
    assert [name for name, _ in found["a.png"].classes] == [NAMES[i] for i in expected.indices]
    values = [value for _, value in found["a.png"].classes]
    assert values == pytest.approx(expected.values.tolist(), rel=1e-4)
    for other in ("c.tif", "d.npy"):  # the same values in 16 bits and in floats
        assert found[other].classes[0][1] == pytest.approx(values[0], rel=1e-3)


def test_channels_are_told_to_a_copy(model, tmp_path):
    file = tmp_path / "s2.tif"
    tifffile.imwrite(file, np.ones((4, 64, 64), np.uint16) * 3000, photometric="minisblack")
    options = {"channels": BANDS, "img_size": 64, "value_scale": 10000}
    (one,) = predict(model, [file], **options)
    x = (torch.full((1, 4, 64, 64), 0.3) - 0.1) / 0.2
    expected = timm_varchan.share(model, BANDS)(x)[0].softmax(0)
    assert one.classes[0][0] == str(expected.argmax().item())
    assert one.classes[0][1] == pytest.approx(expected.max().item(), rel=1e-4)
    assert timm_varchan.models.stems(model)[0].channels is None


def test_anonymous_files_of_different_counts(model, tmp_path):
    files = [tmp_path / f"{n}.npy" for n in (1, 5, 2, 5)]
    for n, file in zip((1, 5, 2, 5), files, strict=True):
        np.save(file, np.random.default_rng(n).random((n, 40, 40), dtype=np.float32))
    options = {"channels": "anonymous", "img_size": 32, "mean": [0.5], "std": [0.25]}
    together = list(predict(model, files, **options, batch_size=4))
    alone = [next(predict(model, [file], **options)) for file in files]
    for a, b in zip(together, alone, strict=True):
        assert a.error is None
        assert a.classes[0][1] == pytest.approx(b.classes[0][1], rel=1e-4)


def test_a_table_names_a_class_only_where_the_model_is_sure(model, images, tmp_path):
    options = {"channels": RGB, "img_size": 64, "class_names": NAMES}
    files = find_images([images])
    known = {p.file.name: p.classes[0] for p in predict(model, files, **options) if p.classes}
    limit = known["a.png"][1] + 1e-6
    found = predict(model, files, **options, min_probability=limit)
    assert len(list(write_table(found, tmp_path / "table.csv"))) == len(files)
    lines = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [line["file"] for line in lines] == [str(file) for file in files]
    for line in lines:
        name, probability = known.get(Path(line["file"]).name, ("", math.nan))
        if not name:
            assert (line["class"], line["note"]) == ("", "it is no image")
            continue
        assert float(line["probability"]) == pytest.approx(probability, abs=1e-4)
        expected = (name, "") if probability >= limit else ("", f"not sure: {name}")
        assert (line["class"], line["note"]) == expected


def test_missing_channels_are_told_in_words():
    correlation = np.eye(3)
    correlation[:2, :2] = [[1, 0.8], [0.8, 1]]
    bands = replace(
        ChannelSet.parse("B02+B03+B8A").with_stats([0.1] * 3, [0.2] * 3), correlation=correlation
    )
    model = timm_varchan.adapt(
        timm.create_model("test_resnet", in_chans=3), virtual_channels=bands, channel_stats=bands
    )
    assert missing_channels(model, bands) is None
    text = missing_channels(model, bands.take((0,)))
    told = {name: int(part) for part, name in re.findall(r"(\d+)% of what (\w+) would", text)}
    assert told["B03"] == pytest.approx(64, abs=2)
    assert told["B8A"] < 10
    assert missing_channels(timm.create_model("test_resnet"), bands) is None


def test_refusals(model, tmp_path):
    good = {"channels": RGB, "img_size": 32}
    for wrong, text in (
        ({"class_names": ["a"]}, "1 class names came for 3"),
        ({"top": 0}, "at least 1"),
        ({"channels": "B02+B08"}, "no mean and std for the channels B02, B08.*--mean"),
        ({"mean": [0.5]}, "Only one of mean and std"),
        ({"mean": [0.5, 0.5], "std": [0.5, 0.5]}, "3 channels, but 2 means"),
    ):
        with pytest.raises(ValueError, match=text):
            predict(model, ["x.png"], **{**good, **wrong})
    with pytest.raises(ValueError, match="has no stem for others"):
        predict(timm.create_model("test_resnet"), ["x.png"], channels=BANDS, img_size=32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images below"):
        find_images([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no files"):
        find_images([])
    np.save(tmp_path / "nan.npy", np.full((3, 32, 32), np.nan, np.float32))
    np.save(tmp_path / "large.npy", np.full((3, 32, 32), 3e38, np.float32))
    files = [tmp_path / f"{name}" for name in ("missing.png", "nan.npy", "large.npy")]
    missing, not_finite, large = predict(model, files, **good)
    assert large.error == "its values are so large that the answer is not finite"
    assert missing.error == "there is no such file"
    assert not_finite.error == "100.0% of its values hold no data (they are not finite)"


def test_command_with_json(saved, images, capsys):
    assert main(["predict", str(saved), str(images), "--json"]) == 3
    shown = capsys.readouterr()
    assert "1 of 5 files could not be read" in shown.err
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert len(lines) == 5
    assert {c["name"] for c in lines[0]["classes"]} == set(NAMES)
    assert [bool(line["error"]) for line in lines].count(True) == 1


def test_command(saved, images, capsys):
    gray = images / "gray.png"
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(gray)
    assert main(["predict", str(saved), str(gray), "--channels", "G", "--top", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{gray}  ")
    assert shown.out.count("%") == 1
    assert "file" not in shown.err, "a progress bar for one file"
    assert re.findall(r"\d+% of what (\w) would", shown.err) == ["R", "B"], "what is missing"
    assert main(["predict", str(saved), str(images / "a.png")]) == 0
    assert not capsys.readouterr().err, "nothing is missing"
    assert main(["predict", str(images), str(gray)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_all_files_share_is_said_once(saved, tmp_path, capsys):
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", np.zeros((5, 40 + number, 40), np.float32))
    assert main(["predict", str(saved), str(tmp_path)]) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if "not" in line]
    assert len(lines) == 2
    assert re.search(
        r"0\.npy: not read, it has 5 planes.*7 more files likewise: .*1\.npy", lines[0]
    )


def test_the_command_takes_anonymous_for_a_channel_set(saved, tmp_path, capsys):
    np.save(tmp_path / "five.npy", np.random.default_rng(0).random((5, 40, 40), np.float32))
    words = ["predict", str(saved), str(tmp_path / "five.npy"), "--channels", "anonymous"]
    assert main([*words, "--mean", "0.5", "--std", "0.3"]) == 0
    assert capsys.readouterr().out.count("%") == 3

"""Scenes in windows: the same answers as window by window, in any format, also after a stop."""

import csv
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch
from conftest import randomise

import timm_varchan
from timm_varchan import ChannelSet, hub
from timm_varchan.__main__ import main
from timm_varchan.data import eval_transform, load_data, read_image
from timm_varchan.data.decode import decode
from timm_varchan.errors import UserError
from timm_varchan.scenes import predict_scene

rasterio = pytest.importorskip("rasterio", reason="pip install 'timm-varchan[geo]'")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
BANDS = ChannelSet.parse("B02+B03+B04+B08").with_stats([0.15] * 4, [0.1] * 4)
OPTIONS = {"channels": BANDS, "img_size": 32, "value_scale": 10000.0}


@pytest.fixture
def model():
    return randomise(timm.create_model("dwg_test_resnet", num_classes=3).eval())


def write(path, array, descriptions=(), no_data=None, scales=None, mask=None, **options):
    count, height, width = array.shape
    profile = {
        "driver": "GTiff", "count": count, "height": height, "width": width, "dtype": array.dtype,
        "crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 400000, 0, -10, 5400000),
        "nodata": no_data, "photometric": "minisblack",
    }  # fmt: skip
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", **{**profile, **options}) as file,
    ):
        file.write(array)
        for number, text in enumerate(descriptions, start=1):
            file.set_band_description(number, text)
        if scales is not None:
            file.scales, file.offsets = (
                [scales[0]] * count,
                [scales[1]] * count,
            )
        if mask is not None:
            file.write_mask(mask)
    return path


def scene(height=150, width=117, count=4, seed=0):
    return np.random.default_rng(seed).integers(0, 3000, (count, height, width)).astype(np.uint16)


def expected(model, array, tile, stride, img_size=32):
    """Every cell's mean probability, the plain way."""
    _, height, width = array.shape
    rows, columns, span = -(-height // stride), -(-width // stride), tile // stride
    total, covered = (
        np.zeros((rows + span, columns + span, 3)),
        np.zeros((rows + span, columns + span)),
    )
    told = timm_varchan.share(model, BANDS)
    transform = eval_transform(img_size, BANDS, crop_pct=1.0)
    for r in range(max(1, rows - span + 1)):
        for c in range(max(1, columns - span + 1)):
            window = np.full((4, tile, tile), np.nan, np.float32)
            part = array[:, r * stride : r * stride + tile, c * stride : c * stride + tile]
            window[:, : part.shape[1], : part.shape[2]] = part.astype(np.float32) / 10000
            with torch.no_grad():
                found = told(transform(torch.from_numpy(window))[None])[0].softmax(0).numpy()
            total[r : r + span, c : c + span] += found
            covered[r : r + span, c : c + span] += 1
    return total[:rows, :columns] / covered[:rows, :columns, None]


@pytest.mark.parametrize(("tile", "stride"), [(48, 16), (32, 32), (200, 100)])
def test_windows_of_a_scene_are_those_of_the_images(model, tmp_path, tile, stride):
    array = scene()
    path = write(tmp_path / "s.tif", array, tiled=True, blockxsize=64, blockysize=64)
    output = tmp_path / "classes.tif"
    rows = list(predict_scene(model, path, output, tile=tile, stride=stride, batch_size=7,
                              class_names=["a", "b", "c"], **OPTIONS))  # fmt: skip
    wanted = expected(model, array, tile, stride)
    assert rows[-1].done == rows[-1].total == len(rows)
    with (
        rasterio.open(output) as file,
        rasterio.open(tmp_path / "classes_probability.tif") as other,
    ):
        assert np.array_equal(file.read(1), wanted.argmax(-1))
        np.testing.assert_allclose(other.read(1), wanted.max(-1), rtol=1e-4)
        assert file.crs == "EPSG:32633"
        assert file.transform == rasterio.Affine(10 * stride, 0, 400000, 0, -10 * stride, 5400000)
        assert file.tags()["CLASS_1"] == "b"
        colours = file.colormap(1)
        assert len({colours[i] for i in range(3)}) == 3
        assert colours[255][3] == 0, "no answer is transparent"
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "classes.png", "classes.tif", "classes.tif.aux.xml", "classes_probability.tif", "s.tif"
    ]  # fmt: skip
    names = ElementTree.parse(tmp_path / "classes.tif.aux.xml").iter("Category")
    assert [one.text for one in names] == ["a", "b", "c"]
    cell, *areas = rows[-1].summary
    assert f"{10 * stride} x {10 * stride} m" in cell
    counts = np.bincount(wanted.argmax(-1).flatten())
    for line in areas:
        name, _, area = line.strip().partition(": ")
        count = counts["abc".index(name)]
        assert f"{count / counts.sum():.1%}, {count * stride**2 / 1e4:.4g} km2" == area


def test_cells_that_are_not_sure_get_no_answer(model, tmp_path):
    path = write(tmp_path / "s.tif", scene(64, 96))
    options = {**OPTIONS, "tile": 32, "stride": 32}
    all_of = list(predict_scene(model, path, tmp_path / "all.csv", **options))
    lines = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    limit = sorted(float(line["probability"]) for line in lines)[2] - 5e-5  # of four digits
    rows = list(predict_scene(model, path, tmp_path / "sure.csv", min_probability=limit, **options))
    sure = list(csv.DictReader((tmp_path / "sure.csv").read_text().splitlines()))
    assert [bool(line["class"]) for line in sure] == [
        float(line["probability"]) >= limit for line in lines
    ]
    assert "0 of 6 cells have no answer" in all_of[-1].summary[0]
    assert "2 of 6 cells have no answer" in rows[-1].summary[0]


def test_degrees_are_told_in_metres_too(model, tmp_path):
    place = {"crs": "EPSG:4326", "transform": rasterio.Affine(1e-4, 0, 10, 0, -1e-4, 60)}
    path = write(tmp_path / "s.tif", scene(64, 64), **place)
    *_, last = predict_scene(model, path, tmp_path / "o.csv", tile=32, stride=32, **OPTIONS)
    width, height = (float(n) for n in re.findall(r"([\d.]+) x ([\d.]+) m", last.summary[0])[0])
    assert height == pytest.approx(32 * 11.132, rel=0.01)
    assert width == pytest.approx(height / 2, rel=0.01), "60 degrees north"


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_stopped_run_goes_on(model, tmp_path, stop_after):
    path = write(tmp_path / "s.tif", scene(90, 70))
    options = {**OPTIONS, "tile": 32, "stride": 8}
    whole, halved = tmp_path / "whole.csv", tmp_path / "halved.csv"
    total = len(list(predict_scene(model, path, whole, **options)))
    stopped = predict_scene(model, path, halved, **options)
    for _ in range(stop_after):
        next(stopped)
    stopped.close()
    assert not halved.exists()
    rest = list(predict_scene(model, path, halved, **options))
    assert len(rest) <= total - stop_after + 3  # the windows above are computed again
    assert halved.read_text() == whole.read_text()
    for _ in predict_scene(model, path, halved, **options):  # whatever was left of other options
        break
    other = list(predict_scene(model, path, halved, **{**options, "stride": 16}))
    assert other[0].done == 1


def test_bands_are_found_by_their_descriptions(model, tmp_path):
    array = scene(64, 64)
    names = ["B08", "B02", "B11", "B04", "B03"]
    order = [1, 4, 3, 0]
    five = scene(64, 64, 5, seed=1)
    for position, index in enumerate(order):
        five[index] = array[position]
    plain, named = tmp_path / "plain.csv", tmp_path / "named.csv"
    list(predict_scene(model, write(tmp_path / "a.tif", array), plain, **OPTIONS))
    list(predict_scene(model, write(tmp_path / "b.tif", five, names), named, **OPTIONS))
    assert named.read_text() == plain.read_text()
    lines = list(csv.DictReader(named.read_text().splitlines()))
    assert (lines[0]["x"], lines[0]["y"]) == ("400080.0", "5399920.0")
    with pytest.raises(UserError, match=r"has 5 planes, but the channels are"):
        list(predict_scene(model, write(tmp_path / "c.tif", five), plain, **OPTIONS))
    without = write(tmp_path / "d.tif", array, ["B02", "B03", "B04", "B11"])
    list(predict_scene(model, without, plain, **OPTIONS))  # a subset is taken
    three = BANDS.take([0, 1, 2])
    list(
        predict_scene(
            model, write(tmp_path / "e.tif", array[:3]), named, **{**OPTIONS, "channels": three}
        )
    )
    assert plain.read_text() == named.read_text()


@pytest.mark.parametrize("how", ["tag", "mask", "nan"])
def test_windows_without_data_get_no_answer_or_are_filled(model, tmp_path, how):
    array = scene(64, 96)
    hole = np.zeros((64, 96), bool)
    hole[:, :40] = True
    if how == "tag":
        array[:, hole] = 65535
        path = write(tmp_path / "s.tif", array, no_data=65535)
    elif how == "mask":
        path = write(tmp_path / "s.tif", array, mask=~hole)
    else:
        array = array.astype(np.float32)
        array[:, hole] = np.nan
        path = write(tmp_path / "s.tif", array)
    options = {**OPTIONS, "tile": 32, "stride": 32}
    answers = {}
    for policy in ("refuse", "mean"):
        output = tmp_path / f"{policy}.tif"
        rows = list(predict_scene(model, path, output, no_data=policy, **options))
        assert rows[0].invalid_share == pytest.approx(40 / 96)
        with rasterio.open(output) as file:
            assert file.nodata == 255
            answers[policy] = file.read(1)
    assert (answers["refuse"] == 255).tolist() == [[True, True, False]] * 2
    assert (answers["mean"] == 255).tolist() == [[True, False, False]] * 2
    assert np.array_equal(answers["mean"][:, 2], answers["refuse"][:, 2])


def test_other_scales_and_colours_are_refused(model, tmp_path):
    path = write(tmp_path / "s.tif", scene(64, 64).astype(np.float32))
    with pytest.raises(UserError, match=r"another scale.*--value-scale"):
        list(predict_scene(model, path, tmp_path / "o.csv", channels=BANDS, img_size=32))
    white = write(tmp_path / "w.tif", scene(64, 64, 1).astype(np.uint8), photometric="miniswhite")
    one = ChannelSet.parse("G").with_stats([0.5], [0.2])
    with pytest.raises(UserError, match="colours"):
        list(predict_scene(model, white, tmp_path / "o.csv", channels=one, img_size=32))
    for wrong, text in (
        ({"tile": 30, "stride": 16}, "must divide"), ({"output": "o.png"}, r"\.tif or \.csv"),
        ({"scene": tmp_path / "none.tif"}, "Cannot open the scene"),
    ):  # fmt: skip
        arguments = {"scene": path, "output": tmp_path / "o.csv", **OPTIONS, **wrong}
        with pytest.raises(UserError, match=text):
            list(predict_scene(model, **arguments))


def test_files_of_rasterio_are_read_as_rasterio_reads_them(tmp_path):
    array = scene(40, 50)
    hole = np.zeros((40, 50), bool)
    hole[5:9] = True
    path = write(
        tmp_path / "s.tif", array, ["blue", "green", "red", "nir"], scales=(1e-4, -0.1), mask=~hole,
        compress="lzw", predictor=2, interleave="band", tiled=True, blockxsize=32, blockysize=16,
    )  # fmt: skip
    planes = decode(path.read_bytes())
    assert [c.name for c in planes.labels] == ["B", "G", "R", "NIR"]
    assert np.array_equal(np.broadcast_to(planes.valid, array.shape)[0], ~hole)
    found = read_image(path, "B+G+R+NIR", no_data="mean").numpy()
    np.testing.assert_allclose(found[:, ~hole], array[:, ~hole] * 1e-4 - 0.1, atol=1e-6)
    assert np.isnan(found[:, hole]).all()
    with pytest.raises(UserError, match="scales its numbers itself"):
        read_image(path, "B+G+R+NIR", no_data="mean", value_scale=10000)
    other = read_image(path, "R+G+B+NIR", no_data="mean").numpy()
    np.testing.assert_array_equal(other, found[[2, 1, 0, 3]])
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.tif").write_bytes(path.read_bytes())
    assert load_data(str(tmp_path / "data"), no_data="mean").channels.names == (
        "B",
        "G",
        "R",
        "NIR",
    )


@pytest.mark.parametrize("driver", ["GTiff", "COG"])
@pytest.mark.parametrize("compress", ["deflate", "lzw", "zstd", "packbits", "lerc", "none"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_gdals_options(tmp_path, driver, compress, dtype):
    array = scene(70, 90, 5).astype(dtype)
    options = {"driver": driver, "compress": compress}
    if driver == "GTiff":
        options |= {"interleave": "pixel", "bigtiff": "yes"}
    else:
        options |= {"overview_count": 2, "blocksize": 128, "photometric": None}
    path = write(tmp_path / "s.tif", array, **{k: v for k, v in options.items() if v})
    np.testing.assert_array_equal(decode(path.read_bytes()).image, array)


def test_the_command(model, tmp_path, capsys):
    saved = hub.save(
        model, tmp_path / "m", class_names=["a", "b", "c"], channels=BANDS, img_size=32,
        value_scale=10000.0,
    )  # fmt: skip
    path = write(tmp_path / "s.tif", scene(64, 64))
    args = ["predict", str(saved), str(path), "--output", str(tmp_path / "o.csv"), "--tile", "32"]
    assert main(args) == 0
    assert "0.0% of the pixels hold no data" in capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
    assert len(lines) == 16
    assert {line["class"] for line in lines} <= {"a", "b", "c"}
    assert main([*args, "--stride", "20"]) == 1
    assert "must divide" in capsys.readouterr().err

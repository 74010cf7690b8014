"""One record an image: its planes and their scale, equal images, and what a preview says of all."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tifffile
import torch
from PIL import Image
from trees import bands, grow, names_of, numbers_in, picture, png_bytes

from timm_varchan import Channel, ChannelSet
from timm_varchan.channels import RGB
from timm_varchan.data import (
    TransformedSplit,
    eval_transform,
    load_data,
    load_fingerprints,
    measure_split,
    preview_data,
    save_fingerprints,
    train_transform,
    unseen,
)
from timm_varchan.data.preview import order_problem
from timm_varchan.errors import UserError
from timm_varchan.views import DrawKey, draw_channels

CLASSES = ("forest", "river")


# Files of a channel -------------------------------------------------------------------------------


def write_plane(path, value, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, np.full((size, size), value, np.uint16))


#: Layouts by the name of a file: class, image, channel, and how large it is.
LAYOUTS = {
    "{c}/A0{i}_s1_w{k}.tif": (("w1", "w2", "w3"), {}),
    "{c}/r01c0{i}f01p01-ch{k}sk1fk1fl1.tiff": (("ch1", "ch2", "ch3"), {}),
    "{c}/X_B03_T0001F00{i}L01A01Z01C0{k}.tif": (("C01", "C02", "C03"), {}),
    "{c}/T33_{i}_B0{k}_{k}0m.tif": (("B01", "B02", "B03"), {2: 4, 3: 2}),
    "{c}/scene {i}/B0{k}.tif": (("B01", "B02", "B03"), {}),
    "{c}/LC08_{i}_B{k}.TIF": (("L8_B1", "L8_B2", "L8_B3"), {}),
}


def layout(root, name, count=4):
    for at, c in enumerate(CLASSES):
        for i in range(count):
            for k in (1, 2, 3):
                size = LAYOUTS[name][1].get(k, 8)
                write_plane(root / name.format(c=c, i=i, k=k), 100 * k + 10 * at + i, size)
    return str(root)


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_a_channel_are_one_image(tmp_path, caplog, name):
    with caplog.at_level(logging.WARNING):
        data = load_data(layout(tmp_path, name), validation_fraction=0.25)
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert data.channels.names == LAYOUTS[name][0]
    for split in (data.train, data.validation):
        for image, label in split:  # a plane of each file of the same image, the finest size
            values = image[:, 0, 0].int() - torch.tensor([100, 200, 300])
            assert image.shape == (3, 8, 8)
            assert len(set(values.tolist())) == 1
            assert values[0] // 10 == label
    assert "24 files are the planes of 8 images" in caplog.text
    assert ("brought to the finest" in caplog.text) == bool(LAYOUTS[name][1])
    assert any("one file a channel" in note for note in data.notes)


def test_a_pattern_says_which_files_are_an_image(tmp_path):
    for c in CLASSES:
        for place, size in (("R10m", 8), ("R20m", 4)):
            for k in ("B02", "B8A") if place == "R10m" else ("B02", "B8A", "B11"):
                for tile in ("T33_x", "T34_y"):
                    name = f"{place}/{tile}_{k}_{place[1:]}.tif"
                    write_plane(tmp_path / c / name, int(k[1]), size)
        write_plane(tmp_path / c / "R10m/T33_x_TCI.tif", 9)
    data = load_data(str(tmp_path), planes="R*m/{image}_{channel}_*m.tif", channels="B11+B02")
    assert data.train[0][0][:, 0, 0].tolist() == [1, 0]
    assert data.train[0][0].shape == (2, 8, 8)
    assert len(data.train) == 4
    for wrong, said in (("{image}-{channel}.tif", "No file fits"), ("{image}.tif", "no {channel}")):
        with pytest.raises(UserError, match=said):
            load_data(str(tmp_path), planes=wrong)
    assert len(load_data(str(tmp_path), planes="none", splits={"train": "."}).train) == 22


@pytest.mark.parametrize(
    ("words", "asked", "found"),
    [
        (("DNA", "laminin", "phase"), None, ("DNA", "laminin", "phase")),
        (("laminin", "spectrin"), "spectrin=+laminin=", ("spectrin", "laminin")),
        (("laminin", "spectrin"), None, (None,)),  # nothing says that these are channels
    ],
)
def test_the_place_of_a_channels_word_holds_the_other_channels(tmp_path, words, asked, found):
    for c in CLASSES:
        for i in range(3):
            for k, word in enumerate(words):
                write_plane(tmp_path / c / f"A0{i}_s1_{word}.tif", k)
    data = load_data(str(tmp_path), channels=asked)
    assert data.channels.names == found
    assert len(data.train) == 6 * len(words) // len(found)


def test_channels_choose_among_the_files(tmp_path):
    root = layout(tmp_path / "bands", "{c}/scene {i}/B0{k}.tif")
    assert load_data(root, channels="B03+B01").train[0][0][:, 0, 0].tolist() == [300, 100]
    stains = layout(tmp_path / "stains", "{c}/A0{i}_s1_w{k}.tif")
    by_place = load_data(stains, channels=[461.0, 520.0, 600.0])
    assert by_place.train[0][0][:, 0, 0].tolist() == [100, 200, 300]
    with pytest.raises(UserError, match=r"several files put together.*B01, B02, B03.*--channels"):
        load_data(root, channels="B02+B12")


def test_a_missing_file_is_named_filled_or_absent(tmp_path, caplog):
    root = layout(tmp_path, "{c}/A0{i}_s1_w{k}.tif")
    (tmp_path / "forest" / "A00_s1_w2.tif").unlink()
    with pytest.raises(
        UserError, match=r"A00_s1_w1.*no file for w2.*--no-data mean.*--channel-aug"
    ):
        load_data(root)
    assert len(load_data(root, skip_corrupt=True).train) == 7
    data = load_data(root, allow_absent=True, validation_fraction=0.4)
    assert not any(data.validation.absent), "the mean would take its place in silence"
    with pytest.raises(UserError, match=r"A00_s1_w1.*no file for w2.*--no-data mean"):
        load_data(root, allow_absent=True, splits={"train": None, "test": "."})
    image = data.train[0][0]
    assert image.isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert image[0, 0, 0] == pytest.approx(100 / 65535)
    channels = measure_split(data.train)[0]
    transform = eval_transform(8, channels)
    assert TransformedSplit(data.train, transform)[0][0][1].eq(0).all()
    kept = TransformedSplit(data.train, transform, keep_absent=True)
    assert kept[0][0].isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not kept[1][0].isnan().any()


def test_a_table_says_the_classes_of_folders_of_one_image(tmp_path):
    for name in names_of("{a,b,c}/B0{2,3}.tif"):
        write_plane(tmp_path / name, 9)
    (tmp_path / "labels.csv").write_text("scene,kind\na,wet\nb,dry\nc,wet\n")
    data = load_data(str(tmp_path))
    assert (data.class_names, data.train.labels()) == (("dry", "wet"), [1, 0, 1])


def test_files_of_an_image_stay_in_one_split(tmp_path):
    for k in (1, 2):
        for i in range(4):
            write_plane(tmp_path / f"{i}_w{k}.tif", k)
    lines = [f"{i}_w{k}.tif,{CLASSES[i % 2]},{'train' if k == 1 else 'test'}" for i in range(4)
             for k in (1, 2)]  # fmt: skip
    (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *lines]))
    with pytest.raises(UserError, match=r"image 0.* are in train and in test"):
        load_data(str(tmp_path))
    (tmp_path / "labels.csv").write_text(
        "0_w1.tif,forest\n0_w2.tif,river\n1_w1.tif,river\n1_w2.tif,river"
    )
    with pytest.raises(UserError, match="another file of the same image"):
        load_data(str(tmp_path))


def test_a_column_a_channel(tmp_path):
    for i in range(4):
        for stain in ("dna", "er"):
            write_plane(tmp_path / f"{i}{stain}.tif", i + (stain == "er"))
    rows = [f"{i}dna.tif,{i}er.tif,{CLASSES[i % 2]}" for i in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["FileName_OrigDNA,FileName_OrigER,label", *rows]))
    data = load_data(str(tmp_path))
    assert data.channels.names == ("DNA", "ER")
    assert data.train[2][0][:, 0, 0].tolist() == [2, 3]


# Channels and scale -------------------------------------------------------------------------------


def test_channels_are_said_or_guessed(tmp_path):
    root = str(grow(tmp_path / "data", "{ant,bee}/{0..2}.tif"))
    assert load_data(root).channels.is_anonymous
    names = "B02+B03+B04+B08+B11"
    assert load_data(root, channels=names).channels.labels == tuple(names.split("+"))
    assert load_data(root, value_scale=10000).train[0][0].dtype == torch.float32
    gray = grow(tmp_path / "gray", "{ant,bee}/{0..2}.png")
    Image.fromarray(picture(0)[..., 0]).save(gray / "ant/0.png")
    data = load_data(str(gray))
    assert data.channels == RGB
    assert data.train[0][0].shape[0] == 3
    assert load_data(str(gray), channels="anonymous").channels.is_anonymous
    with pytest.raises(ValueError, match=r"none of 6 images .* one reason.*5 planes.*--channels"):
        load_data(root, channels="RGB")
    np.save(tmp_path / "data/ant/zz.npy", bands(1, 4))
    with pytest.raises(ValueError, match=r"differ in their number of planes.*--channels"):
        load_data(root)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


@pytest.mark.parametrize(
    ("top", "dtype"),
    [
        (255, "float32"), (255, "int64"), (255, "int32"), (255, "uint32"), (4095, "uint16"),
        (16383, "uint16"), (10000, "int16"), (10000, "uint16"), (1, "uint8"), (2000, "float64"),
    ],
)  # fmt: skip
def test_three_planes_of_raw_numbers_do_not_take_imagenets_statistics(tmp_path, top, dtype, caplog):
    rng = np.random.default_rng(0)
    for name in ("a/0.npy", "a/1.npy", "b/0.npy", "b/1.npy"):
        save(tmp_path / name, (rng.random((3, 16, 16)) * (top + 0.99)).astype(dtype))
    with caplog.at_level(logging.WARNING):
        data = load_data(str(tmp_path))
    assert data.channels.names == ("R", "G", "B")
    assert data.channels.mean is None
    assert "have to be measured" in caplog.text
    with pytest.raises(UserError, match="Measure them"):
        train_transform(16, data.channels)
    channels, invalid = measure_split(data.train)
    assert invalid == (0, 0, 0)
    seen = torch.stack([eval_transform(16, channels, crop_pct=1.0)(x) for x, _ in data.train])
    assert abs(seen.mean()) < 0.1
    assert 0.9 < seen.std() < 1.1
    scaled = load_data(str(tmp_path), value_scale=float(top))
    assert scaled.channels == RGB or dtype == "uint8"


def test_usual_pictures_keep_imagenets_statistics(tmp_path):
    rng = np.random.default_rng(0)
    kinds = {
        "bytes": rng.integers(0, 256, (3, 16, 16), np.uint8),
        "dark": rng.integers(0, 90, (3, 16, 16), np.uint8),
        "words": rng.integers(0, 65536, (3, 16, 16)).astype(np.uint16),
        "floats": rng.random((3, 16, 16), np.float32),
    }
    for kind, array in kinds.items():
        for name in ("a/0.npy", "b/0.npy"):
            save(tmp_path / kind / name, array)
        assert load_data(str(tmp_path / kind)).channels == RGB, kind


def test_statistics_of_another_scale_are_refused_or_said(tmp_path, caplog):
    array = np.random.default_rng(0).integers(1500, 4500, (2, 8, 8)).astype(np.uint16)
    for name in ("a/0.npy", "b/0.npy"):
        save(tmp_path / name, array)
    channels = ChannelSet.parse("B04+B08").with_stats([0.3, 0.3], [0.1, 0.1])
    with pytest.raises(UserError, match="Say --value-scale"):
        load_data(str(tmp_path), channels=channels)
    with caplog.at_level(logging.WARNING):
        assert load_data(str(tmp_path), channels=channels, value_scale=10000).channels == channels
        assert "--value-scale right" not in caplog.text
        load_data(str(tmp_path), channels=channels, value_scale=65535)
    assert "Is --value-scale right?" in caplog.text
    brighter = ChannelSet.parse("B04+B08").with_stats([0.05, 0.05], [0.2, 0.2])  # no factor
    assert load_data(str(tmp_path), channels=brighter).channels == brighter


def test_no_data_stays_out_of_the_statistics_and_becomes_the_mean(tmp_path):
    rng = np.random.default_rng(0)
    whole = []
    for name in ("a/0.npy", "a/1.npy", "b/0.npy", "b/1.npy"):
        array = (rng.random((4, 16, 16)) * 0.3).astype(np.float32)
        array[:2, :4] = np.nan if name[0] == "a" else -9999
        whole.append(array)
        save(tmp_path / name, array)
    with pytest.raises(UserError, match=r"12\.5% of its values hold no data.*--no-data mean"):
        measure_split(load_data(str(tmp_path), channels="B02+B03+B04+B08").train)
    data = load_data(str(tmp_path), channels="B02+B03+B04+B08", no_data="mean")
    channels, invalid = measure_split(data.train)
    assert invalid == pytest.approx((0.25, 0.25, 0, 0))
    values = np.stack(whole)
    values[~(values > -1)] = np.nan
    assert channels.mean == pytest.approx(np.nanmean(values, axis=(0, 2, 3)).tolist(), abs=1e-6)
    assert channels.std == pytest.approx(np.nanstd(values, axis=(0, 2, 3)).tolist(), abs=1e-6)
    image = data.train[0][0]
    for transform in (
        eval_transform(16, channels, crop_pct=1.0),
        train_transform(16, channels, scale=(1, 1), ratio=(1, 1), hflip=0, rotation_degrees=0),
    ):
        seen = transform(image)
        assert seen[:2, :4].abs().max() < 1e-6
        assert seen.isfinite().all()
    left = load_data(str(tmp_path), channels="B02+B03+B04+B08", no_data="keep").train
    assert left[3][0].min() == -9999


# Equal images -------------------------------------------------------------------------------------


def test_repeated_lines_stay_on_one_side(tmp_path):
    grow(tmp_path, "{0..19}.png")
    lines = [f"{'./' * (i % 2)}{i}.png {CLASSES[i < 4]}" for i in range(20)]
    (tmp_path / "train.txt").write_text("\n".join(lines + 3 * [f"{i}.png river" for i in range(4)]))
    data = load_data(str(tmp_path), validation_fraction=0.3)
    sides = [{number for number, _ in numbers_in(split)} for split in data.splits.values()]
    assert not sides[0] & sides[1]
    assert any("12 rows repeat the same image" in note for note in data.notes)
    (tmp_path / "test.txt").write_text("\n".join(lines[:5]))
    data = load_data(str(tmp_path))
    assert any("in train and in test: 5 of 5 of test" in note for note in data.notes)


def test_validation_never_takes_the_only_image_of_a_class(tmp_path):
    root = str(grow(tmp_path, "{a,b}/{0..4}.png", "rare/0.png"))
    for fraction in (0.1, 0.3, 0.9):
        data = load_data(root, validation_fraction=fraction)
        assert set(data.train.labels()) == {0, 1, 2}
        assert set(data.validation.labels()) <= {0, 1}
        assert len(data.train) + len(data.validation) == 11
    single = grow(tmp_path / "single", "{a,b}/0.png")
    assert load_data(str(single), validation_fraction=0.5).validation is None


def test_a_limit_is_balanced_and_seeded():
    data = load_data("synthetic", limit=25)
    counts = [data.train.labels().count(c) for c in range(10)]
    assert (len(data.train), len(data.test), set(counts)) == (25, 25, {2, 3})
    same, other = (load_data("synthetic", limit=25, seed=s).train for s in (0, 1))
    names = [[split.name(i) for i in range(25)] for split in (data.train, same, other)]
    assert names[0] == names[1] != names[2]


def test_images_that_were_trained_on_are_known_wherever_they_lie(tmp_path, caplog):
    for name, last, first in (("here", 3, 0), ("there", 4, 0), ("other", 3, 20)):
        grow(tmp_path / name, f"{{forest,river}}/{name} {{0..{last}}}.png", first=first)
    save_fingerprints(load_data(str(tmp_path / "here")), tmp_path)
    trained = load_fingerprints(tmp_path)["train"]
    there, other, here = (load_data(str(tmp_path / n)).train for n in ("there", "other", "here"))
    with caplog.at_level(logging.WARNING):
        assert len(unseen(other, trained)) == 8
        assert not caplog.text
        left = unseen(there, trained)
    assert numbers_in(left) == [(8, 1), (9, 1)]
    assert "8 of 10 images of the data were trained on" in caplog.text
    assert len(unseen(here, trained)) == 8
    assert "TRAINED ON ALL 8 IMAGES" in caplog.text
    assert load_fingerprints(tmp_path / "nowhere") == {}
    rows = {"image": [{"bytes": png_bytes(i)} for i in (0, 2)], "label": [0, 1]}
    parquet.write_table(pa.table(rows), tmp_path / "t.parquet")
    data = load_data(str(tmp_path / "t.parquet"), cache_dir=tmp_path / "cache")
    assert np.isin(data.train.fingerprint(), trained).all()


# Preview ------------------------------------------------------------------------------------------


def ordered(order, count=6):
    rng = np.random.default_rng(0)
    lengths = np.linspace(450, 2200, count)
    reach = np.exp(-np.abs(np.log(lengths[:, None] / lengths)) * 3)
    made = np.linalg.cholesky(reach) @ rng.standard_normal((count, 2000))
    correlation = np.corrcoef(made)[np.ix_(order, order)]
    named = ChannelSet(tuple(Channel(f"b{i}", nm) for i, nm in enumerate(lengths)))
    return named.with_stats([0.5] * count, [0.1] * count, correlation.round(6).tolist())


def test_an_order_that_the_planes_contradict_is_said():
    assert order_problem(ordered(range(6))) is None
    said = order_problem(ordered([0, 2, 3, 4, 5, 1]))
    assert "plane 6, called b5" in said
    assert "as b1" in said


def test_a_preview_says_what_training_would_see(tmp_path):
    root = layout(tmp_path, "{c}/T33_{i}_B0{k}_{k}0m.tif")
    (tmp_path / "forest" / "x.heic").write_bytes(b"")
    found = preview_data(load_data(root, validation_fraction=0.25))
    assert found.title == f"{tmp_path.name}: train 6, validation 2 images of 2 classes"
    assert {name: len(some) for name, some in found.examples.items()} == {
        "train": 4,
        "validation": 2,
    }
    assert {e.class_name for e in found.examples["train"]} == set(CLASSES)
    text = "\n".join(found.lines)
    for said in ("B01+B02+B03", "65535", "one file a channel", "brought to the finest", "1 .heic",
                 "fewer than 5 images: forest (3), river (3)"):  # fmt: skip
        assert said in text
    bad = grow(tmp_path / "bad", "{a,b}/0.png")
    (bad / "b/0.png").write_bytes(b"no image")
    assert "would refuse" in "\n".join(preview_data(load_data(str(bad))).lines)


def test_absent_planes_are_absent_channels_in_training():
    x = torch.randn(64, 3, 4, 4)
    x[:32, 1] = torch.nan
    x[5] = torch.nan
    channels = ChannelSet((Channel("a"), Channel("b"), Channel("c")))
    for aug in ("hcs-sample", "none"):
        view = draw_channels(aug, x, channels, DrawKey(0, 0, 0), identity="named", has_absent=True)
        assert view.planes.isfinite().all()
        assert view.present.any(1).all()
        assert not view.present[:32, 1][torch.arange(32) != 5].any()
        assert view.present[32:].all() == (aug == "none")

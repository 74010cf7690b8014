"""One record an image: files a channel, tables, equal images, and what a preview says of them."""

import json
import logging
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tifffile
import torch
from PIL import Image

from timm_varchan import Channel, ChannelSet
from timm_varchan.data import (
    TransformedSplit,
    eval_transform,
    load_data,
    load_fingerprints,
    measure_split,
    preview_data,
    save_fingerprints,
    unseen,
)
from timm_varchan.data.preview import order_problem
from timm_varchan.errors import UserError
from timm_varchan.views import DrawKey, draw_channels

CLASSES = ("forest", "river")


def write_plane(path, value, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, np.full((size, size), value, np.uint16))


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


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


def test_folders_of_one_image_are_no_classes(tmp_path):
    for scene in "abc":
        for k in (2, 3):
            write_plane(tmp_path / scene / f"B0{k}.tif", k)
    with pytest.raises(UserError, match=r"one image each.*not classes.*labels\.csv"):
        load_data(str(tmp_path))
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


# Tables -------------------------------------------------------------------------------------------

ROWS = [(f"{i} x.png", CLASSES[i % 2]) for i in range(4)]
TABLES = {
    "labels.csv": "file_name,label\n" + "".join(f"{p},{c}\n" for p, c in ROWS),
    "meta.csv": "label;path\n" + "".join(f'{c};"{p}"\n' for p, c in ROWS),
    "labels.tsv": "".join(f"{p}\t{c}\n" for p, c in ROWS),
    "x.csv": "id,species\n" + "".join(f"{p[:-4]},{c}\n" for p, c in ROWS),
    "metadata.jsonl": "".join(json.dumps({"file_name": p, "label": c}) + "\n" for p, c in ROWS),
    "train.txt": "".join(f"{p} {c}\n" for p, c in ROWS),
    "windows.csv": "image,class\r\n" + "".join(f"D:\\a b\\{p},{c}\r\n" for p, c in ROWS),
}


@pytest.mark.parametrize("place", [".", "images"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_say_the_labels(tmp_path, name, place):
    for i in range(4):
        picture(tmp_path / place / f"{i} x.png", 60 * i)
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8-sig")
    for source in (tmp_path, tmp_path / name):
        data = load_data(str(source))
        assert data.class_names == CLASSES
        assert [(int(x[0, 0, 0]), label) for x, label in data.train] == [
            (60 * i, i % 2) for i in range(4)
        ]


def test_tables_of_splits(tmp_path, caplog):
    for split in ("train", "test"):
        for i in range(4):
            picture(tmp_path / split / f"{i}.png", 60 * i)
    lines = "".join(f"{i}.png,{CLASSES[i % 2]}\n" for i in range(4))
    (tmp_path / "train.csv").write_text(lines)
    (tmp_path / "test.csv").write_text("id\n0.png\n1.png\n")
    with caplog.at_level(logging.WARNING):
        data = load_data(str(tmp_path))
    assert (data.class_names, len(data.train), data.test) == (CLASSES, 4, None)
    assert "test.csv, which has no labels" in caplog.text
    assert "left out 4 images that no table lists" in caplog.text
    (tmp_path / "test.csv").write_text(lines)
    assert len(load_data(str(tmp_path)).test) == 4
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).rename(tmp_path / name[:-4] / "metadata.csv")
    assert len(load_data(str(tmp_path)).test) == 4
    (tmp_path / "train" / "metadata.csv").rename(tmp_path / "metadata.csv")
    (tmp_path / "test" / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"0\.png', which is in test/ and in train/"):
        load_data(str(tmp_path))
    both = "path,label,split\n" + "".join(
        f"{s}/{i}.png,{CLASSES[i % 2]},{n}\n"
        for s, n in (("train", "Train"), ("test", "val")) for i in range(4)
    )  # fmt: skip
    (tmp_path / "metadata.csv").write_text(both)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), data.test) == (4, 4, None)


def test_a_column_a_channel(tmp_path):
    for i in range(4):
        for stain in ("dna", "er"):
            write_plane(tmp_path / f"{i}{stain}.tif", i + (stain == "er"))
    rows = [f"{i}dna.tif,{i}er.tif,{CLASSES[i % 2]}" for i in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["FileName_OrigDNA,FileName_OrigER,label", *rows]))
    data = load_data(str(tmp_path))
    assert data.channels.names == ("DNA", "ER")
    assert data.train[2][0][:, 0, 0].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0.131, 0.2, 0.35, 1.7], "regression is not served"),
        ([1e-5, 2, 3, 4], "regression is not served"),
        (["a|b", "a", "b", "c"], "several labels an image"),
        (["a b", "a", "b", "c"], "several labels an image"),
        (["x|y", "y|z", "x|z", "z|x"], "several labels an image"),
        (["a", "a", "a", "a"], "only one class, 'a'"),
        (["", "", "", ""], "all 4 rows are of no use"),
    ],
)
@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.txt"])
def test_labels_that_are_no_classes_are_refused(tmp_path, labels, said, name):
    for i in range(4):
        picture(tmp_path / f"{i}.png", 60 * i)
    texts = {
        ".csv": "".join(f"{i}.png,{x}\n" for i, x in enumerate(labels)),
        ".txt": "".join(f"{i}.png {x}\n" for i, x in enumerate(labels)),
        ".jsonl": "".join(
            json.dumps({"image": f"{i}.png", "label": x}) + "\n" for i, x in enumerate(labels)
        ),
    }
    (tmp_path / name).write_text(texts[name[5:]])
    with pytest.raises(UserError, match=said if labels[0] or name != "train.txt" else "needs"):
        load_data(str(tmp_path), class_names=None if labels[0] else ["a", "b"])


def test_folders_that_are_no_classes_are_refused(tmp_path):
    for name in ("images", "masks"):
        picture(tmp_path / "pairs" / name / "0.png", 9)
    with pytest.raises(UserError, match="Segmentation is not"):
        load_data(str(tmp_path / "pairs"))
    picture(tmp_path / "one" / "images" / "0.png", 9)
    with pytest.raises(UserError, match=r"only one class, 'images'.*labels\.csv"):
        load_data(str(tmp_path / "one"))
    for split in ("train", "test"):
        picture(tmp_path / "bare" / split / "0.png", 9)
    with pytest.raises(UserError, match=r"like splits.*train\.csv"):
        load_data(str(tmp_path / "bare"))


def test_spellings_of_a_class_are_one(tmp_path, caplog):
    one, two = (unicodedata.normalize(form, "for\u00eat") for form in ("NFC", "NFD"))
    for number, name in enumerate((f"train/{one}", f"train/{two}", "train/eau", f"val/{two}")):
        picture(tmp_path / name / f"{number}.png", 50 * number)
    data = load_data(str(tmp_path))
    assert data.class_names == ("eau", one)
    assert data.train.labels().count(1) == 2
    assert data.validation.labels() == [1]
    assert any("Two spellings" in note for note in data.notes)
    assert load_data(str(tmp_path), class_names=["eau", two]).train.labels().count(1) == 2


def test_an_image_without_a_note_is_read_from_parquet(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png", 60 * i)
    rows = [{"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None} for i in range(4)]
    table = pa.table({"image": rows, "label": [0, 1, 0, 1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    data = load_data(str(tmp_path / "train.parquet"), cache_dir=tmp_path / "cache")
    assert [int(x[0, 0, 0]) for x, _ in data.train] == [0, 60, 120, 180]


# Equal images -------------------------------------------------------------------------------------


def test_repeated_lines_stay_on_one_side(tmp_path, caplog):
    for i in range(20):
        picture(tmp_path / f"{i}.png", 10 * i)
    lines = [f"{'./' * (i % 2)}{i}.png {CLASSES[i < 4]}" for i in range(20)]
    (tmp_path / "train.txt").write_text("\n".join(lines + 3 * [f"{i}.png river" for i in range(4)]))
    data = load_data(str(tmp_path), validation_fraction=0.3)
    sides = [{int(x[0, 0, 0]) for x, _ in split} for split in (data.train, data.validation)]
    assert not sides[0] & sides[1]
    assert any("12 rows repeat the same image" in note for note in data.notes)
    (tmp_path / "test.txt").write_text("\n".join(lines[:5]))
    data = load_data(str(tmp_path))
    assert any("in train and in test: 5 of 5 of test" in note for note in data.notes)


def test_images_that_were_trained_on_are_known_wherever_they_lie(tmp_path, caplog):
    for i in range(8):
        picture(tmp_path / "here" / CLASSES[i % 2] / f"{i}.png", 30 * i)
        picture(tmp_path / "there" / CLASSES[i % 2] / f"new {i}.png", 30 * i if i < 6 else 9 * i)
        picture(tmp_path / "other" / CLASSES[i % 2] / f"{i}.png", 28 * i + 5)
    save_fingerprints(load_data(str(tmp_path / "here")), tmp_path)
    trained = load_fingerprints(tmp_path)["train"]
    there, other, here = (load_data(str(tmp_path / n)).train for n in ("there", "other", "here"))
    with caplog.at_level(logging.WARNING):
        assert len(unseen(other, trained)) == 8
        assert not caplog.text
        left = unseen(there, trained)
    assert [int(x[0, 0, 0]) for x, _ in left] == [54, 63]
    assert "6 of 8 images of the data were trained on" in caplog.text
    assert len(unseen(here, trained)) == 8
    assert "TRAINED ON ALL 8 IMAGES" in caplog.text
    assert load_fingerprints(tmp_path / "nowhere") == {}
    rows = [{"bytes": (tmp_path / f"here/forest/{i}.png").read_bytes()} for i in (0, 2)]
    table = pa.table({"image": rows, "label": [0, 1]})
    parquet.write_table(table, tmp_path / "t.parquet")
    data = load_data(str(tmp_path / "t.parquet"), cache_dir=tmp_path / "cache")
    assert np.isin(data.train.fingerprint(), trained).all()


# Preview ------------------------------------------------------------------------------------------


def bands(order, count=6):
    rng = np.random.default_rng(0)
    lengths = np.linspace(450, 2200, count)
    reach = np.exp(-np.abs(np.log(lengths[:, None] / lengths)) * 3)
    made = np.linalg.cholesky(reach) @ rng.standard_normal((count, 2000))
    correlation = np.corrcoef(made)[np.ix_(order, order)]
    named = ChannelSet(tuple(Channel(f"b{i}", nm) for i, nm in enumerate(lengths)))
    return named.with_stats([0.5] * count, [0.1] * count, correlation.round(6).tolist())


def test_an_order_that_the_planes_contradict_is_said():
    assert order_problem(bands(range(6))) is None
    said = order_problem(bands([0, 2, 3, 4, 5, 1]))
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
    picture(tmp_path / "bad" / "a" / "0.png", 9)
    picture(tmp_path / "bad" / "b" / "0.png", 9)
    (tmp_path / "bad" / "b" / "0.png").write_bytes(b"no image")
    assert "would refuse" in "\n".join(preview_data(load_data(str(tmp_path / "bad"))).lines)


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

"""Every source ends as the same data; what is left out is said, what is wrong has its cure."""

import json
import logging
import os
import pickle
import shutil
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from trees import bands, grow, npy_bytes, numbers_in, picture, png_bytes, write

from timm_varchan.channels import RGB
from timm_varchan.data import find_images, load_data, stream_data
from timm_varchan.errors import UserError

REAL = Path(__file__).parents[1] / "../shared/data/tinyimagenet50"
CLASSES = ("ant", "bee")


@pytest.fixture(autouse=True)
def quiet_progress():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def load(tmp_path):
    return lambda source, **options: load_data(str(source), cache_dir=tmp_path / "cache", **options)


def class_folders(root, suffix=".png"):
    """Six images to train with, four for validation."""
    return grow(root, f"train/{{ant,bee}}/{{0..2}}{suffix}", f"val/{{ant,bee}}/{{0..1}}{suffix}")


def lists(root, suffix=".png", label=lambda i, half: i // half):
    for split, half in (("train", 3), ("val", 2)):
        names = [f"all images/{split} {i}{suffix}" for i in range(2 * half)]
        for i, name in enumerate(names):
            write(root / name, i)
        lines = [f"{name} {label(i, half)}" for i, name in enumerate(names)]
        (root / f"{split}.txt").write_text("\n".join([*lines, "", ""]))
    return root


def png_row(i):
    return {"bytes": png_bytes(i), "path": f"{i}.png"}


def table(count, images=png_row, kind=None, names=("image", "label"), label_kind=None):
    kinds = (kind or datasets.Image(), label_kind or datasets.ClassLabel(names=list(CLASSES)))
    features = datasets.Features(dict(zip(names, kinds, strict=True)))
    values = [2 * i // count for i in range(count)]
    rows = {names[0]: [images(i) for i in range(count)], names[1]: values}
    return datasets.Dataset.from_dict(rows, features=features)


def parquet_folder(root, **options):
    root.mkdir(parents=True, exist_ok=True)
    table(6, **options).to_parquet(root / "train-00000-of-00001.parquet")
    table(4, **options).to_parquet(root / "validation.parquet")
    return root


def check(data, suffix=".png", name="data"):
    """Six images and four with the numbers that `write` gave them, or a table's rows."""
    assert data.class_names in (CLASSES, ("0", "1"))
    assert (data.name, data.test) == (name, None)
    assert data.channels == RGB if suffix == ".png" else len(data.channels) == 5
    for split, count in ((data.train, 6), (data.validation, 4)):
        assert split.labels() == [2 * i // count for i in range(count)]
        for image, _ in split:
            number = int(image[0, 0, 0])
            expected = picture(number).transpose(2, 0, 1) if suffix == ".png" else bands(number)
            np.testing.assert_array_equal(image.numpy(), expected)
        assert len({tuple(image.flatten().tolist()) for image, _ in split}) > 1


# Layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
@pytest.mark.parametrize("make", [class_folders, lists])
def test_folders_and_lists(tmp_path, load, make, suffix):
    root = make(tmp_path / "data", suffix)
    check(load(root), suffix)
    if make is lists:
        alone = load(root / "val.txt")
        assert (alone.train, len(alone.validation)) == (None, 4)
        lists(root, suffix, label=lambda i, half: CLASSES[i // half])
        check(load(root), suffix)


@pytest.mark.parametrize(
    ("images", "kind", "suffix"),
    [
        (png_row, datasets.Image(), ".png"),
        (png_bytes, datasets.Value("binary"), ".png"),
        (lambda i: npy_bytes(bands(i)), datasets.Value("binary"), ".npy"),
        (bands, datasets.Array3D((5, 10, 12), "uint16"), ".npy"),
    ],
)
def test_parquet_with_images_binary_and_arrays(tmp_path, load, images, kind, suffix):
    check(load(parquet_folder(tmp_path / "data", images=images, kind=kind)), suffix)


def test_parquet_by_folder_alone_without_a_note_and_saved_to_disk(tmp_path, load):
    for split, count in (("train", 6), ("validation", 4)):
        (tmp_path / "data" / "default" / split).mkdir(parents=True)
        table(count).to_parquet(tmp_path / "data" / "default" / split / "0000.parquet")
    check(load(tmp_path / "data"))
    assert len(load(tmp_path / "data/default/train/0000.parquet").train) == 6
    saved = datasets.DatasetDict({"train": table(6), "validation": table(4)})
    saved.save_to_disk(tmp_path / "saved")
    check(load(tmp_path / "saved"), name="saved")
    plain = pa.table({"image": [png_row(i) for i in range(4)], "label": [0, 1, 0, 1]})
    parquet.write_table(plain, tmp_path / "plain.parquet")
    assert numbers_in(load(tmp_path / "plain.parquet").train) == [(0, 0), (1, 1), (2, 0), (3, 1)]


def test_columns_are_found_by_type_and_by_name(tmp_path, load):
    root = parquet_folder(tmp_path / "data", names=("photo", "kind"))
    check(load(root))
    check(load(root, image_column="photo", label_column="kind"))
    binary = {"kind": datasets.Value("binary"), "images": lambda i: npy_bytes(bands(i))}
    other = parquet_folder(
        tmp_path / "other", names=("x", "y"), label_kind=datasets.Value("int64"), **binary
    )
    check(load(other, image_column="x", label_column="y"), ".npy", "other")
    real = parquet_folder(tmp_path / "real", label_kind=datasets.Value("float32"))
    for source, options, said in (
        (root, {"image_column": "imgae"}, r"train has no column 'imgae'.*photo, kind.*--image-col"),
        (root, {"label_column": "klass"}, r"no column 'klass' for the labels.*--label-column"),
        (other, {}, r"no column for the images.*it has x, y"),
        (other, {"image_column": "y", "label_column": "y"}, r"holds .*int64.*not images"),
        (real, {}, "whole numbers"),
    ):
        with pytest.raises(UserError, match=said):
            load(source, **options)


@pytest.mark.parametrize("name", ["run[1]", "data [v2]", "q{a,b}", "x**y?"])
@pytest.mark.parametrize("streaming", [False, True])
def test_paths_are_no_patterns(tmp_path, load, name, streaming):
    for folder in (name, "run1", "datav", "qa", "xay"):
        parquet_folder(tmp_path / folder)
    data = stream_data(str(tmp_path / name)) if streaming else load(tmp_path / name)
    assert len(data.train) == 6
    assert len(load(class_folders(tmp_path / f"{name} folders")).train) == 6


@pytest.mark.parametrize("name", ["mini-imagenet", "timm/mini-imagenet"])
def test_hub_names_without_network(monkeypatch, load, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="unset HF_HUB_OFFLINE") as caught:
        load(name)
    assert str(caught.value).startswith("Data 'timm/mini-imagenet' is no local path")
    assert "\n" not in str(caught.value)


def test_hub_data_by_its_name(monkeypatch):
    tables = datasets.DatasetDict({"train": table(6), "validation": table(4)})
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, **_: {"timm/mini-imagenet": tables}[name]
    )
    check(load_data("mini-imagenet"), name="timm/mini-imagenet")


@pytest.mark.skipif(not REAL.is_dir(), reason="the 50-class subset of Tiny-ImageNet is not here")
def test_real_photographs(load):
    data = load(REAL, splits={"train": None})
    assert (len(data.class_names), len(data.validation), data.train) == (50, 1250, None)
    assert data.channels == RGB
    assert {data.validation.labels().count(c) for c in range(50)} == {25}
    assert {image.shape for image, _ in data.validation} == {(3, 64, 64)}  # some files are gray
    assert len(load(REAL / "validation.parquet", limit=100).validation) == 100


def test_splits_pickle_for_spawned_workers(tmp_path, load):
    for data in (load(parquet_folder(tmp_path / "data")), load_data("synthetic", img_size=16)):
        image, label = pickle.loads(pickle.dumps(data.train))[3]
        assert torch.equal(image.float(), data.train[3][0].float())
        assert label == data.train[3][1]


# Splits and class folders -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ("Train,Val,Test", "train validation test"),
        ("TRAINING,Validation,Testing", "train validation test"),
        ("train,dev", "train validation"),
        ("Test,other", "test"),
    ],
)
def test_splits_are_found_in_any_case(tmp_path, load, splits, expected):
    data = load(grow(tmp_path, f"{{{splits}}}/{{cat,dog}}/{{0,1}}.png"))
    assert data.class_names == ("cat", "dog")
    assert list(data.splits) == expected.split()
    if os.path.normcase("A") == "A" and splits[:5] == "Train":  # the file system has two cases
        grow(tmp_path, "train/{cat,dog}/{0,1}.png")
        with pytest.raises(UserError, match=r"'train' twice.*--train-split"):
            load(tmp_path)
        assert len(load(tmp_path, splits={"train": "Train"}).train) == 4


@pytest.mark.parametrize(
    ("tree", "splits", "classes", "sizes"),
    [
        ("{seg_train,seg_test}/{seg}/{forest,sea}/{0,1}.png", {"train": "seg_train", "test":
         "seg_test"}, "forest sea", [4, 4]),
        ("{part1,part2}/{cat,dog}/{0,1}.png", {"train": "part1", "test": "part2"}, "cat dog",
         [4, 4]),
        ("{part1,part2}/{cat,dog}/{0,1}.png", {"train": "."}, "part1 part2", [8]),
        ("{train,hold}/{ant,bee}/{0,1}.png", {"validation": "hold"}, "ant bee", [4, 4]),
        ("{train,hold}/{ant,bee}/{0,1}.png", {"train": None, "test": "hold"}, "ant bee", [4]),
        ("train/{ant,bee,train}/{0,1}.png", {}, "ant bee train", [6]),
        ("{bullet_train/old,test_tube/glass,train}/{0,1}.png", {}, "bullet_train test_tube train",
         [6]),
        ("archive/PetImages/{cat,dog}/{0,1}.png", {}, "cat dog", [4]),
        ("other/inner/{train,val}/{cat,dog}/{0,1}.png", {}, "cat dog", [4, 4]),
    ],
)  # fmt: skip
def test_folders_are_splits_or_classes(tmp_path, load, tree, splits, classes, sizes):
    data = load(grow(tmp_path, tree), splits=splits)
    assert data.class_names == tuple(classes.split())
    assert [len(split) for split in data.splits.values()] == sizes


@pytest.mark.parametrize(
    ("tree", "options", "said"),
    [
        ("{seg_train,seg_test}/{forest,sea}/{0,1}.png", {}, r"seg_test and seg_train look like spl"
         r"its.*--train-split"),
        ("{part1,part2}/{cat,dog}/0.png", {}, r"part1 and part2 look like splits.*cat, dog"),
        ("{images,masks}/0.png", {}, "Segmentation is not"),
        ("images/0.png", {}, r"only one class, 'images'.*labels\.csv"),
        ("{train,test}/0.png", {}, r"like splits.*train\.csv"),
        ("{a,b,c}/B0{2,3}.tif", {}, r"one image each.*not classes.*labels\.csv"),
        ("{train,holdout}/{a,b}/0.png", {"splits": {"validation": "dev"}}, r"no split 'dev'; it ha"
         r"s holdout, train"),
        ("train/{a,b}/0.png", {"splits": {"training": "train"}}, "Unknown split training"),
        ("train/{a,b}/0.png", {"splits": {"train": None}}, "--train-split"),
        ("{a,b}/0.png", {"validation_fraction": 1.0}, "validation_fraction"),
        ("{a,b}/0.png", {"limit": 0}, "limit is 0"),
        ("{a,b}/0.png", {"value_scale": 0}, "value_scale"),
        ("{a,b}/0.png", {"num_images": {"train": 3}}, "num_images is for 'synthetic'"),
        ("nothing", {}, r"no images in class folders.*train\.txt"),
        ("train/{a,b}/0.png val/a/{}", {}, r"/validation is empty.*splits="),
        ("train/{ant,bee}/{0..2}.png val/{ant,cat}/0.png", {}, r"validation row 1 .*'cat', which i"
         r"s none of the 2 classes"),
    ],
)  # fmt: skip
def test_what_is_refused_has_its_cure(tmp_path, load, tree, options, said):
    tifs = grow(tmp_path, *tree.split(" ")).rglob("*.tif")
    for file in tifs:  # one plane a file
        Image.fromarray(picture(0)[..., 0]).save(file)
    with pytest.raises(UserError, match=said):
        load(tmp_path, **options)


def test_links_are_followed_and_loops_end(tmp_path, load):
    grow(tmp_path / "store", "a/{0,1}.png")
    data = grow(tmp_path / "data", "{b,c}/{0,1}.png")
    (data / "a").symlink_to(tmp_path / "store" / "a")
    (data / "b" / "again").symlink_to(data)
    (data / "c" / "2.png").symlink_to(data / "c" / "0.png")
    loaded = load(data)
    assert loaded.class_names == ("a", "b", "c")
    assert [loaded.train.labels().count(i) for i in range(3)] == [2, 2, 3]
    assert len(find_images([data])) == 7
    (data / "c" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"lost\.png\) cannot be read: there is no such file"):
        list(load(data).train)


def test_what_is_left_out_is_said(tmp_path, load, caplog):
    root = grow(tmp_path / "data", "{cat,dog}/{0,1}.png", "loose.png", "README.md")
    grow(root, "cat/x.heic", "notes/a.txt", "{.DS_Store,cat/._0.png,.x/0.png,__MACOSX/c/0.png}")
    with caplog.at_level(logging.WARNING):
        data = load(root)
        assert (data.class_names, len(data.train)) == (("cat", "dog"), 4)
        assert len(find_images([root])) == 5
        grow(root, "train/{cat,dog}/{0,1}.png")
        assert len(load(root).train) == 4
    for said in (
        "left out 1 files by their ending: 1 .heic",
        "left out 1 images that lie in no class folder",
        "notes holds no images (but 1 .txt) and is no class",
        "left out cat, dog, which is none of the splits",
    ):
        assert said in caplog.text
    assert "left out 1 images that lie in no class folder" in data.notes[1]


# What cannot be read ------------------------------------------------------------------------------

CORRUPTIONS = {".png": 60, ".jpg": 300, ".tif": 400, ".npy": 200}


@pytest.mark.parametrize("suffix", CORRUPTIONS)
@pytest.mark.parametrize("make", [class_folders, lists])
def test_a_corrupt_file_is_named_or_skipped(tmp_path, load, caplog, make, suffix):
    root = make(tmp_path / "data", suffix)
    victim = root / (
        f"train/bee/1{suffix}" if make is class_folders else f"all images/train 4{suffix}"
    )
    victim.write_bytes(victim.read_bytes()[: CORRUPTIONS[suffix]])
    data = load(root)
    named = rf"data/train row 4 \(.*{victim.name}\) cannot be read: .*--skip-corrupt"
    with pytest.raises(UserError, match=named):
        list(data.train)
    with caplog.at_level(logging.WARNING):
        rest = load(root, skip_corrupt=True)
    assert (len(rest.train), rest.train.num_skipped, rest.validation.num_skipped) == (5, 1, 0)
    assert victim.name in rest.train.skipped[0]
    assert "--skip-corrupt" not in rest.train.skipped[0]
    assert "1 images skipped" in caplog.text
    assert len(rest.train.labels()) == len(list(rest.train)) == 5
    victim.unlink()
    if make is lists:
        with pytest.raises(UserError, match=r"row 4 \(all images/train 4.*no such file"):
            list(load(root).train)


def test_a_corrupt_row_is_named_in_a_worker_too(tmp_path, load):
    def images(i):
        return {"bytes": b"broken", "path": None} if i == 2 else png_row(i)

    root = parquet_folder(tmp_path / "data", images=images)
    with pytest.raises(ValueError, match="train row 2 cannot be read: it is no image"):
        list(DataLoader(load(root).train, batch_size=None, num_workers=1))
    assert len(load(root, skip_corrupt=True).train) == 5


def test_nothing_left_is_an_error(tmp_path, load):
    root = class_folders(tmp_path / "data")
    for file in (root / "val").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="Nothing of validation is left: 4 rows"):
        load(root, skip_corrupt=True)
    shutil.rmtree(root / "train")
    with pytest.raises(UserError, match=r"none of 4 images.*it is no image"):
        load(root)


def test_tables_that_are_empty_or_broken(tmp_path, load):
    table(2).select([]).to_parquet(tmp_path / "test.parquet")
    root = parquet_folder(tmp_path / "data")
    (root / "validation.parquet").write_bytes(b"PAR1 broken")
    other = parquet_folder(tmp_path / "other")
    table(3, names=("photo", "label")).to_parquet(other / "validation.parquet")
    for name, content in (("blank", b"\n"), ("short", b"a.png 0\nb.png\n"), ("raw", b"\xff\xfe\0")):
        (tmp_path / f"{name}.txt").write_bytes(content)
    (tmp_path / "a.doc").write_text("x")
    for source, said in (
        ("test.parquet", "is empty"),
        ("blank.txt", "is empty"),
        ("short.txt", r"line 2 is 'b.png'; it needs 'path label'"),
        ("raw.txt", "not UTF-8"),
        ("data", r"Cannot read the Parquet file .*validation\.parquet: "),
        ("other", r"Cannot read the Parquet files of .*same columns"),
        ("a.doc", r"is no \.parquet, \.txt, \.csv"),
    ):
        with pytest.raises(UserError, match=said):
            load(tmp_path / source)
    for source in ("./nowhere", "/no/where", "x/y.parquet", "lists/train.txt"):
        with pytest.raises(FileNotFoundError, match=rf"There is no {source}\. Check the path"):
            load(source)


# Labels -------------------------------------------------------------------------------------------


def test_text_labels_are_sorted_and_class_names_order_them(tmp_path, load):
    root = class_folders(tmp_path / "data")
    turned = load(root, class_names=["bee", "ant", "cat"])
    assert turned.class_names == ("bee", "ant", "cat")
    assert turned.train.labels() == [1 - label for label in load(root).train.labels()]
    columns = parquet_folder(tmp_path / "classlabel")
    assert load(columns, class_names=["bee", "ant"]).train.labels() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("bad", [7, -1, None])
def test_label_out_of_range_in_parquet(tmp_path, load, bad):
    root = parquet_folder(tmp_path / "data")
    old = parquet.read_table(root / "validation.parquet")
    place = old.schema.get_field_index("label")
    new = old.set_column(place, old.schema.field(place), [[0, 0, bad, 1]])
    parquet.write_table(new, root / "validation.parquet")
    said = "has no label" if bad is None else rf"has label {bad}, out of range 0\.\.1"
    with pytest.raises(UserError, match=rf"data/validation row 2 \(2.png\) {said}.*--skip-corrupt"):
        load(root)
    rest = load(root, skip_corrupt=True)
    assert (len(rest.validation), rest.validation.num_skipped, rest.train.num_skipped) == (3, 1, 0)


def test_label_out_of_range_in_lists(tmp_path, load):
    root = lists(tmp_path / "data", label=lambda i, half: 5 if i == 3 else i % 2)
    with pytest.raises(UserError, match=r"Label 5 in row 3 is out of range.*no image has label 2"):
        load(root)
    with pytest.raises(UserError, match=r"train row 3 .*label 5, out of range 0\.\.1"):
        load(root, class_names=CLASSES)
    rest = load(root, class_names=CLASSES, skip_corrupt=True)
    assert (len(rest.train), rest.train.num_skipped) == (5, 1)


def texts(root, **labels):
    """Lists of one image by split."""
    write(root / "x.png")
    for split, some in labels.items():
        lines = "".join(f"x.png {label}\n" for label in some)
        (root / f"{split}.txt").write_text(lines, encoding="utf-8-sig")
    return root


def test_numbers_among_names_that_are_numbers_go_by_name(tmp_path, load):
    root = texts(tmp_path, test=[2, 10, 0])
    names = tuple(sorted(str(n) for n in range(12)))
    assert [names[i] for i in load(root, class_names=names).test.labels()] == ["2", "10", "0"]
    padded = load(root, class_names=[f"{n:03d}" for n in range(12)])
    assert padded.test.labels() == [2, 10, 0]
    with pytest.raises(UserError, match="label 10"):
        load(root, class_names=["0", "2", "4"])


def test_numbers_and_names_do_not_mix(tmp_path, load, caplog):
    with pytest.raises(UserError, match="label '0', which is none of the 2 classes"):
        load(texts(tmp_path / "a", train=["sea", "lake"], val=[0, 1]))
    with pytest.raises(UserError, match="label 'sea', which is none of the 2 classes"):
        load(texts(tmp_path / "b", train=[0, 1], val=["sea"]))
    mixed = texts(tmp_path / "c", train=["0", "1", "a"], val=["0", "1"])  # digits and letters
    assert load(mixed).validation.labels() == [0, 1]
    splits = {"train": table(4), "test": table(4, label_kind=datasets.Value("int64"))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="labels of test are numbers, those of train are names"):
        load(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        positions = load(texts(tmp_path / "d", test=[1, 0]), class_names=["sea", "lake"])
    assert positions.test.labels() == [1, 0]
    assert "taken as positions among the classes sea, lake: 0 is sea" in caplog.text
    lists = datasets.Sequence(datasets.Value("int64"))
    rows = {"image": [png_bytes(0)] * 2, "label": [[0], [0, 1]]}
    features = datasets.Features({"image": datasets.Value("binary"), "label": lists})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "several.parquet")
    with pytest.raises(UserError, match="several labels an image"):
        load(tmp_path / "several.parquet")


def test_spellings_of_a_class_are_one(tmp_path, load):
    one, two = (unicodedata.normalize(form, "for\u00eat") for form in ("NFC", "NFD"))
    data = load(grow(tmp_path, f"train/{{{one},{two},eau}}/{{0,1}}.png", f"val/{two}/0.png"))
    assert data.class_names == ("eau", one)
    assert data.train.labels().count(1) == 4
    assert data.validation.labels() == [1]
    assert any("Two spellings" in note for note in data.notes)
    assert load(tmp_path, class_names=["eau", two]).train.labels().count(1) == 4


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
def test_tables_say_the_labels(tmp_path, load, name, place):
    grow(tmp_path / place, "{0..3} x.png")
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8-sig")
    for source in (tmp_path, tmp_path / name):
        data = load(source)
        assert data.class_names == CLASSES
        assert numbers_in(data.train) == [(i, i % 2) for i in range(4)]


def test_tables_of_splits(tmp_path, load, caplog):
    grow(tmp_path, "{train,test}/{0..3}.png")
    lines = "".join(f"{i}.png,{CLASSES[i % 2]}\n" for i in range(4))
    (tmp_path / "train.csv").write_text(lines)
    (tmp_path / "test.csv").write_text("id\n0.png\n1.png\n")
    with caplog.at_level(logging.WARNING):
        data = load(tmp_path)
    assert (data.class_names, len(data.train), data.test) == (CLASSES, 4, None)
    assert "test.csv, which has no labels" in caplog.text
    assert "left out 4 images that no table lists" in caplog.text
    (tmp_path / "test.csv").write_text(lines)
    assert len(load(tmp_path).test) == 4
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).rename(tmp_path / name[:-4] / "metadata.csv")
    assert len(load(tmp_path).test) == 4
    (tmp_path / "train" / "metadata.csv").rename(tmp_path / "metadata.csv")
    (tmp_path / "test" / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"0\.png', which is in test/ and in train/"):
        load(tmp_path)
    places = [(s, n, i) for s, n in (("train", "Train"), ("test", "val")) for i in range(4)]
    both = [f"{s}/{i}.png,{CLASSES[i % 2]},{n}" for s, n, i in places]
    (tmp_path / "metadata.csv").write_text("\n".join(["path,label,split", *both]))
    data = load(tmp_path)
    assert (len(data.train), len(data.validation), data.test) == (4, 4, None)


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
def test_labels_that_are_no_classes_are_refused(tmp_path, load, labels, said, name):
    grow(tmp_path, "{0..3}.png")
    line = {
        ".csv": "{0}.png,{1}\n",
        ".txt": "{0}.png {1}\n",
        ".jsonl": '{{"image": "{0}.png", "label": {2}}}\n',
    }[name[5:]]
    rows = [line.format(i, label, json.dumps(label)) for i, label in enumerate(labels)]
    (tmp_path / name).write_text("".join(rows))
    with pytest.raises(UserError, match=said if labels[0] or name != "train.txt" else "needs"):
        load(tmp_path, class_names=None if labels[0] else ["a", "b"])

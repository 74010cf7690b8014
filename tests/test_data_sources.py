"""Every source ends as the same data; what is wrong is said with file, row and cure."""

import io
import logging
import pickle
import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as parquet
import pytest
import tifffile
import torch
from PIL import Image
from torch.utils.data import DataLoader

from timm_varchan.channels import RGB
from timm_varchan.data import load_data

REAL = Path(__file__).parents[1] / "../shared/data/tinyimagenet50"
CLASSES = ("ant", "bee")
NUM_IMAGES = {"train": 6, "val": 4}


@pytest.fixture(autouse=True)
def quiet_progress():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(index, size=12):
    return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


def bands(index, count=5):
    return np.random.default_rng(index).integers(0, 65536, (count, 10, 12), dtype=np.uint16)


def write_image(path, index):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, bands(index))
    elif path.suffix == ".tif":
        tifffile.imwrite(path, bands(index), photometric="minisblack")
    else:
        Image.fromarray(picture(index)).save(path)


def expected(index, suffix):
    array = bands(index) if suffix in (".npy", ".tif") else picture(index).transpose(2, 0, 1)
    return torch.from_numpy(array.astype(np.int64))


def class_folders(root, suffix=".png", splits=("train", "val")):
    for split in splits:
        for i in range(NUM_IMAGES[split]):
            write_image(root / split / CLASSES[i % 2] / f"{i:02d}{suffix}", i)
    return root


def lists(root, suffix=".png", label=lambda i: i % 2):
    for split, count in NUM_IMAGES.items():
        lines = []
        for i in range(count):
            write_image(root / "all images" / f"{split} {i}{suffix}", i)
            lines.append(f"all images/{split} {i}{suffix} {label(i)}")
        (root / f"{split}.txt").write_text("\n".join([*lines, "", ""]))
    return root


def encoded(i):
    file = io.BytesIO()
    Image.fromarray(picture(i)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{i}.png"}


def npy_bytes(i):
    file = io.BytesIO()
    np.save(file, bands(i))
    return file.getvalue()


def table(count, images=encoded, kind=None, labels=None, names=("image", "label"), label_kind=None):
    features = datasets.Features(
        {
            names[0]: kind or datasets.Image(),
            names[1]: label_kind or datasets.ClassLabel(names=list(CLASSES)),
        }
    )
    values = [i % 2 for i in range(count)] if labels is None else labels
    rows = {names[0]: [images(i) for i in range(count)], names[1]: values}
    return datasets.Dataset.from_dict(rows, features=features)


def parquet_folder(root, **options):
    root.mkdir(parents=True, exist_ok=True)
    table(6, **options).to_parquet(root / "train-00000-of-00001.parquet")
    table(4, **options).to_parquet(root / "validation.parquet")
    return root


@pytest.fixture
def load(tmp_path):
    return lambda source, **options: load_data(str(source), cache_dir=tmp_path / "cache", **options)


def check(data, suffix, name):
    assert data.class_names in (CLASSES, ("0", "1"))
    assert data.name == name
    assert data.test is None
    assert data.channels == RGB if suffix == ".png" else len(data.channels) == 5
    for split, count in ((data.train, 6), (data.validation, 4)):
        assert len(split) == count
        found = sorted((int(image.long().sum()), label) for image, label in split)
        assert found == sorted((int(expected(i, suffix).sum()), i % 2) for i in range(count))
    image, label = data.train[0]
    assert image.dtype == (torch.uint8 if suffix == ".png" else torch.uint16)
    assert label == data.train.labels()[0]
    assert any(torch.equal(image.long(), expected(i, suffix)) for i in range(6))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
@pytest.mark.parametrize("write", [class_folders, lists])
def test_folders_and_lists(tmp_path, load, write, suffix):
    check(load(write(tmp_path / "data", suffix)), suffix, "data")


def test_lists_with_class_names_and_a_single_list(tmp_path, load):
    root = lists(tmp_path / "data", label=lambda i: CLASSES[i % 2])
    check(load(root), ".png", "data")
    single = load(root / "val.txt")
    assert single.train is None
    assert len(single.validation) == 4


@pytest.mark.parametrize(
    ("images", "kind", "suffix"),
    [
        (encoded, datasets.Image(), ".png"),
        (lambda i: encoded(i)["bytes"], datasets.Value("binary"), ".png"),
        (npy_bytes, datasets.Value("binary"), ".npy"),
        (bands, datasets.Array3D((5, 10, 12), "uint16"), ".npy"),
    ],
)
def test_parquet_with_images_binary_and_arrays(tmp_path, load, images, kind, suffix):
    root = parquet_folder(tmp_path / "data", images=images, kind=kind)
    check(load(root), suffix, "data")


def test_parquet_by_folder_and_alone_and_saved_to_disk(tmp_path, load):
    for split, count in (("train", 6), ("validation", 4)):
        (tmp_path / "data" / "default" / split).mkdir(parents=True)
        table(count).to_parquet(tmp_path / "data" / "default" / split / "0000.parquet")
    check(load(tmp_path / "data"), ".png", "data")
    alone = load(tmp_path / "data/default/train/0000.parquet")
    assert len(alone.train) == 6
    saved = datasets.DatasetDict({"train": table(6), "validation": table(4)})
    saved.save_to_disk(tmp_path / "saved")
    check(load(tmp_path / "saved"), ".png", "saved")


def test_columns_are_found_by_type_and_by_name(tmp_path, load):
    root = parquet_folder(tmp_path / "data", names=("photo", "kind"))
    check(load(root), ".png", "data")
    check(load(root, image_column="photo", label_column="kind"), ".png", "data")
    with pytest.raises(
        ValueError, match=r"train has no column 'imgae'.*photo, kind.*--image-column"
    ):
        load(root, image_column="imgae")
    with pytest.raises(ValueError, match=r"no column 'klass' for the labels.*--label-column"):
        load(root, label_column="klass")
    other = parquet_folder(
        tmp_path / "other",
        names=("x", "y"),
        images=npy_bytes,
        kind=datasets.Value("binary"),
        label_kind=datasets.Value("int64"),
    )
    with pytest.raises(ValueError, match=r"no column for the images.*it has x, y"):
        load(other)
    check(load(other, image_column="x", label_column="y"), ".npy", "other")
    with pytest.raises(ValueError, match=r"holds .*int64.*not images"):
        load(other, image_column="y", label_column="y")
    with pytest.raises(ValueError, match="whole numbers"):
        load(parquet_folder(tmp_path / "real", labels=None, label_kind=datasets.Value("float32")))


def test_text_labels_are_sorted_and_class_names_order_them(tmp_path, load):
    root = class_folders(tmp_path / "data")
    assert load(root).class_names == CLASSES
    turned = load(root, class_names=["bee", "ant", "cat"])
    assert turned.class_names == ("bee", "ant", "cat")
    assert turned.train.labels() == [1 - label for label in load(root).train.labels()]
    columns = parquet_folder(tmp_path / "classlabel")
    assert load(columns, class_names=["bee", "ant"]).train.labels() == [1, 0, 1, 0, 1, 0]


def test_splits_by_other_names_and_left_out(tmp_path, load):
    root = class_folders(tmp_path / "data")
    (root / "val").rename(root / "holdout")
    assert load(root).validation is None
    assert len(load(root, splits={"validation": "holdout"}).validation) == 4
    assert load(root, splits={"train": None, "test": "holdout"}).train is None
    with pytest.raises(ValueError, match=r"no split 'dev'; it has holdout, train"):
        load(root, splits={"validation": "dev"})
    with pytest.raises(ValueError, match="Unknown split training"):
        load(root, splits={"training": "train"})
    with pytest.raises(ValueError, match="--train-split"):
        load(root, splits={"train": None})


def test_flat_folder_is_train_and_gives_a_validation_split(tmp_path, load):
    root = class_folders(tmp_path / "data") / "train"
    write_image(root / "train" / "00.png", 0)  # a class that is called like a split
    data = load(root)
    assert data.class_names == ("ant", "bee", "train")
    assert (data.validation, len(data.train)) == (None, 7)
    apart = load(root, validation_fraction=0.4)
    assert (len(apart.train), len(apart.validation)) == (4, 3)
    assert set(apart.validation.labels()) == {0, 1}
    assert set(apart.train.labels()) == {0, 1, 2}, "the only image of a class went to validation"
    with pytest.raises(ValueError, match="validation_fraction"):
        load(root, validation_fraction=1.0)


def test_limit_is_balanced_and_seeded():
    data = load_data("synthetic", limit=25)
    counts = [data.train.labels().count(c) for c in range(10)]
    assert (len(data.train), len(data.test), set(counts)) == (25, 25, {2, 3})
    same, other = (load_data("synthetic", limit=25, seed=s) for s in (0, 1))
    assert same.train._rows == data.train._rows != other.train._rows
    with pytest.raises(ValueError, match="limit is 0"):
        load_data("synthetic", limit=0)


def test_channels_are_said_or_guessed(tmp_path, load):
    root = class_folders(tmp_path / "data", ".tif")
    assert load(root).channels.is_anonymous
    named = load(root, channels="B02+B03+B04+B08+B11")
    assert named.channels.labels == ("B02", "B03", "B04", "B08", "B11")
    assert load(root, value_scale=10000).train[0][0].dtype == torch.float32
    with pytest.raises(ValueError, match="value_scale"):
        load(root, value_scale=0)
    gray = class_folders(tmp_path / "gray")
    Image.fromarray(picture(0)[..., 0]).save(gray / "train/ant/00.png")
    data = load(gray)
    assert data.channels == RGB
    assert data.train[0][0].shape[0] == 3
    assert load(gray, channels="anonymous").channels.is_anonymous
    with pytest.raises(ValueError, match=r"none of 6 images .* one reason.*5 planes.*--channels"):
        load(root, channels="RGB")
    np.save(root / "train/ant/zz.npy", bands(1, 4))
    with pytest.raises(ValueError, match=r"differ in their number of planes.*--channels"):
        load(root)


CORRUPTIONS = {".png": 60, ".jpg": 300, ".tif": 400, ".npy": 200}


@pytest.mark.parametrize("suffix", CORRUPTIONS)
@pytest.mark.parametrize("write", [class_folders, lists])
def test_a_corrupt_file_is_named_or_skipped(tmp_path, load, caplog, write, suffix):
    root = write(tmp_path / "data", suffix)
    victim = sorted((root / "train" / "bee").glob("*") if write is class_folders else
                    (root / "all images").glob("train*"))[1]  # fmt: skip
    victim.write_bytes(victim.read_bytes()[: CORRUPTIONS[suffix]])
    data = load(root)
    named = rf"data/train row \d+ \(.*{victim.name}\) cannot be read: .*--skip-corrupt"
    with pytest.raises(ValueError, match=named):
        list(data.train)
    with caplog.at_level(logging.WARNING):
        rest = load(root, skip_corrupt=True)
    assert (len(rest.train), rest.train.num_skipped, rest.validation.num_skipped) == (5, 1, 0)
    assert victim.name in rest.train.skipped[0]
    assert "--skip-corrupt" not in rest.train.skipped[0]
    assert "1 images skipped" in caplog.text
    assert len(rest.train.labels()) == 5
    assert all(image.shape[0] == len(rest.channels) for image, _ in rest.train)


def test_a_corrupt_row_is_named_in_a_worker_too(tmp_path, load):
    def images(i):
        return {"bytes": b"broken", "path": None} if i == 2 else encoded(i)

    root = parquet_folder(tmp_path / "data", images=images)
    data = load(root)
    with pytest.raises(ValueError, match="train row 2 cannot be read: it is no image"):
        list(DataLoader(data.train, batch_size=None, num_workers=1))
    rest = load(root, skip_corrupt=True)
    assert (len(rest.train), rest.validation.num_skipped) == (5, 1)


def test_a_missing_file_is_named_or_skipped(tmp_path, load):
    root = lists(tmp_path / "data")
    (root / "all images" / "train 4.png").unlink()
    with pytest.raises(ValueError, match=r"row 4 \(all images/train 4.png\).*no such file"):
        list(load(root).train)
    assert load(root, skip_corrupt=True).train.num_skipped == 1


def test_nothing_left_is_an_error(tmp_path, load):
    root = class_folders(tmp_path / "data")
    for file in (root / "val").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="Nothing of validation is left: 4 rows"):
        load(root, skip_corrupt=True)
    shutil.rmtree(root / "train")
    with pytest.raises(ValueError, match=r"none of 4 images.*it is no image"):
        load(root)


@pytest.mark.parametrize("bad", [7, -1, None])
def test_label_out_of_range_in_parquet(tmp_path, load, bad):
    root = parquet_folder(tmp_path / "data")
    file = root / "validation.parquet"
    old = parquet.read_table(file)
    labels = old["label"].to_pylist()
    labels[2] = bad
    position = old.schema.get_field_index("label")
    new = old.set_column(position, old.schema.field(position), [labels])
    parquet.write_table(new, file)
    said = "has no label" if bad is None else rf"has label {bad}, out of range 0\.\.1"
    with pytest.raises(
        ValueError, match=rf"data/validation row 2 \(2.png\) {said}.*--skip-corrupt"
    ):
        load(root)
    rest = load(root, skip_corrupt=True)
    assert (len(rest.validation), rest.validation.num_skipped, rest.train.num_skipped) == (3, 1, 0)


def test_label_out_of_range_in_lists(tmp_path, load):
    root = lists(tmp_path / "data", label=lambda i: 5 if i == 3 else i % 2)
    with pytest.raises(ValueError, match=r"Label 5 in row 3 is out of range.*no image has label 2"):
        load(root)
    with pytest.raises(ValueError, match=r"train row 3 .*label 5, out of range 0\.\.1"):
        load(root, class_names=CLASSES)
    rest = load(root, class_names=CLASSES, skip_corrupt=True)
    assert (len(rest.train), rest.train.num_skipped) == (5, 1)


def test_class_that_training_does_not_have(tmp_path, load):
    root = class_folders(tmp_path / "data")
    (root / "val" / "bee").rename(root / "val" / "cat")
    with pytest.raises(
        ValueError, match=r"validation row 2 .*'cat', which is none of the 2 classes"
    ):
        load(root)


def test_empty_splits_and_folders(tmp_path, load):
    root = class_folders(tmp_path / "data")
    shutil.rmtree(root / "val")
    (root / "val" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"data/validation is empty.*splits="):
        load(root)
    assert len(load(root, splits={"validation": None}).train) == 6
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"nothing has no images in class folders.*train\.txt"):
        load(tmp_path / "nothing")
    table(2).select([]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="is empty"):
        load(tmp_path / "test.parquet")
    (tmp_path / "train.txt").write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        load(tmp_path / "train.txt")


def test_broken_lists_and_parquet(tmp_path, load):
    (tmp_path / "train.txt").write_text("a.png 0\nb.png\n")
    with pytest.raises(ValueError, match=r"train.txt line 2 is 'b.png'; it needs 'path label'"):
        load(tmp_path / "train.txt")
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load(tmp_path / "train.txt")
    root = parquet_folder(tmp_path / "data")
    (root / "validation.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(ValueError, match=r"Cannot read the Parquet file .*validation\.parquet: "):
        load(root)


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "x/y.parquet", "lists/train.txt"])
def test_paths_that_are_not_there(source):
    with pytest.raises(FileNotFoundError, match=rf"There is no {source}\. Check the path"):
        load_data(source)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ValueError, match=r"is no \.parquet, \.txt, \.csv"):
        load_data(str(tmp_path / "a.doc"))
    with pytest.raises(ValueError, match="num_images is for 'synthetic'"):
        load_data(str(tmp_path), num_images={"train": 3})


@pytest.mark.parametrize("name", ["mini-imagenet", "timm/mini-imagenet"])
def test_hub_names_without_network(monkeypatch, tmp_path, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="unset HF_HUB_OFFLINE") as caught:
        load_data(name, cache_dir=tmp_path)
    assert str(caught.value).startswith("Data 'timm/mini-imagenet' is no local path")
    assert "\n" not in str(caught.value)


def test_hub_data_by_its_name(monkeypatch):
    asked = []

    def load_dataset(name, cache_dir=None, streaming=False):
        asked.append(name)
        return datasets.DatasetDict({"train": table(6), "validation": table(4)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check(load_data("mini-imagenet"), ".png", "timm/mini-imagenet")
    assert asked == ["timm/mini-imagenet"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the 50-class subset of Tiny-ImageNet is not here")
def test_real_photographs(load):
    data = load(REAL, splits={"train": None})
    assert (len(data.class_names), len(data.validation), data.train) == (50, 1250, None)
    assert data.channels == RGB
    assert {data.validation.labels().count(c) for c in range(50)} == {25}
    assert {image.shape for image, _ in data.validation} == {(3, 64, 64)}  # some files are gray
    assert len(load(REAL / "validation.parquet", limit=100).validation) == 100


def test_parquet_of_different_columns(tmp_path, load):
    root = parquet_folder(tmp_path / "data")
    table(3, names=("photo", "label")).to_parquet(root / "validation.parquet")
    with pytest.raises(ValueError, match=r"Cannot read the Parquet files of .*same columns"):
        load(root)


def test_splits_pickle_for_spawned_workers(tmp_path, load):
    for data in (load(parquet_folder(tmp_path / "data")), load_data("synthetic", img_size=16)):
        image, label = pickle.loads(pickle.dumps(data.train))[3]
        assert torch.equal(image.float(), data.train[3][0].float())
        assert label == data.train[3][1]

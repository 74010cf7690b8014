"""What a walk finds and says that it leaves out; labels that never mix; scale that is compared."""

import logging
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from timm_varchan.channels import RGB, ChannelSet
from timm_varchan.data import eval_transform, find_images, load_data, measure_split, train_transform
from timm_varchan.errors import UserError


def save(path, value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    array = rng.integers(0, 256, (8, 8, 3), np.uint8) if value is None else value
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        Image.fromarray(array).save(path)
    return path


def class_folders(root, *names, count=2, suffix=".png"):
    for name in names:
        for number in range(count):
            save(root / name / f"{number}{suffix}")
    return root


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("Train", "Val", "Test"), "train validation test"),
        (("TRAINING", "Validation", "Testing"), "train validation test"),
        (("train", "dev"), "train validation"),
        (("Test",), "test"),
    ],
)
def test_splits_are_found_in_any_case(tmp_path, splits, expected):
    for split in splits:
        class_folders(tmp_path / split, "cat", "dog")
    data = load_data(str(tmp_path))
    assert data.class_names == ("cat", "dog")
    found = [s for s in ("train", "validation", "test") if getattr(data, s) is not None]
    assert found == expected.split()
    if os.path.normcase("A") == "A" and splits[0] == "Train":  # a file system that tells them apart
        class_folders(tmp_path / "train", "cat", "dog")
        with pytest.raises(UserError, match=r"'train' twice.*--train-split"):
            load_data(str(tmp_path))
        assert len(load_data(str(tmp_path), splits={"train": "Train"}).train) == 4


def test_folders_that_look_like_splits_are_refused_with_the_flags_that_say_which(tmp_path):
    for split in ("seg_train", "seg_test"):
        class_folders(tmp_path / split / split, "forest", "sea")
    with pytest.raises(UserError, match=r"seg_test and seg_train look like splits.*--train-split"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), splits={"train": "seg_train", "test": "seg_test"})
    assert data.class_names == ("forest", "sea")
    assert (len(data.train), len(data.test)) == (4, 4)
    assert load_data(str(tmp_path), splits={"train": "."}).class_names == ("seg_test", "seg_train")


def test_classes_that_hold_the_same_folders_are_refused(tmp_path):
    for fold in ("part1", "part2"):
        class_folders(tmp_path / fold, "cat", "dog")
    with pytest.raises(UserError, match=r"part1 and part2 look like splits.*cat, dog"):
        load_data(str(tmp_path))
    assert load_data(str(tmp_path), splits={"train": "."}).class_names == ("part1", "part2")
    assert len(load_data(str(tmp_path), splits={"train": "part1", "test": "part2"}).test) == 4


def test_classes_may_have_words_of_splits_and_folders_of_their_own(tmp_path):
    class_folders(tmp_path / "bullet_train", "old", "new")
    class_folders(tmp_path / "test_tube", "glass", "plastic")
    class_folders(tmp_path, "train")
    data = load_data(str(tmp_path))
    assert data.class_names == ("bullet_train", "test_tube", "train")
    assert len(data.train) == 10


def test_a_folder_around_the_data_is_unwrapped(tmp_path, caplog):
    class_folders(tmp_path / "archive" / "PetImages", "cat", "dog")
    with caplog.at_level(logging.INFO):
        assert load_data(str(tmp_path)).class_names == ("cat", "dog")
    assert "reading archive/PetImages in it" in caplog.text
    for split in ("train", "val"):
        class_folders(tmp_path / "other" / "inner" / split, "cat", "dog")
    data = load_data(str(tmp_path / "other"))
    assert (len(data.train), len(data.validation)) == (4, 4)


def test_links_are_followed_and_loops_end(tmp_path):
    class_folders(tmp_path / "store", "a")
    data = class_folders(tmp_path / "data", "b", "c")
    (data / "a").symlink_to(tmp_path / "store" / "a")
    (data / "b" / "again").symlink_to(data)
    (data / "c" / "2.png").symlink_to(data / "c" / "0.png")
    loaded = load_data(str(data))
    assert loaded.class_names == ("a", "b", "c")
    assert loaded.train.labels().count(2) == 3
    assert loaded.train.labels().count(0) == 2
    assert len(find_images([data])) == len(loaded.train)
    (data / "c" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match=r"lost\.png\) cannot be read: there is no such file"):
        list(load_data(str(data)).train)


def test_what_is_left_out_is_said(tmp_path, caplog):
    root = class_folders(tmp_path, "cat", "dog")
    save(root / "loose.png")
    (root / "cat" / "x.heic").write_bytes(b"")
    (root / "notes" / "a.txt").parent.mkdir()
    (root / "notes" / "a.txt").write_text("x")
    (root / "README.md").write_text("x")
    for hidden in (".DS_Store", "cat/._0.png", ".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png"):
        (root / hidden).parent.mkdir(parents=True, exist_ok=True)
        (root / hidden).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        data = load_data(str(root))
    assert (data.class_names, len(data.train)) == (("cat", "dog"), 4)
    assert "left out 1 files by their ending: 1 .heic" in caplog.text
    assert "left out 1 images that lie in no class folder" in caplog.text
    assert "notes holds no images (but 1 .txt) and is no class" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(find_images([root])) == 5
    assert "1 .heic" in caplog.text
    class_folders(root / "train", "cat", "dog")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(load_data(str(root)).train) == 4
    assert "left out cat, dog, which is none of the splits" in caplog.text


@pytest.mark.parametrize("name", ["run[1]", "what?", "a*b", "data [v2]", "q{a,b}", "x**y"])
@pytest.mark.parametrize("streaming", [False, True])
def test_paths_are_no_patterns(tmp_path, name, streaming):
    from timm_varchan.data import stream_data

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    for folder, count in ((name, 4), ("run1", 2), ("whatX", 2), ("aXb", 2)):
        (tmp_path / folder).mkdir()
        rows = {"image": [picture] * count, "label": [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / folder / "train.parquet")
    if streaming:
        assert len(stream_data(str(tmp_path / name)).train) == 4
    else:
        assert len(load_data(str(tmp_path / name), cache_dir=tmp_path / "cache").train) == 4
    class_folders(tmp_path / f"{name} folders", "a", "b")
    assert len(load_data(str(tmp_path / f"{name} folders")).train) == 4


# Labels -----------------------------------------------------------------------------------------


def lists(root, **texts):
    save(root / "x.png")
    for split, labels in texts.items():
        (root / f"{split}.txt").write_text("".join(f"x.png {label}\n" for label in labels))
    return str(root)


def test_numbers_among_names_that_are_numbers_go_by_name(tmp_path):
    root = lists(tmp_path, test=[2, 10, 0])
    names = tuple(sorted(str(n) for n in range(12)))
    data = load_data(root, class_names=names)
    assert [names[i] for i in data.test.labels()] == ["2", "10", "0"]
    padded = load_data(root, class_names=[f"{n:03d}" for n in range(12)])
    assert padded.test.labels() == [2, 10, 0]
    with pytest.raises(UserError, match="label 10"):
        load_data(root, class_names=["0", "2", "4"])


def test_numbers_and_names_do_not_mix(tmp_path, caplog):
    with pytest.raises(UserError, match="label '0', which is none of the 2 classes"):
        load_data(lists(tmp_path / "a", train=["sea", "lake"], val=[0, 1]))
    with pytest.raises(UserError, match="label 'sea', which is none of the 2 classes"):
        load_data(lists(tmp_path / "b", train=[0, 1], val=["sea"]))
    mixed = lists(tmp_path / "c", train=["0", "1", "a"], val=["0", "1"])  # digits and letters
    assert load_data(mixed).validation.labels() == [0, 1]
    tables = {
        "train": datasets.Features({"label": datasets.ClassLabel(names=["sea", "lake"])}),
        "test": datasets.Features({"label": datasets.Value("int64")}),
    }
    root = tmp_path / "saved"
    datasets.DatasetDict({
        split: datasets.Dataset.from_dict(
            {"label": [0, 1], "image": [npy(), npy()]},
            datasets.Features({**features, "image": datasets.Value("binary")}),
        )
        for split, features in tables.items()
    }).save_to_disk(root)  # fmt: skip
    with pytest.raises(UserError, match="labels of test are numbers, those of train are names"):
        load_data(str(root))
    with caplog.at_level(logging.WARNING):
        positions = load_data(lists(tmp_path / "d", test=[1, 0]), class_names=["sea", "lake"])
    assert positions.test.labels() == [1, 0]
    assert "taken as positions among the classes sea, lake: 0 is sea" in caplog.text


def npy():
    import io

    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8))
    return file.getvalue()


def test_several_labels_an_image_are_called_so(tmp_path):
    rows = {"image": [npy()] * 2, "label": [[0], [0, 1]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="several labels an image"):
        load_data(str(tmp_path), cache_dir=tmp_path / "cache")


def test_lists_with_a_byte_order_mark(tmp_path):
    save(tmp_path / "x.png")
    (tmp_path / "train.txt").write_text("x.png sea\nx.png lake\n", encoding="utf-8-sig")
    assert len(list(load_data(str(tmp_path)).train)) == 2


def test_validation_never_takes_the_only_image_of_a_class(tmp_path):
    root = class_folders(tmp_path, "a", "b", count=5)
    save(root / "rare" / "0.png")
    for fraction in (0.1, 0.3, 0.9):
        data = load_data(str(root), validation_fraction=fraction)
        assert set(data.train.labels()) == {0, 1, 2}
        assert set(data.validation.labels()) <= {0, 1}
        assert len(data.train) + len(data.validation) == 11
    single = class_folders(tmp_path / "single", "a", "b", count=1)
    assert load_data(str(single), validation_fraction=0.5).validation is None


# Scale ------------------------------------------------------------------------------------------


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


# No data ----------------------------------------------------------------------------------------


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

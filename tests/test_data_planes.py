"""Operations on any number of planes, images kept in memory, channels kept in files."""

import io
import json

import datasets
import numpy as np
import pytest
import torch

from timm_varchan.__main__ import main
from timm_varchan.channels import ChannelSet, write_channels
from timm_varchan.data import (
    ImageSplit,
    Reading,
    cached,
    channel_stats,
    load_data,
    train_transform,
)
from timm_varchan.data.transforms import OPERATIONS, RandomOperations
from timm_varchan.input_spec import InputSpec


def measure(words):
    return main(["measure", *words])


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("num_channels", [1, 2, 3, 13])
def test_operations_take_any_planes_and_do_something(name, num_channels):
    x = torch.randn(num_channels, 24, 20, generator=torch.Generator().manual_seed(0))
    for strength in (-1.0, 0.3, 1.0):
        changed = OPERATIONS[name](x.clone(), strength)
        assert changed.shape == x.shape
        assert changed.isfinite().all()
        # Of one plane there is no saturation.
        same = name == "identity" or (name == "colour" and num_channels == 1)
        assert torch.allclose(changed, x) == same
    flat = torch.ones(num_channels, 5, 5)
    assert OPERATIONS[name](flat, 1.0).isfinite().all()


def test_half_the_strength_changes_less():
    x = torch.randn(4, 24, 24)
    for name in ("rotate", "brightness", "contrast", "colour", "sharpness", "posterize"):
        less, more = ((OPERATIONS[name](x, s) - x).square().mean() for s in (0.1, 1.0))
        assert less < more, name


def test_the_planes_move_together():
    x = torch.randn(1, 24, 24).expand(5, -1, -1)
    for name in ("rotate", "shear_x", "translate_y", "solarize", "posterize"):
        changed = OPERATIONS[name](x, 0.7)
        assert torch.equal(changed[0], changed[4])


def test_random_operations_are_drawn_from_torchs_generator():
    x = torch.randn(3, 16, 16)
    for augment in (RandomOperations(), RandomOperations(2, 0.9)):
        outcomes = []
        for seed in (0, 0, 1, 2, 3, 4):
            torch.manual_seed(seed)
            outcomes.append(augment(x))
        assert torch.equal(outcomes[0], outcomes[1])
        assert any(not torch.equal(outcomes[0], other) for other in outcomes[2:])


@pytest.mark.parametrize("options", [{"auto_augment": "rand"}, {"erase_prob": 1.0}])
def test_the_training_transform_has_them(options):
    channels = ChannelSet.anonymous(4).with_stats([0.5] * 4, [0.25] * 4)
    image = torch.rand(4, 16, 16)
    torch.manual_seed(0)
    plain = train_transform(16, channels)(image)
    torch.manual_seed(0)
    assert not torch.equal(train_transform(16, channels, **options)(image), plain)


def test_images_in_memory_are_the_images(monkeypatch):
    data = load_data("synthetic", channels="R+NIR", img_size=16, limit=9)
    kept = cached(data.train)
    assert kept.labels() == data.train.labels()
    assert kept.channels == data.train.channels
    for index in range(len(kept)):
        assert torch.equal(kept[index][0], data.train[index][0])
        assert kept[index][0].dtype == data.train[index][0].dtype
    assert kept[3][0].data_ptr() == kept[3][0].data_ptr()
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1000}))
    with pytest.raises(ValueError, match=r"Leave --cache out"):
        cached(data.train)


def test_images_of_several_sizes_are_kept_too(tmp_path):
    for number, size in enumerate([(2, 5, 6), (2, 5, 6), (2, 8, 4)]):
        folder = tmp_path / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", np.full(size, number, np.uint16))
    split = load_data(str(tmp_path)).train
    kept = cached(split)
    assert [tuple(x.shape) for x, _ in kept] == [tuple(x.shape) for x, _ in split]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(kept, split, strict=True))


def test_the_memory_of_all_images_counts(monkeypatch):
    """Small and large images: estimated from many of them, and counted where that fails."""

    sizes = [torch.zeros(1, 10, 10 if row % 2 == 0 else 50, dtype=torch.uint8) for row in range(40)]
    reading = Reading(InputSpec(channels=ChannelSet.anonymous(1)))
    split = ImageSplit(sizes, [0] * 40, reading)  # 12,000 bytes, 4,000 if all were like the first
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 9000}))
    with pytest.raises(ValueError, match=r"^40 images.*Leave --cache out"):
        cached(split)
    monkeypatch.setattr("random.Random.sample", lambda *args: [0])
    with pytest.raises(ValueError, match=r"^The first 2\d of 40 images.*Leave --cache out"):
        cached(split)
    with pytest.raises(ValueError, match=r"^40 images.*2 processes"):
        cached(split, num_copies=2)


def test_channels_are_measured_and_kept_in_a_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(4):
        folder = tmp_path / "data" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number}.npy", rng.integers(0, 9000, (4, 8, 8)).astype(np.uint16))
    file = str(tmp_path / "channels.json")
    args = [str(tmp_path / "data"), "--channels", "B02+B03+B04+B08", "--value-scale", "10000"]
    assert measure([*args, "--output", file]) == 0
    assert "B08" in capsys.readouterr().out
    channels = ChannelSet.parse(file)
    split = load_data(args[0], channels="B02+B03+B04+B08", value_scale=10000.0).train
    assert (list(channels.mean), list(channels.std)) == channel_stats(split)
    assert channels.names == ("B02", "B03", "B04", "B08")
    assert json.loads((tmp_path / "channels.json").read_text()) == channels.to_dict()
    assert channels.value_scale == 10000
    assert channels.correlation is not None
    assert (
        write_channels(channels, tmp_path / "again.json").read_text()
        == (tmp_path / "channels.json").read_text()
    )


def test_columns_and_split_of_what_is_measured_can_be_named(tmp_path, capsys):
    images = {"good": np.full((2, 4, 4), 51, np.uint8), "bad": np.zeros((2, 4, 4), np.uint8)}
    encoded = {name: io.BytesIO() for name in images}
    for name, file in encoded.items():
        np.save(file, images[name])
    rows = {name: [file.getvalue()] * 2 for name, file in encoded.items()} | {"kind": ["a", "b"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "fitting.parquet")
    rows["bad"], rows["good"] = rows["good"], rows["bad"]
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    args = [str(tmp_path), "--image-column", "good", "--train-split", "fitting"]
    assert measure(args) == 1
    assert "--label-column" in capsys.readouterr().err
    assert measure([*args, "--label-column", "kind"]) == 0
    assert capsys.readouterr().out.count("mean 0.2 ") == 2


def test_what_is_no_file_of_channels_is_refused(tmp_path, capsys):
    empty = json.dumps(ChannelSet().to_dict())
    for content in ("{}", "[]", '""', "null", '[{"name": "R"}]', empty):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match=r"holds no channels.*a list of channels"):
            ChannelSet.parse(str(tmp_path / "other.json"))
    (tmp_path / "other.json").write_text("[1, 2]")
    for name in ("other.json", "nothing.json"):
        with pytest.raises(ValueError, match=r"holds no channels.*timm-varchan measure"):
            ChannelSet.parse(str(tmp_path / name))
    assert measure([str(tmp_path / "nothing")]) == 1
    assert "error: " in capsys.readouterr().err

"""What a run begins with: planes of the files and their names, a saved model, streamed images."""

import dataclasses
import json
import logging

import datasets
import numpy as np
import pyarrow.parquet as parquet
import pytest
import timm
import torch
from PIL import Image
from test_training import interrupt_at
from tiny_runs import REFUSED, TINY, forget_accelerate, fresh_accelerate, image_folder  # noqa: F401
from torch.utils.data import DataLoader
from trees import names_of, npy_bytes

import timm_varchan
from timm_varchan import Channel, ChannelSet, hub
from timm_varchan.data import ImageData, ImageStream, check_workers, stream_data
from timm_varchan.hub import save
from timm_varchan.input_spec import InputSpec
from timm_varchan.training import (
    EvaluateConfig,
    Interrupted,
    TrainConfig,
    evaluate,
    run,
)
from timm_varchan.training.train import build_model

# ---- planes and their names

NAMES = ["DNA", "ER", "RNA", "AGP", "Mito"]


@pytest.fixture(scope="module")
def planes(tmp_path_factory):
    """Five planes without names, plane i about 40 * i."""
    rng = np.random.default_rng(0)

    def image(*_):
        noise = rng.integers(0, 30, (5, 16, 16))
        return (noise + 40 * np.arange(5)[:, None, None]).astype(np.uint8)

    return image_folder(tmp_path_factory.mktemp("planes"), image, {"train": 8, "val": 4})


@pytest.fixture
def config(planes, tmp_path):
    return dataclasses.replace(
        TINY, dataset=planes, channels=None, limit=None, epochs=1, eval_modes=None,
        sets="6", output_dir=str(tmp_path / "run"),
    )  # fmt: skip


def channels_of(outcome):
    return [c.get("name") for c in outcome.results["data"]["channels"]["channels"]]


def test_planes_without_names_are_called_by_their_place(config, caplog):
    with caplog.at_level(logging.WARNING):
        outcome = run(config)
    assert channels_of(outcome) == ["c0", "c1", "c2", "c3", "c4"]
    assert "called c0+c1+c2+c3+c4" in caplog.text
    means = [c["mean"] for c in outcome.results["data"]["channels"]["channels"]]
    assert means == pytest.approx([(14.5 + 40 * i) / 255 for i in range(5)], abs=0.01)
    saved = hub.load(outcome.folder / "model")
    assert str(saved.select("c4+c1")) == "c4+c1"


def test_names_that_nobody_knows(config):
    outcome = run(dataclasses.replace(config, channels="+".join(NAMES), new_names=True))
    assert channels_of(outcome) == NAMES
    saved = hub.load(outcome.folder / "model")
    assert str(saved.select("ER+AGP")) == "ER+AGP"
    with pytest.raises(ValueError, match="'Golgi'"):
        saved.select("ER+Golgi")


def test_a_model_of_some_planes_is_tested_on_whole_files(config, tmp_path):
    config = dataclasses.replace(config, channels="B02+B03+B04+B08+B11", use="B08+B03")
    trained = run(config)
    assert channels_of(trained) == ["B08", "B03"]
    means = [c["mean"] for c in trained.results["data"]["channels"]["channels"]]
    assert means == pytest.approx([(14.5 + 40 * i) / 255 for i in (3, 1)], abs=0.01)
    evaluated = {s["channels"] for s in trained.results["evaluation"]["sets"]}
    assert evaluated == {"B08+B03", "B08", "B03"}
    forget_accelerate()
    again = evaluate(
        EvaluateConfig(
            model=str(trained.folder / "model"), dataset=config.dataset, workers=0,
            channels=config.channels, use=config.use,
        )
    )  # fmt: skip
    sets = [run.results["evaluation"]["sets"][0]["accuracy"]["value"] for run in (trained, again)]
    assert sets[0] == sets[1]
    expected = json.loads((trained.folder / "model" / "config.json").read_text())["input"][
        "channels"
    ]
    assert again.results["data"]["channels"]["channels"] == expected["channels"]


def test_what_cannot_be_used_is_refused(config):
    with pytest.raises(REFUSED, match="'B99'"):
        run(dataclasses.replace(config, use="B99"))
    with pytest.raises(ValueError, match="leave --streaming out"):
        TrainConfig(streaming=True, epoch_images=8, use="R")


# ---- a saved model

STAINS = ChannelSet((Channel("DNA"), Channel("ER"))).with_stats((0.5, 0.5), (0.25, 0.25))


def saved(folder, name, channels, class_names="abc", **kwargs):
    model = timm.create_model(
        name, num_classes=len(class_names), in_chans=len(channels), **kwargs
    ).eval()
    if name.startswith("dwg_"):
        timm_varchan.set_channels(model, channels)
    save(
        model, folder, class_names=class_names, channels=channels, img_size=24, crop_pct=0.75,
    )  # fmt: skip
    return model


def colours(folder, names):
    """A folder of images whose class is their colour."""
    for name in names:
        (folder / "test" / name).mkdir(parents=True)
        for number in range(4):
            colour = {"red": (250, 9, number), "blue": (0, number, 250), "grey": (99,) * 3}[name]
            Image.new("RGB", (30, 26), colour).save(folder / "test" / name / f"{number}.png")
    return str(folder)


def test_a_plain_model_is_evaluated_as_it_was_saved(tmp_path):
    # Its classes are in another order than the folder's, and one of them has no images.
    rgb = timm_varchan.RGB.with_stats((0.5,) * 3, (0.5,) * 3)
    names = ("red", "grey", "blue")
    model = saved(tmp_path / "m", "test_resnet", rgb, names)
    data = colours(tmp_path / "data", ("blue", "red"))
    outcome = evaluate(EvaluateConfig(model=str(tmp_path / "m"), dataset=data, workers=0))
    assert outcome.results["model"]["name"] == "test_resnet"
    assert outcome.results["data"]["class_names"] == list(names)
    assert outcome.results["data"]["img_size"] == 24
    assert outcome.results["data"]["crop_pct"] == 0.75
    assert {s.mode for s in outcome.sets} == {"mask"}
    expected = []
    for colour in ((0, 0, 250), (250, 9, 0)):
        x = (torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 24, 24) / 255 - 0.5) / 0.5
        expected += [int(model(x).argmax())] * 4
    whole = next(s for s in outcome.sets if s.size == 3)
    assert whole.references.tolist() == [2] * 4 + [0] * 4
    assert whole.predictions.tolist() == expected


def test_other_data_than_the_models_is_refused(tmp_path):
    saved(tmp_path / "m", "dwg_test_resnet", STAINS, channel_names=("DNA", "ER"))
    config = EvaluateConfig(
        model=str(tmp_path / "m"), output=str(tmp_path / "run"), channels="RG", workers=0
    )
    with pytest.raises(REFUSED, match="3 classes, the data 10"):
        evaluate(config)
    with pytest.raises(REFUSED, match="no"):
        evaluate(dataclasses.replace(config, model=str(tmp_path / "nothing")))
    assert not (tmp_path / "run").exists()


def test_an_absent_file_is_not_the_mean_in_evaluation(tmp_path):
    saved(tmp_path / "m", "dwg_test_resnet", STAINS, "ab", channel_names=("DNA", "ER"))
    for name in names_of("{a,b}/{0,1}_{DNA,ER}.npy"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "data" / name, np.random.default_rng(0).random((8, 8), np.float32))
    (tmp_path / "data/b/1_ER.npy").unlink()
    config = EvaluateConfig(
        model=str(tmp_path / "m"), dataset=str(tmp_path / "data"), output=str(tmp_path / "run"),
        workers=0,
    )  # fmt: skip
    with pytest.raises(REFUSED, match=r"1_DNA\.npy\) has no file for ER; --no-data mean"):
        evaluate(config)
    forget_accelerate()
    filled = evaluate(dataclasses.replace(config, no_data="mean"))
    assert filled.results["data"]["no_data"] == "mean"


def test_no_twin_of_a_twin_is_suggested(tmp_path):
    rgb = timm_varchan.RGB.with_stats((0.5,) * 3, (0.5,) * 3)
    saved(tmp_path / "m", "test_resnet", rgb)
    config = dataclasses.replace(
        TINY, model=f"local-dir:{tmp_path / 'm'}", channels=None, output_dir=str(tmp_path / "run")
    )
    with pytest.raises(REFUSED, match="Choose --adapt") as error:
        run(config)
    assert "dwg_" not in str(error.value)


def test_a_saved_model_takes_further_arguments_and_new_names(tmp_path):
    before = saved(tmp_path / "m", "dwg_test_resnet", STAINS, channel_names=("DNA", "ER"))
    config = dataclasses.replace(
        TINY, model=f"local-dir:{tmp_path / 'm'}", model_kwargs={"drop_rate": 0.25}
    )
    more = ChannelSet((*STAINS.channels, Channel("AGP"), Channel("NIR", wavelength_nm=842.0)))
    spec = InputSpec(channels=more, class_names=tuple("abcde"), img_size=32)
    model = build_model(config, ImageData(spec=spec, name="data"))
    assert model.drop_rate == 0.25
    assert model.num_classes == 5
    (mixer,) = timm_varchan.models.stems(model)
    assert mixer.channel_names == ("DNA", "ER", "AGP")
    (old,) = timm_varchan.models.stems(before)
    assert torch.equal(mixer.vocabulary.weight[:3], old.vocabulary.weight)
    timm_varchan.set_channels(model, more)
    assert model(torch.randn(2, 4, 32, 32)).shape == (2, 5)


# ---- streams

LOSSES = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "lr")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three Parquet files of 16 images whose first pixel is their number; 12 for validation."""
    path = tmp_path_factory.mktemp("shards")
    for name, numbers in (
        *((f"train-{i:05d}-of-00003", range(16 * i, 16 * i + 16)) for i in range(3)),
        ("validation-00000-of-00001", range(12)),
    ):
        labels = [number % 2 for number in numbers]
        write_rows(path / f"{name}.parquet", map(encoded, numbers), labels)
    return path


def encoded(number):
    image = np.random.default_rng(number).integers(0, 200, (2, 16, 16)).astype(np.uint8)
    image[:, 0, 0] = number
    return npy_bytes(image)


def write_rows(path, images, labels):
    """A table whose labels may be out of range, which `ClassLabel` reads but does not write."""
    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"image": list(images), "label": [0] * len(labels)}
    table = datasets.Dataset.from_dict(rows, features=features).data.table
    column = table.schema.get_field_index("label")
    parquet.write_table(table.set_column(column, table.schema.field(column), [labels]), path)


def seen(data, *, processes=1, workers=0, epoch=0, num_batches=4, skip_corrupt=False):
    """The numbers of the images of every process's batches."""
    found = []
    for process in range(processes):
        stream = ImageStream(
            data, torch.nn.Identity(), num_batches=num_batches,
            batch_size=4, process=(process, processes), buffer_size=10,
            skip_corrupt=skip_corrupt,
        )  # fmt: skip
        stream.set_epoch(epoch)
        loader = DataLoader(stream, batch_size=4, num_workers=workers)
        batches = [x[:, 0, 0, 0].tolist() for x, _ in loader]
        assert [len(batch) for batch in batches] == [4] * num_batches
        found.append(batches)
    return found


def test_the_data_is_described_by_a_look(shards):
    data = stream_data(str(shards), channels="R+NIR")
    assert data.class_names == ("a", "b")
    assert data.channels.labels == ("R", "NIR")
    assert len(data.validation) == 12
    assert data.validation[5][1] == 1
    assert data.validation[5][0][0, 0, 0] == 5
    assert len(stream_data(str(shards), limit=4).validation) == 4
    assert stream_data(str(shards)).channels.is_anonymous
    with pytest.raises(ValueError, match="no Parquet files"):
        stream_data(__file__)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_image_comes_once_a_pass(shards, processes):
    data = stream_data(str(shards))
    batches = 12 // processes
    found = seen(data, processes=processes, num_batches=batches)
    numbers = [int(n) for process in found for batch in process for n in batch]
    assert sorted(numbers) == list(range(48))
    assert numbers != sorted(numbers)
    again = seen(data, processes=processes, num_batches=batches)
    assert again == found
    other = seen(data, processes=processes, num_batches=batches, epoch=1)
    assert other != found


def test_a_share_that_ends_begins_again(shards):
    (found,) = seen(stream_data(str(shards)), num_batches=24)
    counts = np.bincount([int(n) for batch in found for n in batch])
    assert counts.tolist() == [2] * 48


def test_workers_read_files_of_their_own(shards):
    data = stream_data(str(shards))
    (found,) = seen(data, workers=2, num_batches=6)
    files = [{int(n) // 16 for batch in found[worker::2] for n in batch} for worker in (0, 1)]
    assert not files[0] & files[1]
    assert seen(data, workers=2, num_batches=6) == [found]
    with pytest.raises(ValueError, match="--workers to 3 or less"):
        check_workers(data.stream[0], 1, 4)
    check_workers(data.stream[0], 2, 3)  # three files for two processes: each has parts of all


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_runs_train_and_resume(shards, tmp_path, monkeypatch, workers):
    config = dataclasses.replace(
        TINY, dataset=str(shards), channels="R+NIR", limit=None, streaming=True, epoch_images=40,
        workers=workers, output_dir=str(tmp_path / "whole"),
    )  # fmt: skip
    whole = run(config)
    assert whole.results["training"]["updates"] == 10
    assert whole.results["data"]["num_images"]["train"] is None
    forget_accelerate()
    config = dataclasses.replace(config, output_dir=str(tmp_path / "halved"), resume="auto")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(Interrupted):
            run(config)
    forget_accelerate()
    with pytest.raises(REFUSED, match=r"another run \(workers"):
        run(dataclasses.replace(config, workers=1))
    forget_accelerate()
    resumed = run(config)
    for one, other in zip(
        *(o.results["training"]["history"] for o in (whole, resumed)), strict=True
    ):
        assert [one[k] for k in LOSSES] == [other[k] for k in LOSSES]


def test_what_a_stream_cannot_do_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match="--epoch-images"):
        TrainConfig(streaming=True)
    config = dataclasses.replace(
        TINY, dataset="synthetic", streaming=True, epoch_images=40, output_dir=str(tmp_path)
    )
    with pytest.raises(REFUSED):
        run(config)


@pytest.mark.parametrize("label", [None, 2])
def test_labels_that_are_none_are_refused_or_skipped(tmp_path, label):
    good = [encoded(number) for number in range(8)]
    write_rows(tmp_path / "train.parquet", good, [0, 1] * 4)
    write_rows(tmp_path / "test.parquet", good[:3], [0, 1, label])
    with pytest.raises(ValueError, match=r"/test row 2 has .*label.*--skip-corrupt.*--test-split"):
        stream_data(str(tmp_path))
    data = stream_data(str(tmp_path), skip_corrupt=True)
    assert (len(data.test), data.test.num_skipped) == (2, 1)
    write_rows(tmp_path / "test.parquet", good[:2], [0, 1])
    data = stream_data(str(tmp_path))
    write_rows(tmp_path / "train.parquet", good, [0, 1] * 3 + [0, label])
    with pytest.raises(ValueError, match=r"file 1 of 1, row 7 has .*label"):
        stream_data(str(tmp_path))
    with pytest.raises(ValueError, match=r"train row \d of pass 0 .*label.*--skip-corrupt"):
        seen(data)


def test_damaged_images_are_named_or_skipped(tmp_path, caplog):
    images = [encoded(number) for number in range(8)]
    labels = [0, 1] * 4
    write_rows(tmp_path / "train.parquet", images, labels)
    whole = stream_data(str(tmp_path))
    images[3] = images[3][:100]
    write_rows(tmp_path / "train.parquet", images, labels)
    with pytest.raises(ValueError, match=r"file 1 of 1, row 3 cannot be read.*--skip-corrupt"):
        list(stream_data(str(tmp_path)).train)
    with pytest.raises(ValueError, match=r"train row \d of pass 0 .* cannot be read.*--skip-corr"):
        seen(whole)
    data = stream_data(str(tmp_path), skip_corrupt=True)
    assert (len(data.train), data.train.num_skipped) == (7, 1)
    caplog.clear()
    (found,) = seen(data, skip_corrupt=True, num_batches=7)
    counts = np.bincount([int(n) for batch in found for n in batch], minlength=8)
    assert counts.tolist() == [4, 4, 4, 0, 4, 4, 4, 4]
    assert "cannot be read" in caplog.text
    write_rows(tmp_path / "train.parquet", [b"no image"] * 8, labels)
    with pytest.raises(ValueError, match="No training image can be read"):
        seen(data, skip_corrupt=True)


def test_statistics_of_sorted_data_come_from_all_over(tmp_path, monkeypatch):
    monkeypatch.setattr("timm_varchan.data.streaming.NUM_SAMPLED", 20)
    for part in range(4):
        numbers = range(40 * part, 40 * part + 40)
        path = tmp_path / f"train-{part:05d}-of-00004.parquet"
        write_rows(path, [encoded(n) for n in numbers], [part // 2] * 40)
    data = stream_data(str(tmp_path))
    numbers = [int(image[0, 0, 0]) for image, _ in data.train]
    assert len(numbers) == 20
    assert np.bincount([n // 40 for n in numbers]).tolist() == [5] * 4
    assert max(n % 40 for n in numbers) >= 5
    again = [int(image[0, 0, 0]) for image, _ in stream_data(str(tmp_path)).train]
    assert numbers == again

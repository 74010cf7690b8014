"""Training images that are read as they come."""

import dataclasses
import io

import datasets
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from test_training import interrupt_at
from tiny_runs import TINY, forget_accelerate, fresh_accelerate  # noqa: F401
from torch.utils.data import DataLoader

from timm_varchan.data import ImageStream, check_workers, stream_data
from timm_varchan.training import Interrupted, SetupError, TrainConfig, run

LOSSES = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "lr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three Parquet files of 16 images whose first pixel is their number; 12 for validation."""
    path = tmp_path_factory.mktemp("shards")
    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    for name, numbers in (
        *((f"train-{i:05d}-of-00003", range(16 * i, 16 * i + 16)) for i in range(3)),
        ("validation-00000-of-00001", range(12)),
    ):
        rows = {"image": [], "label": []}
        for number in numbers:
            rows["image"].append(encoded(number))
            rows["label"].append(number % 2)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path / f"{name}.parquet")
    return path


def encoded(number):
    rng = np.random.default_rng(number)
    image = rng.integers(0, 200, (2, 16, 16)).astype(np.uint8)
    image[:, 0, 0] = number
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def seen(data, *, processes=1, workers=0, epoch=0, num_batches=4, skip_corrupt=False):
    """The numbers of the images of every process's batches."""
    found = []
    for process in range(processes):
        rows, columns = data.stream
        stream = ImageStream(
            rows, columns, data.channels, torch.nn.Identity(), num_batches=num_batches,
            batch_size=4, process=(process, processes), buffer_size=10,
            skip_corrupt=skip_corrupt,
        )  # fmt: skip
        stream.set_epoch(epoch)
        loader = DataLoader(stream, batch_size=4, num_workers=workers)
        batches = [x[:, 0, 0, 0].tolist() for x, _ in loader]
        assert [len(batch) for batch in batches] == [4] * num_batches
        found.append(batches)
    return found


def test_the_data_is_described_by_a_look(folder):
    data = stream_data(str(folder), channels="R+NIR")
    assert data.class_names == ("a", "b")
    assert data.channels.labels == ("R", "NIR")
    assert len(data.validation) == 12
    assert data.validation[5][1] == 1
    assert data.validation[5][0][0, 0, 0] == 5
    assert len(stream_data(str(folder), limit=4).validation) == 4
    assert stream_data(str(folder)).channels.is_anonymous
    with pytest.raises(ValueError, match="no Parquet files"):
        stream_data(__file__)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_image_comes_once_a_pass(folder, processes):
    data = stream_data(str(folder))
    batches = 12 // processes
    found = seen(data, processes=processes, num_batches=batches)
    numbers = [int(n) for process in found for batch in process for n in batch]
    assert sorted(numbers) == list(range(48))
    assert numbers != sorted(numbers)
    again = seen(data, processes=processes, num_batches=batches)
    assert again == found
    other = seen(data, processes=processes, num_batches=batches, epoch=1)
    assert other != found


def test_a_share_that_ends_begins_again(folder):
    (found,) = seen(stream_data(str(folder)), num_batches=24)
    counts = np.bincount([int(n) for batch in found for n in batch])
    assert counts.tolist() == [2] * 48


def test_workers_read_files_of_their_own(folder):
    data = stream_data(str(folder))
    (found,) = seen(data, workers=2, num_batches=6)
    files = [{int(n) // 16 for batch in found[worker::2] for n in batch} for worker in (0, 1)]
    assert not files[0] & files[1]
    assert seen(data, workers=2, num_batches=6) == [found]
    with pytest.raises(ValueError, match="--workers to 3 or less"):
        check_workers(data.stream[0], 1, 4)
    check_workers(data.stream[0], 2, 3)  # three files for two processes: each has parts of all


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_runs_train_and_resume(folder, tmp_path, monkeypatch, workers):
    config = dataclasses.replace(
        TINY, dataset=str(folder), channels="R+NIR", limit=None, streaming=True, epoch_images=40,
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
    with pytest.raises(SetupError, match=r"another run \(workers"):
        run(dataclasses.replace(config, workers=1))
    forget_accelerate()
    resumed = run(config)
    for one, other in zip(
        *(o.results["training"]["history"] for o in (whole, resumed)), strict=True
    ):
        assert [one[k] for k in LOSSES] == [other[k] for k in LOSSES]


def test_what_a_stream_cannot_do_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="--epoch-images"):
        TrainConfig(streaming=True)
    config = dataclasses.replace(
        TINY, dataset="synthetic", streaming=True, epoch_images=40, output_dir=str(tmp_path)
    )
    with pytest.raises(SetupError):
        run(config)


def write_rows(path, images, labels):
    features = datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"image": images, "label": [0] * len(labels)}
    table = datasets.Dataset.from_dict(rows, features=features).data.table
    # `ClassLabel` refuses to write what it reads
    column = table.schema.get_field_index("label")
    table = table.set_column(column, table.schema.field(column), [labels])
    parquet.write_table(table, path)


@pytest.mark.parametrize("label", [-1, None, 2])
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

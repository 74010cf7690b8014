"""What a run tells of channel sets: tables, baselines, missing channels, the command."""

import csv
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from tiny_runs import REFUSED, TINY, forget_accelerate, fresh_accelerate, image_folder  # noqa: F401

from timm_varchan import ChannelSet, hub
from timm_varchan.__main__ import main
from timm_varchan.channels import write_channels
from timm_varchan.evaluation import paired_difference
from timm_varchan.results import markdown_page
from timm_varchan.training import EvaluateConfig, evaluate, run
from timm_varchan.training.checkpoint import Progress

MANY = dataclasses.replace(
    TINY, channels="eurosat", eval_modes=None, eval_orders=None, epochs=1, limit=None
)


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Thirteen planes, two classes that the second plane tells apart."""
    rng = np.random.default_rng(0)

    def image(label, number):
        planes = rng.random((13, 16, 16)).astype(np.float32)
        planes[1] += label
        return planes

    return image_folder(tmp_path_factory.mktemp("arrays"), image, {"train": 12, "val": 12})


@pytest.fixture(scope="module")
def trained(arrays, tmp_path_factory):
    """A twin and a plain model on 13 bands."""
    folder = tmp_path_factory.mktemp("trained")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name, model, aug in (
            ("twin", "dwg_test_resnet", "hcs-sample"),
            ("plain", "test_resnet", "none"),
        ):
            forget_accelerate()
            config = dataclasses.replace(
                MANY, dataset=arrays, model=model, channel_aug=aug, output_dir=str(folder / name)
            )
            found[name] = run(config)
        forget_accelerate()
    return found


def test_thirteen_channels_fit_a_page(trained):
    for outcome in trained.values():
        text = (outcome.folder / "results.md").read_text()
        assert text == markdown_page(outcome.results)
        assert len(text.splitlines()) <= 80
        for part in ("all 13", "RGB+NIR", "Landsat-bands", "B8A", "Robustness", "1 of 1,716"):
            assert part in text, part
        assert outcome.results["evaluation"]["num_passes"] <= 40
    assert "all 13, shuffled" in (trained["plain"].folder / "results.md").read_text()
    assert "the same answer" in (trained["twin"].folder / "results.md").read_text()


def test_every_set_is_in_the_table_for_programs(trained):
    outcome = trained["twin"]
    with (outcome.folder / "sets.csv").open() as file:
        rows = list(csv.DictReader(file))
    entries = outcome.results["evaluation"]["sets"]
    assert len(rows) == len(entries) == 40
    for row, entry, result in zip(rows, entries, outcome.sets, strict=True):
        assert row["indices"] == "+".join(map(str, entry["indices"]))
        assert float(row["accuracy"]) == entry["accuracy"]["value"] == result.correct.mean()
        if entry["loss"] is not None:
            expected = paired_difference(outcome.sets[0].correct, result.correct)
            assert entry["loss"] == expected._asdict()
            assert float(row["loss_low"]) == expected.low
    assert entries[0]["loss"] is None
    true, said, counts = np.array(outcome.results["evaluation"]["confusion"]).T
    assert counts.sum() == 24
    assert counts[true == said].sum() == outcome.sets[0].correct.sum()


def test_sets_are_told_as_the_model_was_trained(tmp_path, arrays):
    few = dataclasses.replace(MANY, dataset=arrays, sets="RGB,B08")
    anonymous = run(
        dataclasses.replace(few, channel_identity="anonymous", output_dir=str(tmp_path / "a"))
    )
    assert [(s.name, s.mode) for s in anonymous.sets] == [
        ("all 13", "anonymous"), ("RGB", "anonymous"), ("B08", "anonymous")
    ]  # fmt: skip
    forget_accelerate()
    again = evaluate(
        EvaluateConfig(
            model=str(tmp_path / "a" / "model"), dataset=arrays, sets="RGB,B08", workers=0
        )
    )
    assert [s.to_json() for s in again.sets] == [s.to_json() for s in anonymous.sets]


def test_a_baseline_is_compared_on_the_same_images(trained, arrays, capsys, tmp_path):
    twin, plain = trained["twin"], trained["plain"]
    args = [
        "evaluate", str(twin.folder / "model"), "--dataset", arrays, "--missing", "B10+B11",
        "--baseline", str(plain.folder), "--output", str(tmp_path / "out"),
        "--workers", "0", "--eval-batch-size", "16",
    ]  # fmt: skip
    forget_accelerate()
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "minus test_resnet" in text
    assert "without B10+B11" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    theirs = {r.indices: r for r in plain.sets if r.order == "in order"}
    mine = {r.indices: r for r in twin.sets}
    entries = [e for e in results["evaluation"]["sets"] if e["baseline"]]
    assert len(entries) >= 30
    for entry in entries:
        other = theirs[tuple(entry["indices"])]
        assert entry["baseline"]["accuracy"] == other.metrics["accuracy"]._asdict()
        expected = paired_difference(mine[other.indices].correct, other.correct)._asdict()
        assert entry["baseline"]["difference"] == expected
    missing = next(e for e in results["evaluation"]["sets"] if e["kind"] == "asked")
    assert missing["size"] == 11
    assert 9 not in missing["indices"]


def test_the_command_tests_where_training_did_not_look(tmp_path, arrays, capsys):
    config = dataclasses.replace(
        MANY, dataset=f"{arrays}/train", validation_fraction=0.25,
        sets="RGB", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    outcome = run(config)
    expected = outcome.sets[0].metrics["accuracy"].value
    forget_accelerate()
    common = ["--eval-sets", "RGB", "--workers", "0"]
    model = str(outcome.folder / "model")
    assert main(["evaluate", model, "--dataset", f"{arrays}/train", *common]) == 0
    text = capsys.readouterr().out
    assert "on 6 images (validation)" in text
    assert f"Accuracy {100 * expected:.1f} %" in text
    forget_accelerate()
    assert main(["evaluate", model, "--dataset", f"{arrays}/val", *common]) == 0
    assert "on 24 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missing": "B99"}, "B99"),
        ({"missing": "eurosat"}, "leaves no channel"),
        ({"sets": "RGB,B77"}, "--sets: .*B77"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(tmp_path, arrays, changes, message):
    config = dataclasses.replace(MANY, dataset=arrays, output_dir=str(tmp_path), **changes)
    with pytest.raises(REFUSED, match=message):
        run(config)


def test_no_checkpoint_is_chosen_for_answers_that_are_not_finite(tmp_path, arrays, caplog):
    """Answers of NaN in the first class: read as class 0 they would all be right."""
    rng, calls = np.random.default_rng(1), itertools.count()

    def image(label, number):
        planes = rng.random((4, 16, 16)).astype(np.float32)
        if next(calls) >= 16 and not label:  # of the validation images
            planes[0] = 3e38  # finite, its answer is not
        return planes

    config = dataclasses.replace(
        MANY, dataset=image_folder(tmp_path / "data", image, {"train": 8, "val": 8}), epochs=2,
        channels=None, output_dir=str(tmp_path / "run"), val_max_sets=15,
    )  # fmt: skip
    outcome = run(config)
    entry = outcome.results["training"]["history"][-1]
    assert entry["eval_accuracy"] <= 0.5
    assert math.isfinite(entry["eval_loss"])
    assert entry["eval_not_finite"] == 8 * 8  # the half of the 15 sets that has the plane
    whole = outcome.results["evaluation"]["sets"][0]
    assert whole["num_not_finite"] == 8
    assert "not finite" in caplog.text
    assert "Logits that are not finite" in (outcome.folder / "results.md").read_text()
    assert Progress(history=[entry]).rank[0] <= 0.5


def test_a_scale_from_a_file_of_channels_is_saved(tmp_path):
    rng = np.random.default_rng(0)
    data = image_folder(tmp_path, lambda *_: rng.integers(0, 4000, (4, 16, 16), "u2"), {"data": 8})
    channels = ChannelSet.parse("sentinel2-10m").with_stats([0.2] * 4, [0.1] * 4)
    file = write_channels(channels.with_scale(10_000), tmp_path / "channels.json")
    config = dataclasses.replace(
        MANY, dataset=f"{data}/data", channels=str(file), validation_fraction=0.25,
        sets="RGB", output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    outcome = run(config)
    assert hub.load(outcome.folder / "model").channels.value_scale == 10_000
    with pytest.raises(REFUSED, match="not by 255"):
        run(dataclasses.replace(config, value_scale=255.0, output_dir=str(tmp_path / "other")))

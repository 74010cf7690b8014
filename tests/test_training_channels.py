"""Which planes of the files a run trains on, and what they are called."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from tiny_runs import TINY, forget_accelerate, fresh_accelerate  # noqa: F401

from timm_varchan import hub
from timm_varchan.training import SetupError, TrainConfig, run

NAMES = ["DNA", "ER", "RNA", "AGP", "Mito"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five planes without names, plane i about 40 * i."""
    path = tmp_path_factory.mktemp("planes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for name in ("a", "b"):
            (path / split / name).mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(0, 30, (5, 16, 16))
                image = noise + 40 * np.arange(5)[:, None, None]
                np.save(path / split / name / f"{number}.npy", image.astype(np.uint8))
    return path


@pytest.fixture
def config(folder, tmp_path):
    return dataclasses.replace(
        TINY, dataset=str(folder), channels=None, limit=None, epochs=1, eval_modes=None,
        eval_max_sets=6, output_dir=str(tmp_path / "run"),
    )  # fmt: skip


def channels_of(outcome):
    return [c.get("name") for c in outcome.results["data"]["channels"]]


def test_planes_without_names_are_called_by_their_place(config, caplog):
    with caplog.at_level(logging.WARNING):
        outcome = run(config)
    assert channels_of(outcome) == ["c0", "c1", "c2", "c3", "c4"]
    assert "called c0+c1+c2+c3+c4" in caplog.text
    means = [c["mean"] for c in outcome.results["data"]["channels"]]
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


def test_unknown_names_are_refused_with_the_cure(config):
    with pytest.raises(SetupError, match=r"'DNA'.*DNA@461nm, or DNA= without"):
        run(dataclasses.replace(config, channels="DNA+ER+RNA+AGP+Mito"))


@pytest.mark.parametrize("channels", [None, "B02+B03+B04+B08+B11"])
def test_part_of_the_planes(config, channels):
    use = "c3+c1" if channels is None else "B08+B03"
    outcome = run(dataclasses.replace(config, channels=channels, use=use))
    assert channels_of(outcome) == use.split("+")
    means = [c["mean"] for c in outcome.results["data"]["channels"]]
    assert means == pytest.approx([(14.5 + 40 * i) / 255 for i in (3, 1)], abs=0.01)
    assert {s["channels"] for s in outcome.results["evaluation"]["sets"]} == {
        use, *use.split("+")
    }  # fmt: skip


def test_a_model_of_some_planes_is_tested_on_whole_files(config, tmp_path):
    config = dataclasses.replace(config, channels="B02+B03+B04+B08+B11", use="B08+B03")
    trained = run(config)
    forget_accelerate()
    again = run(
        dataclasses.replace(
            config, eval_only=str(trained.folder / "model"), output_dir=str(tmp_path / "again")
        )
    )
    sets = [run.results["evaluation"]["sets"][0]["accuracy"]["value"] for run in (trained, again)]
    assert sets[0] == sets[1]
    expected = json.loads((trained.folder / "model" / "config.json").read_text())["channels"]
    assert [c["mean"] for c in again.results["data"]["channels"]] == [c["mean"] for c in expected]


def test_what_cannot_be_used_is_refused(config):
    with pytest.raises(SetupError, match="'B99'"):
        run(dataclasses.replace(config, use="B99"))
    with pytest.raises(ValueError, match="leave --streaming out"):
        TrainConfig(streaming=True, epoch_images=8, use="R")

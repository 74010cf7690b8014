"""Model cards say what the files say, and their code runs."""

import json
import os
import re

import pytest
import timm
from huggingface_hub import ModelCard

from timm_varchan import RGB, hub
from timm_varchan.cards import Card, folder_card, usage, write_card

ESTIMATE = {"value": 0.5, "low": 0.41, "high": 0.59}
METRICS = ("accuracy", "precision_macro", "recall_macro", "f1_macro")


def results(**changes):
    """What a run leaves behind, as far as cards read it."""
    view = {"mode": "named", "order": "in order", "unexplained": None, "baseline": None}
    view |= {"loss": None, **dict.fromkeys(METRICS, ESTIMATE)}
    sets = [
        {"channels": name, "name": name, "kind": kind, "size": len(name), **view}
        for name, kind in (("RGB", "all"), ("G", "subset"))
    ]
    return {
        "config": {"pretrained": False, "lr": 0.002, "opt": "adamw", "channel_aug": "hcs"},
        "seeds": [3],
        "model": {"num_parameters": 12_345_678},
        "data": {"name": "org/images", "class_names": ["a", "b"],
                 "num_images": {"train": 100, "validation": 0, "test": 20, "evaluated": 20}},
        "training": {"epochs": 7},
        "evaluation": {
            "split": "test", "sets": sets, "accuracy": ESTIMATE, "chance": 0.5, "num_images": 20,
            "most_frequent": {"class": "a", "fraction": 0.75}, "baseline": None,
        },
        "machine": {"num_processes": 2, "device": "cpu"},
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved twin."""
    path = tmp_path_factory.mktemp("saved") / "model"
    model = timm.create_model("dwg_rrdb_small", num_classes=2, dims=(8, 8, 8), growth=4)
    hub.save(model, path, class_names=["cat", "dog"], channels=RGB, img_size=32, crop_pct=1.0)
    return path


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def sections(text):
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def test_card_of_a_folder_says_what_its_files_say(folder):
    (folder / "results.json").write_text(json.dumps(results()))
    text = write_card(folder, source="hf-hub:org/name", license="mit").read_text()
    assert "license: mit" in text
    assert (folder / "README.md").read_text() == text
    assert sections(text) == ["Usage", "Details", "Limits", "Citation", "Results"]
    assert "# Model card for name\n" in text
    for part in ("R, 660 nm, mean", "cat, dog", "32 x 32", "12.35", "- org/images", "epochs 7",
                 "**Data:** org/images", "lr 0.002", "50.0 (41.0 to 59.0)", "seed 3",
                 "75.0 %", "hf-hub:org/name"):  # fmt: skip
        assert part in text, part


def test_the_hub_finds_the_results_in_a_card(folder):
    (folder / "results.json").write_text(json.dumps(results()))
    about = ModelCard(folder_card(folder, source="hf-hub:org/name").render()).data
    found = {(r.dataset_config, r.metric_type): r.metric_value for r in about.eval_results}
    assert found["channels RGB, named, in order", "f1_macro"] == 0.5
    assert found["channels G, named, in order", "accuracy"] == 0.5
    assert len(found) == 5
    assert about.datasets == ["org/images"]
    (folder / "results.json").unlink()
    assert ModelCard(folder_card(folder).render()).data.eval_results is None


def test_code_of_a_card_runs(folder):
    code = blocks(folder_card(folder).render())
    assert len(code) == 1
    exec(compile(code[0], "card", "exec"), {})


def test_a_plain_model_is_not_told_its_channels():
    text = usage("resnet18", RGB, 64, stem=False)
    assert "set_channels" not in text
    assert "set_channels" in usage("dwg_resnet18", RGB, 64, stem=True)


def test_without_results_the_card_claims_none(folder, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(folder / name, copy / name)
    text = folder_card(copy).render()
    assert "No results lie beside it" in text
    assert "%" not in text
    assert "Results" not in sections(text)


def test_data_that_is_not_on_the_hub_is_not_linked(folder):
    (folder / "results.json").write_text(
        json.dumps(results(data=results()["data"] | {"name": "synthetic"}))
    )
    text = folder_card(folder).render()
    assert "datasets:" not in text
    assert "**Data:** synthetic" in text


def test_broken_files_are_told(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        folder_card(tmp_path)
    (folder / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"results\.json is no result"):
        folder_card(folder)
    (folder / "results.json").unlink()


def test_other_licences_have_a_name():
    card = Card("x", "d", {"Classes": "2"}, "u", license="other", license_name="research")
    assert "license: other\nlicense_name: research" in card.render()

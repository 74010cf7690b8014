"""What each option of training does."""

import csv
import dataclasses
import json
import time

import pytest
import timm
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import REFUSED, TINY, forget_accelerate, fresh_accelerate  # noqa: F401

import timm_varchan
from timm_varchan.commands import train_config
from timm_varchan.models import has_stems
from timm_varchan.models.adapt import stems
from timm_varchan.training import (
    RECIPES,
    EvaluateConfig,
    evaluate,
    run,
)
from timm_varchan.training import train as training_train
from timm_varchan.training.train import choose_trained

ONE_EPOCH = dataclasses.replace(TINY, epochs=1)
LOSSES = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "lr")


def history(outcome):
    return [tuple(e[key] for key in LOSSES) for e in outcome.results["training"]["history"]]


def runs(tmp_path, *changes):
    """The outcomes of tiny runs that differ in some fields."""
    outcomes = []
    for number, change in enumerate(changes):
        config = dataclasses.replace(ONE_EPOCH, output_dir=str(tmp_path / str(number)), **change)
        outcomes.append(run(config))
        forget_accelerate()
    return outcomes


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run with no option."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        (outcome,) = runs(tmp_path_factory.mktemp("plain"), {})
    return outcome


# ---- recipes


def test_flags_override_a_recipe_and_read_back():
    config = train_config(["--recipe", "modern", "--clip-grad", "None", "--epochs", "7"])
    assert config == dataclasses.replace(RECIPES["modern"], clip_grad=None, epochs=7)
    for name, recipe in RECIPES.items():
        assert train_config([f"--recipe={name}"]) == recipe
        assert recipe.recipe == name


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train(tmp_path, name):
    small = {f: getattr(ONE_EPOCH, f) for f in ("channels", "limit", "img_size", "workers")}
    config = dataclasses.replace(
        RECIPES[name], **small, epochs=2, batch_size=8, output_dir=str(tmp_path / "run")
    )
    outcome = run(config)
    rates = [entry["lr"] for entry in outcome.results["training"]["history"]]
    assert rates == [1e-3, 1e-3] if name == "report" else rates[1] < rates[0] < config.lr
    assert outcome.results["config"]["recipe"] == name


def test_beside_pretrained_weights_the_stem_of_a_twin_learns_nothing(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.safetensors")
    weights = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}
    tuned = {"pretrained": True, "model_kwargs": weights}
    asked = {**tuned, "model_kwargs": {**weights, "stem": "dwg"}}
    scratch, *others = runs(tmp_path, {}, tuned, asked)
    count = scratch.results["model"]["num_parameters"]
    fewer, same = (outcome.results["model"]["num_parameters"] for outcome in others)
    assert fewer < same == count


# ---- precision and speed: they change no more than rounding


def test_caching_changes_nothing(plain, tmp_path):
    (cached,) = runs(tmp_path, {"cache": True})
    assert history(plain) == history(cached)


def test_two_forward_passes_an_update_are_one_of_twice_the_size(tmp_path):
    vit = {"model": "dwg_test_vit", "channel_aug": "hcs", "clip_grad": 0.5}  # no BatchNorm
    whole, halves = runs(
        tmp_path, {**vit, "batch_size": 8}, {**vit, "batch_size": 4, "grad_accum_steps": 2}
    )
    assert whole.results["training"]["updates"] == halves.results["training"]["updates"] == 3
    for one, other in zip(history(whole), history(halves), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_layouts_and_checkpointing_change_no_more_than_rounding(plain, tmp_path):
    (rows,) = runs(tmp_path, {"channels_last": False})
    assert history(plain)[0] == pytest.approx(history(rows)[0], rel=1e-3)
    vit = {"model": "dwg_test_vit"}  # no BatchNorm, which would see every batch twice
    whole, checkpointing = runs(tmp_path / "vit", vit, {**vit, "grad_checkpointing": True})
    assert history(checkpointing)[0] == pytest.approx(history(whole)[0], rel=1e-2)


def test_bfloat16_is_used(tmp_path, monkeypatch):
    seen = set()
    original = training_train.F.cross_entropy

    def watch(logits, *args, **kwargs):
        seen.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return original(logits, *args, **kwargs)

    monkeypatch.setattr(training_train.F, "cross_entropy", watch)
    # At 16 px the last stage sees 1 x 1. There, with stride 2, torch's own bfloat16 convolution can
    # give a weight gradient that holds what was in the memory before (seen on a Xeon with AMX).
    two = {"epochs": 2, "img_size": 32}
    whole, half = runs(tmp_path, two, {**two, "mixed_precision": "bf16"})
    assert torch.bfloat16 in seen
    for one, other in zip(history(whole), history(half), strict=True):
        assert one[0] == pytest.approx(other[0], rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in fp16")
def test_fp16_that_would_be_float32_is_refused(tmp_path):
    with pytest.raises(REFUSED, match="fp16 was asked for, but on a CPU"):
        runs(tmp_path, {"mixed_precision": "fp16"})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("aug", ["hcs", "hcs-sample", "shuffle"])
def test_channel_sets_do_not_recompile(tmp_path, aug, monkeypatch):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    original = torch.nn.Module.compile
    # The graphs are what matters here; turning them into C++ takes minutes.
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: original(self, backend="aot_eager")
    )
    five = {"channels": "R+G+B+NIR+SWIR1", "channel_aug": aug, "epochs": 3, "limit": 64}
    (outcome,) = runs(tmp_path, {**five, "compile": True})
    # One graph for one channel, one for any other number.
    assert counters["stats"]["unique_graphs"] <= 2
    assert outcome.results["training"]["updates"] == 24


def test_clipping_and_layer_decay_reach_the_optimizer(plain, tmp_path):
    clipped, decayed = runs(tmp_path, {"clip_grad": 1e-4, "opt": "sgd"}, {"layer_decay": 0.5})
    assert len({history(outcome)[0][0] for outcome in (plain, clipped, decayed)}) == 3


# ---- average of the weights


def test_the_average_is_tested_and_saved(plain, tmp_path):
    (averaged,) = runs(tmp_path, {"ema_decay": 0.9})
    assert history(plain)[0][:2] == history(averaged)[0][:2]
    assert history(plain)[0][2] != history(averaged)[0][2]
    saved = EvaluateConfig(
        model=str(averaged.folder / "model"), limit=30, workers=0, eval_batch_size=16,
        eval_orders=("in order",),
    )  # fmt: skip
    assert [s.to_json() for s in evaluate(saved).sets] == [s.to_json() for s in averaged.sets]


# ---- parts


@pytest.mark.parametrize("part", ["head", "stem"])
def test_only_the_chosen_part_moves(part):
    model = timm_varchan.adapt(timm.create_model("test_resnet", num_classes=3))
    choose_trained(model, part)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training_train.train_mode(model, part)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all(("mixer" if part == "stem" else "fc.") in name for name in moved)


def test_from_rgb_to_other_channels_with_the_stem_alone(tmp_path):
    plain = {"model": "test_resnet", "channels": "RGB", "channel_aug": "none", "eval_modes": None}
    (first,) = runs(tmp_path, plain)
    more = {
        "model": f"local-dir:{first.folder / 'model'}", "adapt": True, "train_only": "stem",
        "channels": "R+G+B+NIR+SWIR1", "channel_aug": "hcs", "epochs": 2,
    }  # fmt: skip
    (second,) = runs(tmp_path / "second", more)
    saved = timm_varchan.hub.load(second.folder / "model")
    assert has_stems(saved.model)
    assert saved.channels.labels == ("R", "G", "B", "NIR", "SWIR1")
    before = timm_varchan.hub.load(first.folder / "model").model.state_dict()
    after = saved.model.state_dict()
    assert torch.equal(after["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])
    assert torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert stems(saved.model)[0].out.weight.any()
    fewer = {
        "model": f"local-dir:{second.folder / 'model'}", "channels": "B+NIR", "train_only": "head",
        "channel_aug": "hcs-sample",
    }  # fmt: skip
    (third,) = runs(tmp_path / "third", fewer)
    assert third.results["data"]["channels"]["channels"][0]["name"] == "B"
    kept = timm_varchan.hub.load(third.folder / "model").model.state_dict()
    assert torch.equal(kept["conv1.0.mixer.out.weight"], after["conv1.0.mixer.out.weight"])
    assert not torch.equal(kept["fc.weight"], after["fc.weight"])


# ---- statistics, curves, trackers


def test_statistics_of_every_set_are_estimated_on_training_images(tmp_path):
    run_with = {"channels": "RGB", "eval_modes": ("named", "anonymous"), "limit": 40}
    mixed, own = runs(tmp_path, run_with, {**run_with, "eval_statistics": 16})
    assert history(mixed) == history(own)
    assert [s.to_json() for s in mixed.sets] != [s.to_json() for s in own.sets]


def test_every_epoch_tells_of_several_channel_sets(tmp_path):
    (outcome,) = runs(
        tmp_path, {"channels": "RGB", "trackers": ("tensorboard",), "val_max_sets": 4, "epochs": 2}
    )
    entry = outcome.results["training"]["history"][-1]
    assert list(entry["eval_sets"]) == ["RGB", "RB", "R", "B"]
    assert entry["eval_sets"]["RGB"] == entry["eval_accuracy"]
    assert 0 <= entry["loader_share"] <= 1
    with (outcome.folder / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["eval_accuracy_RB"]) == entry["eval_sets"]["RB"]
    assert (outcome.folder / "curves.png").is_file()
    found = EventAccumulator(str(outcome.folder / "tensorboard" / "timm_varchan")).Reload()
    logged = found.Scalars("eval/eval_accuracy_B")
    assert [event.step for event in logged] == [1, 2]
    assert logged[1].value == pytest.approx(entry["eval_sets"]["B"])
    about = json.loads((outcome.folder / "environment.json").read_text())
    assert set(about) == {"versions", "git_commit"}


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(REFUSED, match="pip install wandb"):
        runs(tmp_path, {"trackers": ("wandb",)})


def test_the_share_of_waiting_for_images_is_told(tmp_path, monkeypatch):
    original = training_train.epoch_batches

    def slow(*args):
        for batch in original(*args):
            time.sleep(0.4)
            yield batch

    monkeypatch.setattr(training_train, "epoch_batches", slow)
    (outcome,) = runs(tmp_path, {})
    (entry,) = outcome.results["training"]["history"]
    assert 3 * 0.4 <= entry["loader_share"] * entry["seconds"] < entry["seconds"]
    assert entry["images_per_second"] == pytest.approx(24 / entry["seconds"])

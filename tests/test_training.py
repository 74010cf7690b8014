"""Configuration, channel draws, checkpoints, results and whole runs in this process."""

import dataclasses
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from tiny_runs import (
    REFUSED,
    TINY,
    flags_of,
    forget_accelerate,
    fresh_accelerate,  # noqa: F401
    image_folder,
)
from torch.utils.data import DataLoader

import timm_varchan
from timm_varchan import ANONYMOUS, RGB, ChannelSet
from timm_varchan.__main__ import main
from timm_varchan.commands import train_config
from timm_varchan.errors import UserError
from timm_varchan.hub import save
from timm_varchan.training import (
    EvaluateConfig,
    Interrupted,
    NonFiniteLossError,
    TrainConfig,
    evaluate,
    run,
)
from timm_varchan.training import train as training_train
from timm_varchan.training.checkpoint import Checkpoints, read_progress
from timm_varchan.training.config import as_fields
from timm_varchan.training.loaders import EpochSampler, epoch_batches
from timm_varchan.training.report import closing
from timm_varchan.views import CHANNEL_AUGS, DrawKey, draw_channels

BANDS = ChannelSet.parse("R+G+B+NIR+SWIR1")

# ---- configuration


def test_every_flag_reads_back_to_the_same_configuration(tmp_path):
    config = TrainConfig(
        dataset="a folder", channels="B02+B08", limit=3, skip_corrupt=True, pretrained=True,
        model_kwargs={"drop_rate": 0.1, "global_pool": "max"}, clip_grad=1.0, lr=0.5,
        eval_modes=("named", "mask"), eval_orders=("shuffled",), resume="auto", cache=True,
        channels_last=False, crop_scale=(0.5, 1.0), trackers=("tensorboard",),
    )  # fmt: skip
    assert train_config(flags_of(config)) == config
    assert train_config([]) == TrainConfig()
    assert TrainConfig(**as_fields(TrainConfig, json.loads(json.dumps(config.to_json())))) == config
    nested = dataclasses.replace(config, model_kwargs={"blocks": ((1, 2), {"a": (3,)})}).to_json()
    assert json.loads(json.dumps(nested)) == nested
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 7\nbatch-size: 4\neval_modes: [named]\n")
    read = train_config(["--config", str(file), "--epochs", "9"])
    assert (read.epochs, read.batch_size, read.eval_modes) == (9, 4, ("named",))
    file.write_text("epoch: 7")
    with pytest.raises(UserError, match="no flag --epoch"):
        train_config(["--config", str(file)])


def test_help_names_every_flag_with_its_text_and_default(capsys):
    with pytest.raises(SystemExit):
        train_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in text
    for shown in ("data options", "run options", "(default: 0.002)", "smoothing"):
        assert shown in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--epochs", "0"], "--epochs is 0; it must be 1 or more"),
        (["--smoothing", "1"], "--smoothing is 1.0; it must be in 0..1, below 1"),
        (["--lr", "nan"], "--lr is nan"),
        (["--mixup", "0.2", "--batch-size", "7"], "must be even"),
        (["--channel-aug", "cutmix"], "choice"),
        (["--model-kwargs", "drop"], "NAME=VALUE"),
        (["--learning-rate", "1"], "--learning-rate"),
    ],
)
def test_wrong_flags_are_refused(args, message, capsys):
    try:
        code = main(["train", *args])
    except SystemExit as stopped:
        code = stopped.code
    assert code in (1, 2)
    shown = capsys.readouterr()
    assert message in shown.err + shown.out


def test_shuffled_channels_are_anonymous():
    assert TrainConfig(channel_aug="shuffle").channel_identity == "anonymous"
    with pytest.raises(UserError, match="Choose from: none, shuffle"):
        TrainConfig(channel_aug="sample")


# ---- draws


def draw(name, x, *key, identity="named", **kwargs):
    return draw_channels(name, x, BANDS, DrawKey(*key), identity=identity, **kwargs)


def same(first, second):
    told = first.channels == second.channels
    if first.present is None or second.present is None:
        return told and first.present is second.present and torch.equal(first.planes, second.planes)
    return (
        told
        and torch.equal(first.planes, second.planes)
        and torch.equal(first.present, second.present)
    )


@pytest.mark.parametrize("name", CHANNEL_AUGS)
@pytest.mark.parametrize("identity", ["named", "anonymous"])
def test_draws_depend_on_the_key_alone_and_change_with_it(name, identity):
    x = torch.randn(6, 5, 4, 4)
    first = draw(name, x, 0, 1, 2, identity=identity)
    torch.manual_seed(99)
    assert same(first, draw(name, x, 0, 1, 2, identity=identity))
    others = [draw(name, x, 0, 1, step, identity=identity) for step in range(8)]
    if name != "none":
        assert not all(o.planes.shape == first.planes.shape and same(first, o) for o in others)


@pytest.mark.parametrize("name", ["shuffle", "hcs-sample"])
def test_the_draw_of_a_sample_does_not_depend_on_the_process_that_has_it(name):
    x = torch.randn(6, 5, 4, 4)
    whole, part = draw(name, x, 3, 0, 0, 0), draw(name, x[4:], 3, 0, 0, 4)
    assert torch.equal(whole.planes[4:], part.planes)
    assert whole.channels == part.channels
    assert whole.present is part.present or torch.equal(whole.present[4:], part.present)


def test_sizes_and_channels_are_drawn_uniformly_and_a_share_is_whole():
    x = torch.zeros(4000, 5, 1, 1)
    sizes = draw("hcs-sample", x, 0, 0, 0).present.sum(1)
    counts = torch.bincount(sizes, minlength=6)
    assert counts[0] == 0
    assert (counts[1:] - 800).abs().max() < 130  # five standard errors
    present = draw("hcs-sample", x, 0, 0, 0).present.double().mean(0)
    assert (present - 0.6).abs().max() < 0.04
    whole = draw("hcs-sample", x, 0, 0, 0, full_share=0.5).present.all(1).double().mean()
    assert abs(whole - 0.6) < 0.04  # a half, and of the others one in five
    assert draw("hcs-sample", x, 0, 0, 0, full_share=1.0).present.all()


def test_what_the_model_is_told():
    x = torch.randn(2, 5, 2, 2)
    view = draw("hcs", x, 0, 0, 0)
    assert torch.equal(view.planes, x[:, BANDS.index(view.channels)])
    assert draw("none", x, 0, 0, 0).channels == BANDS
    shuffled = draw("shuffle", x, 0, 0, 0)
    assert shuffled.channels == ANONYMOUS  # never the default rule, which reads three as RGB
    assert torch.equal(
        shuffled.planes.flatten(2).sum(-1).sort().values, x.flatten(2).sum(-1).sort().values
    )
    assert not torch.equal(shuffled.planes, x)
    for name in ("none", "shuffle", "hcs"):
        assert draw(name, x, 0, 0, 0, identity="anonymous").channels == ANONYMOUS
    told = draw("hcs-sample", x, 0, 0, 0, identity="anonymous")
    assert told.channels.is_anonymous
    assert len(told.channels) == 5
    masked = draw("hcs-mask", x, 0, 0, 0)
    there = masked.planes.flatten(2).any(-1)[0]
    assert masked.channels == BANDS
    assert torch.allclose(masked.planes[:, there], x[:, there] * 5 / there.sum())


class EpochOf(torch.utils.data.Dataset):
    """The index and the epoch that the augmentation would draw from."""

    def __init__(self):
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index, int(self.epoch)

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_every_epoch_has_an_order_and_augmentations_of_its_own(processes, workers):
    """Through what accelerate makes of the loader, which sets epochs too."""

    def prepared():
        loader = DataLoader(
            EpochOf(), batch_size=5, sampler=EpochSampler(20, seed=1), num_workers=workers,
            persistent_workers=workers > 0, drop_last=True,
        )  # fmt: skip
        return prepare_data_loader(
            loader, num_processes=processes, process_index=0, put_on_device=False
        )

    def batches(loader, epoch, done=0):
        return [(x.tolist(), y.tolist()) for x, y in epoch_batches(loader, epoch, done)]

    loader, sampler, orders = prepared(), EpochSampler(20, seed=1), []
    for epoch in (0, 1, 2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        expected = [(order[i : i + 5], [epoch] * 5) for i in range(0, 20, 5 * processes)]
        assert batches(loader, epoch) == expected
        assert batches(prepared(), epoch, done=1) == expected[1:]  # resumed
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0] != list(EpochSampler(20, seed=2))


# ---- hub form


@pytest.mark.parametrize("told", ["named", "anonymous"])
def test_a_saved_model_gives_equal_logits(tmp_path, told):
    channels = BANDS.with_stats((0.1, 0.2, 0.3, 0.4, 0.5), (1.0,) * 5)
    model = timm.create_model("dwg_test_resnet", num_classes=3, in_chans=5).eval()
    timm_varchan.set_channels(model, channels if told == "named" else "anonymous")
    for _ in range(2):  # the second replaces the first
        save(model, tmp_path / "m", class_names="abc", channels=channels, img_size=32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    x = torch.randn(2, 5, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))
    assert loaded.num_classes == 3
    assert tuple(loaded.pretrained_cfg["mean"]) == channels.mean
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert saved["label_names"] == list("abc")
    assert saved["pretrained_cfg"]["input_size"] == [5, 32, 32]


def test_a_folder_with_something_else_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").touch()
    model = timm.create_model("dwg_test_resnet", num_classes=3)
    with pytest.raises(ValueError, match="no saved model"):
        save(model, tmp_path, class_names="abc", channels=RGB, img_size=32)


# ---- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return run(dataclasses.replace(TINY, output_dir=str(folder)))


def test_everything_is_written(finished):
    names = {path.name for path in finished.folder.iterdir()}
    assert names == {
        "run.json", "environment.json", "summary.csv", "results.json", "results.md", "curves.png",
        "channel_sets.png", "bands.png", "confusion.png", "sets.csv", "model", "checkpoints",
        "results.html", "predictions.npz",
    }  # fmt: skip
    lines = (finished.folder / "summary.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,train_loss,train_accuracy,eval_loss,eval_accuracy,lr,")
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]
    text = (finished.folder / "results.md").read_text()
    assert "| RG " in text
    assert "30 images (test)" in text


def test_the_last_line_names_a_better_epoch_and_how_to_take_it(finished):
    training = {**finished.results["training"], "best_epoch": 1, "epoch_taken": 2}
    told = closing({**finished.results, "training": training}, finished.folder)
    *_, first, again = told.splitlines()
    assert f"Everything is in {finished.folder}/" in first
    assert "Epoch 1 was the best on the validation images" in again
    command = again.partition("To take the best: timm-varchan train ")[2].split()
    config = train_config(command)
    assert (config.resume, config.eval_checkpoint) == ("auto", "best")
    same = {**training, "epoch_taken": 1}
    assert "was the best" not in closing({**finished.results, "training": same}, None)


def test_results_are_json_and_hold_run_and_input(finished):
    def reject(constant):
        raise AssertionError(f"{constant} is not JSON")

    results = json.loads((finished.folder / "results.json").read_text(), parse_constant=reject)
    assert results["config"] == json.loads((finished.folder / "run.json").read_text())
    data = results["data"]
    assert data["num_images"] == {"train": 30, "validation": 30, "test": 30, "evaluated": 30}
    assert ChannelSet.from_dict(data["channels"]).names == ("R", "G")
    assert [entry["epoch"] for entry in results["training"]["history"]] == [0, 1]
    assert [entry["channels"] for entry in results["evaluation"]["sets"]] == ["RG", "R", "G"]
    for entry in results["evaluation"]["sets"]:
        assert entry["accuracy"]["low"] <= entry["accuracy"]["value"] <= entry["accuracy"]["high"]


def test_the_saved_model_has_the_results(finished, tmp_path):
    config = EvaluateConfig(
        model=str(finished.folder / "model"), limit=30, workers=0, eval_batch_size=16,
        output=str(tmp_path / "e"), baseline=str(finished.folder), eval_orders=("in order",),
    )  # fmt: skip
    again = evaluate(config)
    assert again.results["model"]["name"] == "dwg_test_resnet"
    assert again.results["data"]["img_size"] == 16
    assert again.results["training"] is None
    assert [s.to_json() for s in again.sets] == [s.to_json() for s in finished.sets]
    assert {
        s["baseline"]["difference"]["difference"] for s in again.results["evaluation"]["sets"]
    } == {0}
    with pytest.raises(REFUSED, match="holds a training run"):
        evaluate(dataclasses.replace(config, output=str(finished.folder)))
    with pytest.raises(REFUSED, match="of other images"):
        evaluate(dataclasses.replace(config, limit=20))


def test_another_run_in_the_same_folder_is_refused(finished):
    config = dataclasses.replace(TINY, output_dir=str(finished.folder))
    with pytest.raises(REFUSED, match="--resume auto"):
        run(config)
    with pytest.raises(REFUSED, match=r"lr 0.002 -> 0.5"):
        run(dataclasses.replace(config, lr=0.5, resume="auto"))


def test_folders_that_cannot_be_used_are_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(REFUSED, match=r"not empty and holds no run.*--output-dir"):
        run(dataclasses.replace(TINY, output_dir=str(tmp_path)))
    with pytest.raises(REFUSED, match=r"cannot be written.*--output-dir"):
        run(dataclasses.replace(TINY, output_dir=str(tmp_path / "file" / "run")))


PLAIN = {"model": "test_resnet", "channel_aug": "none", "eval_modes": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "test_resnet"}, "Choose --model dwg_test_resnet, or"),
        ({"limit": 1, "grad_accum_steps": 16}, "lower --grad-accum-steps"),
        ({"model": "dwg_test_vit", "img_size": 33}, "--img-size 32 or 48"),
        ({"model": "no_such_model"}, "no_such_model"),
        ({"channels": "DNA+ER"}, r"'DNA'.*DNA@461nm, or DNA= without"),
        ({"model": "dwg_densenet121", "drop_path": 0.1}, "Add --drop-path 0"),
        ({**PLAIN, "train_only": "stem"}, "--train-only head"),
        ({**PLAIN, "eval_statistics": 8, "eval_modes": ("mask",)}, "--eval-statistics needs"),
        ({**PLAIN, "eval_modes": ("named",)}, "--eval-modes named need"),
        ({"model": "local-dir:nowhere"}, "nowhere"),
        ({"resume": "nowhere"}, "no checkpoint"),
    ],
)
def test_what_is_wrong_is_said_before_training(tmp_path, changes, message):
    with pytest.raises(REFUSED, match=message):
        run(dataclasses.replace(TINY, output_dir=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def interrupt_at(monkeypatch, update):
    """Send this process SIGTERM in the middle of a step."""
    original = training_train.draw_channels
    count = iter(range(1000))

    def draw(*args, **kwargs):
        if next(count) == update:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(training_train, "draw_channels", draw)


@pytest.mark.parametrize("update", [1, 2])  # in an epoch, at its end
def test_a_resumed_run_equals_one_that_nothing_disturbed(finished, tmp_path, monkeypatch, update):
    config = dataclasses.replace(TINY, output_dir=str(tmp_path / "run"))
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at(patch, update)
        with pytest.raises(Interrupted):
            run(config)
    assert signal.getsignal(signal.SIGTERM) is before
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").last()
    assert read_progress(checkpoint).updates == update + 1
    forget_accelerate()
    outcome = run(dataclasses.replace(config, resume="auto"))
    for key in ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "lr"):
        assert [e[key] for e in outcome.results["training"]["history"]] == [
            e[key] for e in finished.results["training"]["history"]
        ]
    assert [s.to_json() for s in outcome.sets] == [s.to_json() for s in finished.sets]


def test_mixing_and_averages_go_on_where_they_were(tmp_path, monkeypatch):
    changes = {"mixup": 0.2, "cutmix": 1.0, "smoothing": 0.1, "ema_decay": 0.9, "erase_prob": 0.3}
    whole, halved = (
        dataclasses.replace(TINY, output_dir=str(tmp_path / name), **changes)
        for name in ("whole", "halved")
    )
    expected = run(whole)
    forget_accelerate()
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(Interrupted):
            run(halved)
    forget_accelerate()
    run(dataclasses.replace(halved, resume="auto"))
    ends = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "halved")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    plain = run(dataclasses.replace(TINY, output_dir=str(tmp_path / "plain"), epochs=1))
    losses = [o.results["training"]["history"][0]["train_loss"] for o in (expected, plain)]
    assert losses[0] != losses[1]


def test_a_loss_that_is_no_number_stops_with_step_channels_and_cure(tmp_path, monkeypatch):
    original = training_train.draw_channels
    count = iter(range(1000))

    def draw(*args, **kwargs):
        view = original(*args, **kwargs)
        broken = view.planes * math.nan if next(count) == 4 else view.planes
        return dataclasses.replace(view, planes=broken)

    monkeypatch.setattr(training_train, "draw_channels", draw)
    config = dataclasses.replace(TINY, output_dir=str(tmp_path / "run"), channel_aug="none")
    with pytest.raises(
        NonFiniteLossError, match=r"epoch 2, step 2 \(channels RG, lr .*--clip-grad.*step-00000003"
    ):
        run(config)
    assert Checkpoints(tmp_path / "run" / "checkpoints").last().name == "step-00000003"


def test_the_best_checkpoint_of_a_model_that_is_not_told_its_channels(tmp_path):
    config = dataclasses.replace(
        TINY, output_dir=str(tmp_path / "run"), channel_aug="shuffle",
        eval_checkpoint="best", eval_modes=None, smoothing=0.1, clip_grad=1.0, epochs=1,
    )  # fmt: skip
    outcome = run(config)
    assert {s.mode for s in outcome.sets} == {"anonymous"}
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert ChannelSet.from_dict(saved["model_args"]["channel_set"]) == ANONYMOUS


def test_few_images_lower_the_batch_and_every_class_weighs_alike(tmp_path, caplog):
    """A plain model on a folder of images whose classes are not equally frequent."""
    for label, count in (("a", 9), ("b", 3)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(count):
            image = Image.new("RGB", (16, 20), (number * 20, 90, 255 * (label == "b")))
            image.save(tmp_path / "data" / label / f"{number}.png")
    config = TrainConfig(
        dataset=str(tmp_path / "data"), model="test_resnet", channel_aug="hcs-mask", epochs=1,
        img_size=16, workers=0, sets="RGB", output_dir=str(tmp_path / "run"),
        class_weights="balanced", validation_fraction=0.1,
    )  # fmt: skip
    with caplog.at_level("INFO"):
        outcome = run(config)
    assert {s.mode for s in outcome.sets} == {"mask"}
    assert outcome.results["evaluation"]["split"] == "validation"
    assert outcome.results["data"]["class_names"] == ["a", "b"]
    assert "--batch-size is lowered to" in caplog.text
    assert outcome.results["config"]["batch_size"] == 11
    labels = SimpleNamespace(labels=lambda: [0] * 6 + [1] * 2)
    weights = training_train._class_weights(
        config, SimpleNamespace(train=labels, class_names="abc"), torch.device("cpu")
    )
    assert weights.tolist() == pytest.approx([8 / 12, 2.0, 0.0])
    forget_accelerate()
    resumed = run(dataclasses.replace(config, resume="auto"))
    assert resumed.results["training"] == outcome.results["training"]


def test_a_hundred_channels_with_names(tmp_path):
    rng = np.random.default_rng(0)
    data = image_folder(tmp_path / "data", lambda *_: rng.random((100, 8, 8), "f4"), {"": 4})
    config = TrainConfig(
        dataset=data, epochs=1, img_size=16, workers=0, output_dir=str(tmp_path / "run"),
        channels="+".join(f"marker_{i}" for i in range(100)), new_names=True, val_max_sets=2,
    )  # fmt: skip
    run(config)
    assert timm_varchan.hub.load(tmp_path / "run" / "model").channels.names[99] == "marker_99"

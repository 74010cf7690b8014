"""Saving, loading and pushing: real files, and a real client against a local server."""

import json
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import timm
import torch
from hub_server import TOKEN, HubServer
from safetensors.torch import save_file

import timm_varchan
from timm_varchan import RGB, ChannelSet, hub
from timm_varchan.__main__ import main

ROOT = Path(__file__).parents[1]
NAMES = ["cat", "dog", "emu"]


@pytest.fixture
def model():
    return timm.create_model("dwg_test_resnet", num_classes=3).eval()


@pytest.fixture
def folder(model, tmp_path):
    return hub.save(
        model, tmp_path / "m", class_names=NAMES, channels=RGB, img_size=64, crop_pct=0.9
    )


def test_config_holds_what_a_user_needs(model, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "dwg_test_resnet"
    assert config["label_names"] == NAMES
    assert config["input"]["channels"]["channels"][0] == {
        "name": "R", "wavelength_nm": 660.0, "mean": 0.485, "std": 0.229,
    }  # fmt: skip
    assert config["num_classes"] == 3
    assert "num_classes" not in config["model_args"]  # transformers would pass it twice
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert len({f.stat().st_mode for f in folder.iterdir()}) == 1  # who reads one reads the other
    results = tmp_path / "results.json"
    results.write_text("{}")
    hub.save(model, folder, class_names=NAMES, channels=RGB, img_size=64, files=[results])
    assert (folder / "results.json").read_text() == "{}"
    with pytest.raises(FileNotFoundError):
        hub.save(model, folder, class_names=NAMES, channels=RGB, img_size=64, files=["nowhere"])
    assert (folder / "results.json").exists(), "a failed save left half a folder"


def test_what_stored_numbers_are_divided_by_is_kept(model, folder, tmp_path, capsys, caplog):
    assert hub.load(folder).channels.value_scale is None
    hub.save(model, folder, class_names=NAMES, channels=RGB, img_size=64, value_scale=10000)
    assert hub.load(folder).channels.value_scale == 10000
    numpy.save(tmp_path / "x.npy", numpy.random.default_rng(0).integers(0, 9000, (3, 64, 64), "u2"))
    answers = []
    for scale in ([], ["--value-scale", "10000"]):
        assert main(["predict", str(folder), str(tmp_path / "x.npy"), "--json", *scale]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert main(["predict", str(folder), str(tmp_path / "x.npy"), "--value-scale", "65535"]) == 0
    assert "divided by 10000; these files are read divided by 65535" in caplog.text


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_load_gives_back_what_was_saved(model, folder, prefix):
    saved = hub.load(f"{prefix}{folder}")
    x = torch.randn(2, 5, 64, 64)
    torch.testing.assert_close(saved.model(x), model(x))
    assert (saved.channels, saved.spec.class_names) == (RGB, tuple(NAMES))
    assert (saved.spec.img_size, saved.spec.crop_pct) == (64, 0.9)


def test_load_with_other_arguments(folder):
    assert hub.load(folder, in_chans=5).model(torch.randn(1, 5, 64, 64)).shape == (1, 3)
    other = hub.load(folder, num_classes=2)
    assert other.model(torch.randn(1, 3, 64, 64)).shape == (1, 2)
    assert other.spec.class_names == ()
    features = hub.load(folder, features_only=True).model(torch.randn(1, 4, 64, 64))
    assert len(features) == 5


def test_load_by_name_knows_imagenet():
    saved = hub.load("dwg_test_resnet", pretrained=False)
    assert saved.spec.img_size == 160
    assert saved.spec.class_names[0].startswith("tench")
    assert saved.channels.mean == (0.5, 0.5, 0.5)
    assert hub.load("dwg_test_resnet", pretrained=False, in_chans=4).channels.is_anonymous


def test_channels_with_own_statistics(model, tmp_path):
    stained = ChannelSet.parse(
        [timm_varchan.Channel("ER", 500.0, 0.1, 0.2), timm_varchan.Channel("AGP", 600.0, 0.3, 0.4)]
    )
    folder = hub.save(model, tmp_path / "m", class_names=NAMES, channels=stained, img_size=64)
    saved = hub.load(folder)
    assert saved.channels == stained
    assert saved.select("AGP") == stained.take([1])
    assert saved.select("GB") == ChannelSet.parse("GB")


CONFIGS = {
    "transformers": {"architecture": None, "architectures": ["BertModel"]},
    "newer timm": {"architecture": "resnet_of_tomorrow"},
    "another architecture": {"architecture": "dwg_test_vit"},
    "arguments": {"model_args": {"num_wings": 2}},
    "channels": {"input": {"channels": [{"nm": 5}]}},
}


def _break(folder, case):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if case in CONFIGS:
        config.write_text(json.dumps({**json.loads(config.read_text()), **CONFIGS[case]}))
    elif case == "no json":
        config.write_text("{")
    elif case == "damaged":
        weights.write_bytes(b"nothing")
    elif case == "shape":
        save_file(timm.create_model("dwg_test_resnet", num_classes=4).state_dict(), weights)
    else:
        weights.unlink()
    if case == "pickled":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


@pytest.mark.parametrize(
    ("case", "kind", "text"),
    [
        ("pickled", ValueError, r"pytorch_model.bin, a pickle.*convert it: python -c"),
        ("no weights", FileNotFoundError, "no model.safetensors"),
        ("damaged", ValueError, "damaged"),
        ("no json", ValueError, "is no JSON"),
        ("transformers", ValueError, "names no architecture"),
        ("newer timm", ValueError, "'resnet_of_tomorrow', which timm"),
        ("another architecture", ValueError, "Cannot load"),
        ("shape", ValueError, "size mismatch for fc.weight"),
        ("arguments", ValueError, "num_wings"),
        ("channels", ValueError, "saved channel set"),
    ],
)
def test_broken_folders_are_one_line(folder, case, kind, text):
    _break(folder, case)
    with pytest.raises(kind, match=text) as caught:
        hub.load(folder)
    assert "\n" not in str(caught.value)


def test_only_what_a_user_can_cure_is_one_line(folder, monkeypatch):
    with pytest.raises(ValueError, match="Cannot load dwg_test_resnet"):
        hub.load("dwg_test_resnet", pretrained=False, num_wings=2)
    with pytest.raises(ValueError, match=r"Invalid pretrained tag \(yesterday\)"):
        hub.load("resnet18.yesterday")

    def broken(*args, **kwargs):
        return None.forward

    monkeypatch.setattr(timm, "create_model", broken)
    for source in ("dwg_test_resnet", folder):
        with pytest.raises(AttributeError):
            hub.load(source, pretrained=False)


@pytest.mark.parametrize("name", ["nothing_such", "org/name", "s3:bucket"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="hf-hub:"):
        hub.load(name)


def test_pickles_are_not_saved_or_pushed(model, folder, tmp_path):
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle"):
        hub.push(folder, "org/name")
    with pytest.raises(ValueError, match="is a pickle"):
        hub.save(
            model, tmp_path / "n", class_names=NAMES, channels=RGB, img_size=64,
            files=[folder / "optimizer.pt"],
        )  # fmt: skip


# Runs in a process of its own: the client reads its variables when it is imported.
CLIENT = """
import json, sys, urllib.request
import timm, torch
import timm_varchan
from timm_varchan import RGB, hub

folder = sys.argv[1]
def error(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except (ValueError, RuntimeError, OSError) as e:
        return f"{type(e).__name__}: {e}"

model = hub.load(folder).model
x, seen = torch.randn(2, 3, 64, 64), {}
seen["address"] = hub.push(folder, "org/name")
seen["again"] = hub.push(folder, "org/name")
pulled = timm.create_model("hf-hub:org/name", pretrained=True).eval()
seen["difference"] = (pulled(x) - model(x)).abs().max().item()
other = timm.create_model("hf-hub:org/name", pretrained=True, in_chans=5, num_classes=2)
seen["other"] = other(torch.randn(2, 5, 64, 64)).shape[1]
features = timm.create_model("hf-hub:org/name", pretrained=True, features_only=True)
seen["features"] = len(features(torch.randn(2, 7, 64, 64)))
saved = hub.load("hf-hub:org/name@main")
seen["saved"] = [str(saved.channels), saved.spec.class_names, saved.spec.img_size]
for name in ("org/nothing", "org/name@v3", "org/pickled", "org/broken", "org/empty", "a b/c"):
    seen[name] = error(hub.load, f"hf-hub:{name}")
seen["wrong token"] = error(hub.push, folder, "org/name", token="hf_wrong")
seen["no token"] = error(hub.push, folder, "org/name", token=False)
seen["failed"] = error(hub.push, folder, "org/failing", private=False, revision="main")
urllib.request.urlopen(urllib.request.Request(sys.argv[2] + "/stop", method="PUT", data=b""))
seen["no network"] = error(hub.push, folder, "org/name")
seen["cached"] = str(hub.load("hf-hub:org/name").channels)
seen["not cached"] = error(hub.load, "hf-hub:org/other")
print(json.dumps(seen))
"""


def test_push_and_pull(folder, tmp_path):
    (folder / "results.json").write_text("{}")
    with HubServer() as server:
        server.files = {
            "org/pickled": {"config.json": (folder / "config.json").read_bytes(),
                            "pytorch_model.bin": b""},
            "org/broken": {"config.json": b"{", "model.safetensors": b""},
            "org/empty": {},
        }  # fmt: skip
        variables = {
            "HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(folder), server.url],
            env={**os.environ, **variables}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    pushed = server.files["org/name"]
    assert set(pushed) == {"config.json", "model.safetensors", "results.json"}
    assert pushed["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(server.uploads) == 1, "the same weights were sent again"
    assert server.private["org/name"] in (True, "private")
    assert server.private["org/failing"] not in (True, "private")
    assert seen["address"] == seen["again"] == f"{server.url}/org/name"
    assert seen["difference"] == 0
    assert (seen["other"], seen["features"]) == (2, 5)
    assert seen["saved"] == ["RGB", NAMES, 64]
    expected = {
        "org/nothing": "FileNotFoundError.*no repository org/nothing",
        "org/name@v3": "no such revision",
        "org/pickled": "UserError.*a pickle.*convert it",
        "org/broken": "UserError.*is no JSON",
        "org/empty": "FileNotFoundError.*lacks config.json",
        "a b/c": "Give ORG/NAME",
        "wrong token": "no valid token.*HF_TOKEN.*Nothing is lost.*repeat with: timm-varchan push",
        "no token": "no valid token.*hf auth login.*Nothing is lost",
        "failed": "answered 500.*Nothing.*push .*org/failing --public --revision main$",
        "no network": "cannot be reached.*Check the network.*Nothing is lost",
        "not cached": "ToolError.*cannot be reached",
    }
    for case, text in expected.items():
        assert "\n" not in seen[case]
        with pytest.raises(RuntimeError, match=text):
            raise RuntimeError(seen[case])
    assert seen["cached"] == "RGB"
    assert (folder / "model.safetensors").exists()


@pytest.fixture
def server(tmp_path):
    """A hub for commands in processes of their own, and their environment."""
    with HubServer() as hub_server:
        variables = {
            "HF_ENDPOINT": hub_server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        yield hub_server, {**os.environ, **variables}


def run(*command, env):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_training_pushes(server, tmp_path):
    """After training, in one command; what fails is repeated by the command that is printed."""
    hub_server, env = server
    train = ["hf_train.py", "--channels", "RG", "--limit", "20", "--img-size", "16", "--epochs",
             "1", "--workers", "0", "--batch-size", "8", "--eval-max-sets", "2", "--model",
             "dwg_test_resnet"]  # fmt: skip
    train += ["--output-dir", tmp_path / "run", "--push-to-hub"]
    failed = run(*train, "org/failing", env=env)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: Could not push to org/failing")
    command = failed.stderr.strip().rpartition("repeat with: timm-varchan ")[2]
    assert (tmp_path / "run" / "results.json").exists()
    words = shlex.split(command.replace("org/failing", "org/name"))
    again = run("-m", "timm_varchan", *words, env=env)
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == f"{hub_server.url}/org/name"
    assert hub_server.private["org/name"] in (True, "private")
    pushed = hub_server.files["org/name"]
    assert {"config.json", "model.safetensors", "README.md", "results.json", "curves.png"} <= set(
        pushed
    )
    assert b"org/name" in pushed["README.md"] or b"org/failing" in pushed["README.md"]
    resumed = run(*train, "org/name", "--resume", "auto", env=env)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == f"{hub_server.url}/org/name"
    assert b"hf-hub:org/name" in hub_server.files["org/name"]["README.md"]


def test_a_busy_hub_is_told_of_once(server, folder, tmp_path):
    hub_server, env = server
    hub_server.files = {"org/name": {f.name: f.read_bytes() for f in folder.iterdir()}}
    hub_server.busy = 2
    command = ["export", "hf-hub:org/name", tmp_path / "m.pt2", "--channels", "G", "--fixed-size"]
    done = run("-m", "timm_varchan", *command, env=env)
    assert done.returncode == hub_server.busy == 0, done.stderr
    assert done.stderr.count("503") == done.stderr.count("Retrying") == 1


def test_push_writes_the_card(server, folder):
    hub_server, env = server
    pushed = run("-m", "timm_varchan", "push", folder, "org/name", "--public", env=env)
    assert pushed.returncode == 0, pushed.stderr
    assert b"hf-hub:org/name" in hub_server.files["org/name"]["README.md"]
    assert hub_server.private["org/name"] not in (True, "private")

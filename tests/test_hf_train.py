"""`hf_train.py` in real processes, as users launch it."""

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from launching import (
    LAUNCHED_ONE,
    ONE,
    ROOT,
    TINY_ARGS,
    TWO,
    environment,
    evaluate_args,
    launched,
    results,
    with_file,
)
from tiny_runs import fresh_accelerate  # noqa: F401

from timm_varchan.errors import UserError
from timm_varchan.training import TrainConfig
from timm_varchan.training.train import create_accelerator


def test_two_processes_train_and_one_finds_exactly_their_metrics(tmp_path):
    # Every process has other channel sets in its batch, and the last batch is short.
    args = [*TINY_ARGS, "--epochs", "1", "--channel-aug", "hcs-sample", "--expect-processes", "2"]
    two = launched(TWO, [*args, "--output-dir", str(tmp_path / "2")], ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("| channels") == 1
    both = results(tmp_path / "2")
    assert both["machine"]["num_processes"] == 2
    assert both["data"]["num_images"]["evaluated"] == 47
    model = str(tmp_path / "2" / "model")
    one = launched(ONE, evaluate_args(model, tmp_path / "1"), script="evaluate")
    assert one.returncode == 0, one.stderr
    assert results(tmp_path / "1")["machine"]["num_processes"] == 1
    assert results(tmp_path / "1")["evaluation"]["sets"] == both["evaluation"]["sets"]


def test_stopped_by_a_signal_and_resumed_with_the_printed_flags(tmp_path):
    folder = tmp_path / "a run"
    args = [*TINY_ARGS, "--epochs", "8", "--output-dir", str(folder)]
    process = subprocess.Popen(
        [sys.executable, "hf_train.py", *args], cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err
    assert not (folder / "results.json").exists()
    script, *flags = shlex.split(out.splitlines()[-1])
    assert (script, flags[0]) == ("timm-varchan", "train")
    resumed = launched(ONE, flags[1:])
    assert resumed.returncode == 0, resumed.stderr
    assert f"Everything is in {folder}/" in resumed.stdout
    chance = 100 / len(results(folder)["data"]["class_names"])
    assert f"chance {chance:.1f} %" in resumed.stdout.splitlines()[-1]
    for label in ("data", "channels", "images", "model", "training", "device", "folder"):
        assert re.search(rf"^{label} +\S", resumed.stderr, re.M), label
    assert "3: RGB, as --channels RGB says" in resumed.stderr
    assert "| RGB " in resumed.stdout
    history = results(folder)["training"]["history"]
    assert [entry["epoch"] for entry in history] == list(range(8))
    assert results(folder)["training"]["updates"] == 8 * (47 // 8)
    assert (folder / "model" / "README.md").exists()
    for name in ("results.md", "summary.csv", "curves.png", "channel_sets.png", "model"):
        assert (folder / name).exists()


def test_two_processes_that_ignore_each_other_are_refused(tmp_path):
    done = launched(TWO, [*TINY_ARGS, "--output-dir", str(tmp_path / "run")])
    assert done.returncode != 0
    assert "launcher started 2 processes, but each works on its own" in done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        (LAUNCHED_ONE, ["--dataset", "./nowhere"], "There is no ./nowhere"),
        (ONE, ["--lr", "fast"], "could not convert string to float: 'fast'"),
    ],
    ids=["accelerate", "python"],
)
def test_an_error_is_said_once_and_leaves_no_folder(command, args, message, tmp_path):
    done = launched(command, [*TINY_ARGS, *args, "--output-dir", str(tmp_path / "run")])
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count(message) == 1
    assert "timm_varchan/" not in done.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("env", "expected", "message"),
    [
        ({}, None, None),
        ({}, 2, "2 processes were expected, but 1 run"),
        ({"MASTER_ADDR": "127.0.0.1"}, None, None),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, None, "with --cpu"),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, 1, None),
        ({"ACCELERATE_USE_FSDP": "true"}, None, "FSDP was asked for, but the launcher set up NO"),
    ],
)
def test_the_launcher_is_checked(monkeypatch, tmp_path, env, expected, message):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    config = TrainConfig(output_dir=str(tmp_path), expect_processes=expected)
    if message is None:
        assert create_accelerator(config).num_processes == 1
    else:
        with pytest.raises(UserError, match=message):
            create_accelerator(config)


# ---- the configurations of accelerate, started where this machine can

#: What each file must become.
KINDS = {
    "cpu": "NO", "cpu2": "MULTI_CPU", "one_gpu": "NO", "multi_gpu": "MULTI_GPU",
    "several_nodes": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp": "FSDP",
}  # fmt: skip


def test_every_file_is_known_to_accelerate_and_listed():
    files = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert files == set(KINDS)
    text = (ROOT / "configs" / "README.md").read_text()
    for name in files:
        assert f"`{name}.yaml`" in text
        config = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))
        given = yaml.safe_load(Path(ROOT / "configs" / f"{name}.yaml").read_text())
        assert config.num_processes == given["num_processes"]


def start(name, folder, *more, **variables):
    processes = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["num_processes"]
    args = [*TINY_ARGS, "--batch-size", "4", "--epochs", "2", "--expect-processes", str(processes)]
    args += ["--clip-grad", "0.01", "--grad-accum-steps", "2", "--output-dir", str(folder), *more]
    done = launched(with_file(f"{name}.yaml"), args, **variables)
    assert done.returncode == 0, done.stderr
    found = results(folder)
    assert found["machine"]["distributed_type"] == KINDS[name]
    assert found["machine"]["num_processes"] == processes
    return found


def losses(found):
    return [entry["train_loss"] for entry in found["training"]["history"]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_zero_2_and_3_do_what_plain_processes_do(tmp_path):
    # Clipping by far: DeepSpeed left to itself would clip at 1. Accumulation: the same updates.
    plain = start("cpu2", tmp_path / "plain", ACCELERATE_USE_CPU="true")
    for name in ("zero2", "zero3"):
        more = ("--eval-checkpoint", "best")
        found = start(name, tmp_path / name, *more)
        assert losses(found) == pytest.approx(losses(plain), rel=1e-4)
        assert (tmp_path / name / "model" / "model.safetensors").is_file()
        again = evaluate_args(str(tmp_path / name / "model"), tmp_path / f"{name}-again")
        assert launched(with_file("cpu.yaml"), again, script="evaluate").returncode == 0
        saved = results(tmp_path / f"{name}-again")
        assert saved["evaluation"]["sets"] == found["evaluation"]["sets"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_several_nodes_train_together(tmp_path):
    """Two launchers, one process each, that meet at an address: as two machines do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    args = [*TINY_ARGS, "--batch-size", "4", "--epochs", "2", "--expect-processes", "2"]
    args += ["--clip-grad", "0.01", "--grad-accum-steps", "2"]

    def node(rank):
        here = ["--machine_rank", str(rank), "--num_processes", "2", "--mixed_precision", "no"]
        here += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command = [*with_file("several_nodes.yaml"), *here]
        own = [*args, "--output-dir", str(tmp_path / "nodes")]
        return launched(command, own, ACCELERATE_USE_CPU="true")

    with ThreadPoolExecutor(2) as threads:
        for done in threads.map(node, range(2)):
            assert done.returncode == 0, done.stderr
    found = results(tmp_path / "nodes")
    assert found["machine"]["num_processes"] == 2
    assert found["machine"]["distributed_type"] == "MULTI_CPU"
    assert losses(found) == losses(start("cpu2", tmp_path / "one", ACCELERATE_USE_CPU="true"))

"""`hf_train.py` in real processes, as users launch it."""

import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from launching import LAUNCHED_ONE, ONE, ROOT, TINY_ARGS, TWO, environment, launched, results

from timm_varchan.training import launch


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
    args = [*TINY_ARGS, "--eval-only", model, "--output-dir", str(tmp_path / "1")]
    one = launched(ONE, args)
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
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert not (folder / "results.json").exists()
    script, *flags = shlex.split(out.splitlines()[-1])
    assert script == "hf_train.py"
    resumed = launched(ONE, flags)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Everything is in {folder}/" in resumed.stdout
    chance = 100 / len(results(folder)["data"]["class_names"])
    assert f"chance is {chance:.1f} %" in resumed.stdout.splitlines()[-1]
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
    assert "the launcher started 2 processes, but each works on its own" in done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [ONE, LAUNCHED_ONE], ids=["python", "accelerate"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset", "./nowhere"], "There is no ./nowhere"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
    ],
    ids=["data", "flag"],
)
def test_an_error_is_one_line_and_the_last(command, args, message, tmp_path):
    done = launched(command, [*TINY_ARGS, *args, "--output-dir", str(tmp_path / "run")])
    assert done.returncode != 0
    last = done.stderr.splitlines()[-1]
    assert last.startswith("hf_train: ")
    assert message in last
    assert done.stderr.count("hf_train: ") == 1


@pytest.mark.parametrize(
    ("env", "processes", "expected", "message"),
    [
        ({}, 1, None, None),
        ({"WORLD_SIZE": "2"}, 2, 2, None),
        ({"WORLD_SIZE": "2"}, 1, None, "2 processes, but each works on its own"),
        ({}, 1, 2, "2 processes were expected, but 1 run"),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, None, None),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, 1, None, "with --cpu"),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, 1, 1, None),
    ],
)
def test_the_launcher_is_checked(monkeypatch, env, processes, expected, message):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    problem = launch._wrong_processes(processes, expected)
    assert (problem is None) if message is None else message in problem

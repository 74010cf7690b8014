"""`hf_train.py` in real processes, as users launch it."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from timm_varchan.training import launch

ROOT = Path(__file__).parents[1]
TINY = ["--channels", "RGB", "--limit", "47", "--img-size", "16", "--workers", "0"]
TINY += ["--batch-size", "8", "--eval-batch-size", "10", "--eval-max-sets", "4"]
TWO = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--num_cpu_threads_per_process", "1", "--main_process_port", "0",
]  # fmt: skip


def environment(**changes):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE", "RANK", "WORLD"))}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**env, **offline, "CUDA_VISIBLE_DEVICES": "", **changes}


def launched(command, args, **changes):
    return subprocess.run(
        [*command, "hf_train.py", *args], cwd=ROOT, env=environment(**changes), text=True,
        capture_output=True, timeout=280,
    )  # fmt: skip


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_two_processes_train_and_one_finds_exactly_their_metrics(tmp_path):
    # Every process has other channel sets in its batch, and the last batch is short.
    args = [*TINY, "--epochs", "1", "--channel-aug", "hcs-sample", "--expect-processes", "2"]
    two = launched(TWO, [*args, "--output-dir", str(tmp_path / "2")], ACCELERATE_USE_CPU="true")
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("| channels") == 1
    both = results(tmp_path / "2")
    assert both["machine"]["num_processes"] == 2
    assert both["data"]["num_images"]["evaluated"] == 47
    model = str(tmp_path / "2" / "model")
    args = [*TINY, "--eval-only", model, "--output-dir", str(tmp_path / "1")]
    one = launched([sys.executable], args)
    assert one.returncode == 0, one.stderr
    assert results(tmp_path / "1")["machine"]["num_processes"] == 1
    assert results(tmp_path / "1")["evaluation"]["sets"] == both["evaluation"]["sets"]


def test_stopped_by_a_signal_and_resumed_with_the_printed_flags(tmp_path):
    folder = tmp_path / "a run"
    args = [*TINY, "--epochs", "8", "--output-dir", str(folder)]
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
    resumed = launched([sys.executable], flags)
    assert resumed.returncode == 0, resumed.stderr
    assert f"Everything is in {folder}/" in resumed.stdout
    assert "| RGB " in resumed.stdout
    history = results(folder)["training"]["history"]
    assert [entry["epoch"] for entry in history] == list(range(8))
    assert results(folder)["training"]["updates"] == 8 * (47 // 8)
    for name in ("results.md", "summary.csv", "curves.png", "channel_sets.png", "model"):
        assert (folder / name).exists()


def test_two_processes_that_ignore_each_other_are_refused(tmp_path):
    done = launched(TWO, [*TINY, "--output-dir", str(tmp_path / "run")])
    assert done.returncode != 0
    assert "the launcher started 2 processes, but each works on its own" in done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()


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
    problem = launch._problem(processes, expected)
    assert (problem is None) if message is None else message in problem

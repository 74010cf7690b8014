"""Runs that are killed at a random step, in real processes, end as if nothing had happened."""

import csv
import random
import signal

import pytest
from launching import ONE, TINY_ARGS, TWO, launched
from safetensors.torch import load_file

from timm_varchan.training.checkpoint import Checkpoints, read_progress

# Everything that draws: order, augmentation, channels, mixup, dropout. 5 updates an epoch.
ARGS = [
    *TINY_ARGS, "--epochs", "3", "--channel-aug", "hcs-sample", "--checkpoint-steps", "2",
    "--auto-augment", "trivial", "--erase-prob", "0.25", "--mixup", "0.2", "--cutmix", "1",
    "--ema-decay", "0.99", "--drop-path", "0.2", "--model-kwargs", "drop_rate=0.3",
]  # fmt: skip
TIMES = {"seconds", "loader_share", "images_per_second"}


def summary(folder):
    with (folder / "summary.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "workers"), [(1, "2"), (2, "0")])
def test_killed_and_resumed_is_bit_equal(tmp_path, processes, workers):
    command, variables = (ONE, {}) if processes == 1 else (TWO, {"ACCELERATE_USE_CPU": "true"})
    size = ["--batch-size", "4"] if processes == 2 else []
    args = [*ARGS, *size, "--workers", workers, "--expect-processes", str(processes)]
    whole = launched(command, [*args, "--output-dir", str(tmp_path / "whole")], **variables)
    assert whole.returncode == 0, whole.stderr

    folder = tmp_path / "killed"
    args += ["--output-dir", str(folder), "--resume", "auto"]
    rng = random.Random(f"{processes} {workers}")
    killed_at = rng.choice([3, 4, 5])  # within the first epoch, after a checkpoint
    script = "tests/killed_train.py"
    for kill_at in (killed_at, rng.randint(2, 6)):  # the second time: counted from where it resumed
        killed = launched(command, args, script, **variables, KILL_AT=str(kill_at))
        # torchrun outlives its processes and tells of them
        assert killed.returncode == -signal.SIGKILL or "(SIGKILL)" in killed.stderr, killed.stderr
        assert not (folder / "results.json").exists()
        checkpoints = Checkpoints(folder / "checkpoints")
        if kill_at == killed_at:
            assert read_progress(checkpoints.last()).step > 0
    resumed = launched(command, args, **variables)
    assert resumed.returncode == 0, resumed.stderr
    assert "Resuming from" in resumed.stderr

    assert summary(folder) == summary(tmp_path / "whole")
    ends = [Checkpoints(path / "checkpoints").last() for path in (folder, tmp_path / "whole")]
    files = ["model.safetensors", *(f"process-{i:05d}.safetensors" for i in range(processes))]
    for file in files:
        ours, theirs = (load_file(end / file) for end in ends)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours), file
    saved = [load_file(p / "model" / files[0]) for p in (folder, tmp_path / "whole")]
    assert all(saved[0][name].equal(saved[1][name]) for name in saved[0])

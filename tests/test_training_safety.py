"""Nothing is lost: damaged checkpoints, full disks, losses that are no numbers."""

import dataclasses
import errno
import json
import math
import shutil
from collections import namedtuple

import pytest
from tiny_runs import REFUSED, TINY, flags_of, forget_accelerate, fresh_accelerate  # noqa: F401

from timm_varchan.__main__ import main
from timm_varchan.training import CheckpointError, run
from timm_varchan.training import checkpoint as checkpoint_module
from timm_varchan.training.checkpoint import Checkpoints, Progress, damage, read_progress

STEPS = dataclasses.replace(TINY, checkpoint_steps=1)
LOSSES = ("train_loss", "train_accuracy", "eval_loss", "eval_accuracy", "lr", "eval_sets")


def history(outcome):
    return [{k: e[k] for k in LOSSES} for e in outcome.results["training"]["history"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that saved after every step."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        outcome = run(dataclasses.replace(STEPS, output_dir=str(folder)))
    forget_accelerate()
    return outcome


def copied(finished, tmp_path):
    """The finished run as it was before its last epoch had ended."""
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    for name in ("results.json", "model", "summary.csv"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def truncate(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def half_write(checkpoint):
    (checkpoint / "progress.json").write_text('{"progress": {"epo')


def change(checkpoint):
    file = checkpoint / "optimizer.bin"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


HARMS = {
    "shorter": truncate,
    "a bit": change,
    "a file less": lambda checkpoint: (checkpoint / "random_states_0.pkl").unlink(),
    "half written": half_write,
    "no seal": lambda checkpoint: (checkpoint / "progress.json").unlink(),
}


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(finished, tmp_path, caplog):
    for name, harm in HARMS.items():
        folder = copied(finished, tmp_path / name)
        checkpoints = Checkpoints(folder / "checkpoints")
        *_, before, newest = checkpoints.all()
        assert damage(newest) is None
        harm(newest)
        assert damage(newest) is not None
        assert checkpoints.last() == before
        assert f"{newest} is damaged" in caplog.text
        with pytest.raises(ValueError, match="is no checkpoint"):
            checkpoints.resume_from(str(newest))
    outcome = run(dataclasses.replace(STEPS, output_dir=str(folder), resume="auto"))
    assert history(outcome) == history(finished)
    assert damage(newest) is None


def test_without_a_sound_checkpoint_the_run_begins_anew(finished, tmp_path):
    folder = copied(finished, tmp_path)
    for checkpoint in Checkpoints(folder / "checkpoints").all():
        truncate(checkpoint)
    outcome = run(dataclasses.replace(STEPS, output_dir=str(folder), resume="auto"))
    assert history(outcome) == history(finished)


def test_an_older_damaged_one_is_in_nobodys_way(finished, tmp_path):
    folder = copied(finished, tmp_path)
    checkpoints = Checkpoints(folder / "checkpoints")
    shutil.copytree(checkpoints.all()[-1], checkpoints.path / "step-00000001")
    half_write(checkpoints.path / "step-00000001")
    assert checkpoints.best() == Checkpoints(folder / "checkpoints").best() is not None
    truncate(checkpoints.all()[-1])
    run(dataclasses.replace(STEPS, output_dir=str(folder), resume="auto"))
    assert not (checkpoints.path / "step-00000001").exists()


def test_the_two_newest_and_the_best_are_kept(finished):
    found = Checkpoints(finished.folder / "checkpoints")
    names = [path.name for path in found.all()]
    assert names[-2:] == ["step-00000005", "step-00000006"]
    assert len(names) in (2, 3)
    assert read_progress(found.best()).step == 0


def test_without_validation_the_newest_checkpoint_is_the_best(tmp_path):
    folder = Checkpoints(tmp_path / "checkpoints")
    for number, accuracy in enumerate((math.nan, math.nan, math.nan)):
        write_checkpoint(tmp_path, number, accuracy)
    assert folder.best().name == "step-00000002"
    for number, accuracy in enumerate((0.2, 0.6, 0.4, math.nan), start=3):
        write_checkpoint(tmp_path, number, accuracy)
    assert folder.best().name == "step-00000004"


def write_checkpoint(path, updates, accuracy):
    checkpoint = path / "checkpoints" / f"step-{updates:08d}"
    checkpoint.mkdir(parents=True)
    progress = Progress(updates=updates, history=[{"eval_accuracy": accuracy}])
    (checkpoint / "progress.json").write_text(
        json.dumps({"progress": dataclasses.asdict(progress), "files": {}})
    )


def test_a_half_written_checkpoint_is_none(tmp_path):
    folder = Checkpoints(tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / ".writing-step-00000009").mkdir(parents=True)
    assert folder.last() is None
    assert folder.best() is None


Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_cannot_hold_the_checkpoints_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    config = dataclasses.replace(TINY, output_dir=str(tmp_path / "run"))
    with pytest.raises(REFUSED, match=r"need about \d+ MiB, but 1 MiB are free .*--output-dir"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(
    finished, tmp_path, monkeypatch, capsys
):
    config = dataclasses.replace(STEPS, output_dir=str(tmp_path / "run"))
    original = checkpoint_module._seal

    def full(folder, progress):
        if progress.updates == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(folder, progress)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_seal", full)
        with pytest.raises(CheckpointError, match=r"No space left.*--resume auto.*step-00000004"):
            run(config)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.last().name == "step-00000004"
    assert not list(checkpoints.path.glob(".writing*"))
    forget_accelerate()
    outcome = run(dataclasses.replace(config, resume="auto"))
    assert history(outcome) == history(finished)
    forget_accelerate()
    # ... and the command says it in one line.
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_seal", full)
        args = flags_of(dataclasses.replace(STEPS, output_dir=str(tmp_path / "script")))
        assert main(["train", *args]) == 1
        (line,) = [text for text in capsys.readouterr().err.splitlines() if "error: " in text]
        assert "error: A checkpoint cannot be written" in line


def test_checkpoints_of_another_number_of_images_are_refused(finished, tmp_path):
    folder = copied(finished, tmp_path)
    mark = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**mark, "batch_size": 4}))
    config = dataclasses.replace(STEPS, output_dir=str(folder), resume="auto", batch_size=4)
    with pytest.raises(REFUSED, match="8 images an update, this run has 4"):
        run(config)

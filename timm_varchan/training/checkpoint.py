"""The folder of a run, and its checkpoints: there whole or not at all, looked at before use."""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_varchan.errors import UserError
from timm_varchan.training.config import MARK, TrainConfig
from timm_varchan.training.report import environment, write_json

logger = logging.getLogger(__name__)

#: Written last; holds the sizes and checksums of all other files.
PROGRESS = "progress.json"
#: How many are kept besides the best: where the newest is damaged, the one before it serves.
NUM_KEPT = 2
#: Fields in which a resumed run may differ from the one that it continues.
_FREE_FIELDS = (
    "output_dir", "resume", "workers", "cache", "expect_processes", "sets", "missing",
    "eval_modes", "eval_orders", "eval_batch_size", "eval_checkpoint", "eval_statistics",
    "checkpoint_steps", "trackers", "push_to_hub",
)  # fmt: skip


class CheckpointError(UserError):
    """A checkpoint could not be written."""


@dataclass
class Progress:
    """How far training is: epochs done, updates (`step`) in the one after them, updates in all.

    `history` has an entry an epoch, as in `summary.csv`.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    images_per_update: int = 0
    num_processes: int = 1

    @property
    def rank(self) -> tuple[float, int]:
        """The higher, the better: validation accuracy; where there is none, the newest."""
        accuracy = self.history[-1]["eval_accuracy"] if self.history else math.nan
        return (-1.0, self.updates) if math.isnan(accuracy) else (accuracy, 0)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, in a folder of their own."""

    path: Path

    def all(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        return sorted(self.path.glob("step-*"))

    def last(self) -> Path | None:
        """The newest checkpoint that is whole; others are named in the log."""
        for checkpoint in reversed(self.all()):
            problem = damage(checkpoint)
            if problem is None:
                return checkpoint
            logger.warning("%s is damaged (%s): the one before it is used", checkpoint, problem)
        return None

    def last_good(self) -> str:
        """A sentence on what is left after a failure."""
        good = self.last()
        return f"The last good checkpoint is {good}" if good else "No checkpoint is saved"

    def best(self) -> Path | None:
        """The checkpoint at the end of an epoch with the highest validation accuracy."""
        ranks = {}
        for checkpoint in self.all():
            try:
                progress = read_progress(checkpoint)
            except (OSError, ValueError, KeyError):
                continue  # damaged
            if progress.step == 0:
                ranks[checkpoint] = progress.rank
        return max(ranks, key=lambda c: ranks[c], default=None)

    def save(
        self, accelerator: Accelerator, progress: Progress, extra: Mapping[str, Tensor]
    ) -> None:
        """Write a checkpoint under another name and rename it; keep the newest and the best.

        Call it on every process, with what the accelerator does not know of it.

        Raises:
            CheckpointError: It cannot be written; those before it are as they were.
        """
        target = self.path / f"step-{progress.updates:08d}"
        temporary = self.path / f".writing-{target.name}"
        try:
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(temporary))
            save_file(dict(extra), temporary / _own_name(accelerator.process_index))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _seal(temporary, progress)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
                _sync(self.path)
                self._forget_old()
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"A checkpoint cannot be written to {self.path} ({error}). Free space or make the "
                f"folder writable, then go on with --resume auto. {self.last_good()}."
            ) from error
        accelerator.wait_for_everyone()

    def _forget_old(self) -> None:
        found = self.all()
        keep = {*found[-NUM_KEPT:], self.best()}
        for old in found:
            if old not in keep:
                shutil.rmtree(old)

    def load(
        self, accelerator: Accelerator, checkpoint: Path
    ) -> tuple[Progress, dict[str, Tensor]]:
        """Load a checkpoint into what the accelerator prepared.

        Returns:
            The progress, and what each process alone knew: the main process's, then this one's.
        """
        progress = read_progress(checkpoint)
        accelerator.load_state(str(checkpoint))
        extra = load_file(checkpoint / _own_name(0))
        mine = checkpoint / _own_name(accelerator.process_index)
        return progress, {**extra, **load_file(mine)} if mine.is_file() else extra

    def resume_from(self, resume: str | None) -> Path | None:
        """The checkpoint that `--resume` means.

        Raises:
            UserError: There is none, or it is damaged.
        """
        if resume is None:
            return None
        if resume == "auto":
            return self.last()
        problem = damage(Path(resume))
        if problem is not None:
            raise UserError(
                f"--resume {resume} is no checkpoint ({problem}). Give a folder "
                f"checkpoints/step-... of a run, or 'auto'."
            )
        return Path(resume)

    def check_space(self, bytes_each: int) -> None:
        """Refuse a disk that cannot hold checkpoints of this size.

        Raises:
            UserError: Too little is free.
        """
        old = sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())
        needed = (NUM_KEPT + 2) * bytes_each - old  # kept, the best, and the one being written
        free = shutil.disk_usage(_existing(self.path.parent)).free
        if free < needed:
            raise UserError(
                f"The checkpoints need about {needed / 2**20:,.0f} MiB, but {free / 2**20:,.0f} "
                f"MiB are free for {self.path.parent}. Free some, or choose another --output-dir."
            )


def _own_name(process_index: int) -> str:
    return f"process-{process_index:05d}.safetensors"


def read_progress(checkpoint: Path) -> Progress:
    """How far training was at a checkpoint."""
    return Progress(**json.loads((checkpoint / PROGRESS).read_text())["progress"])


def damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        files = json.loads((checkpoint / PROGRESS).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{PROGRESS} cannot be read: {error}"
    for name, expected in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if list(_fingerprint(file)) != expected:
            return f"{name} is not what was written"
    return None


def _seal(folder: Path, progress: Progress) -> None:
    """Put everything on the disk, and last what tells how everything should look."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            _sync(file)
            files[str(file.relative_to(folder))] = _fingerprint(file)
    sealed = folder / PROGRESS
    sealed.write_text(json.dumps({"progress": asdict(progress), "files": files}, indent=2))
    _sync(sealed)


def _fingerprint(file: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    size = check = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            size, check = size + len(chunk), zlib.crc32(chunk, check)
    return size, check


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(config: TrainConfig, accelerator: Accelerator) -> None:
    """See that the output folder may become this run's own, before anything is trained.

    The main process looks, all hear of it; nothing is written: `claim_folder` follows when nothing
    else can go wrong.

    Raises:
        UserError: It cannot be written, holds something else, or a run with another configuration.
    """
    verdict: list[str | None] = [None]
    if accelerator.is_main_process:
        verdict = [_refusal(config.folder, config)]
    broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise UserError(verdict[0])


def claim_folder(config: TrainConfig) -> None:
    """Make the folder, with the run's mark and where it runs; once everything is set up."""
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / MARK).write_text(json.dumps(config.to_json(), indent=2))
    write_json(environment(), config.folder / "environment.json")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def _refusal(path: Path, config: TrainConfig) -> str | None:
    """Why a folder cannot be this run's, or None."""
    try:
        with tempfile.TemporaryFile(dir=_existing(path)):
            pass
    except OSError as error:
        return (
            f"The output folder {path} cannot be written ({error.strerror}). Choose another one "
            f"with --output-dir."
        )
    if not path.exists() or not any(path.iterdir()):
        return None
    mark = path / MARK
    if not mark.is_file():
        return f"{path} is not empty and holds no run. Choose another --output-dir."
    if config.resume is None:
        return (
            f"{path} holds a run already. Continue it with: timm-varchan train --resume auto "
            f"--output-dir {shlex.quote(str(path))} - or choose another --output-dir."
        )
    return _difference(path, json.loads(mark.read_text(encoding="utf-8")), config.to_json())


def _difference(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """In what the run in a folder differs from the one that should continue it."""
    # The workers of a stream share its files out: which images they meet depends on their number.
    free = [name for name in _FREE_FIELDS if name != "workers" or not new["streaming"]]
    changed = [
        f"{name} {old.get(name)!r} -> {value!r}"
        for name, value in new.items()
        if name not in free and old.get(name) != value
    ]
    if not changed:
        return None
    flags = " ".join("--" + name.replace("_", "-") for name in free)
    return (
        f"{path} holds another run ({'; '.join(changed)}). Continue it with its own flags (see "
        f"run.json), or choose another --output-dir. These may change: {flags}"
    )

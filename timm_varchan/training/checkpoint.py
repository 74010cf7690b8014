"""Checkpoints that are there whole or not at all, and are looked at before they are used."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from timm_varchan.errors import UserError

__all__ = ["CheckpointError", "Checkpoints", "Progress", "read_progress"]

logger = logging.getLogger(__name__)

#: Written last; holds the sizes and checksums of all other files.
PROGRESS = "progress.json"
#: How many are kept besides the best: where the newest is damaged, the one before it serves.
NUM_KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


@dataclass
class Progress:
    """How far training is.

    Args:
        epoch: Epochs done.
        step: Updates done in the epoch after them.
        updates: Updates done altogether.
        history: One entry an epoch, as in `summary.csv`.
        images_per_update: Images an update over all processes.
        num_processes: How many processes.
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

    def save(self, accelerator: Accelerator, progress: Progress, own: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint under another name and rename it; keep the newest and the best.

        Call it on every process.

        Args:
            accelerator: Saves what it prepared.
            progress: How far training is.
            own: What this process alone knows.

        Raises:
            CheckpointError: It cannot be written; those before it are as they were.
        """
        target = self.path / f"step-{progress.updates:08d}"
        temporary = self.path / f".writing-{target.name}"
        with self._reporting(temporary):
            if accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(temporary))
            save_file(dict(own), temporary / _own_name(accelerator.process_index))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                _seal(temporary, progress)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(temporary, target)
                _sync(self.path)
                self._forget_old()
        accelerator.wait_for_everyone()
        return target

    @contextmanager
    def _reporting(self, temporary: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            good = self.last()
            cure = f"The last good checkpoint is {good}" if good else "No checkpoint is saved"
            raise CheckpointError(
                f"A checkpoint cannot be written to {self.path} ({error}). Free space or make the "
                f"folder writable, then go on with --resume auto. {cure}."
            ) from error

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
        own = load_file(checkpoint / _own_name(0))
        mine = checkpoint / _own_name(accelerator.process_index)
        return progress, {**own, **load_file(mine)} if mine.is_file() else own

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

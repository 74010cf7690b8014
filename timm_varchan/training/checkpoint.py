"""Checkpoints that are there whole or not at all, and the folder that belongs to one run."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_varchan.training.configuration import TrainConfig

__all__ = ["Progress", "RunFolder", "check_folder"]

#: The file that says whose a folder is.
MARK = "run.json"

#: Fields in which a resumed run may differ from the one that it continues.
_FREE_FIELDS = frozenset(
    {
        "output_dir", "resume", "workers", "expect_processes", "eval_modes", "eval_orders",
        "eval_max_sets", "eval_batch_size", "eval_checkpoint",
    }
)  # fmt: skip


@dataclass
class Progress:
    """How far training is.

    Args:
        epoch: Epochs done.
        step: Steps done in the epoch after them.
        updates: Steps done altogether.
        sums: Loss, correct and seen images of the epoch's steps so far, over all processes.
        history: One entry an epoch, as in `summary.csv`.
        images_per_step: Images a step over all processes.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    history: list[dict[str, float]] = field(default_factory=list)
    images_per_step: int = 0

    @property
    def rank(self) -> tuple[float, int]:
        """The higher, the better: validation accuracy; where there is none, the newest."""
        accuracy = self.history[-1]["eval_accuracy"] if self.history else math.nan
        return (-1.0, self.updates) if math.isnan(accuracy) else (accuracy, 0)


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a run and its checkpoints."""

    path: Path

    def claim(self, config: TrainConfig) -> None:
        """Write the run's mark; the main process does, once everything is set up."""
        (self.path / MARK).write_text(json.dumps(config.to_json(), indent=2))

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def checkpoints(self) -> list[Path]:
        """The finished checkpoints, oldest first."""
        return sorted(self._checkpoints.glob("step-*"))

    def last(self) -> Path | None:
        """The newest checkpoint."""
        found = self.checkpoints()
        return found[-1] if found else None

    def best(self) -> Path | None:
        """The checkpoint at the end of an epoch with the highest validation accuracy."""
        whole = [c for c in self.checkpoints() if read_progress(c).step == 0]
        return max(whole, key=lambda c: read_progress(c).rank, default=None)

    def save(self, accelerator: Accelerator, progress: Progress) -> Path:
        """Write a checkpoint under another name and rename it; keep the last and the best.

        Call it on every process.
        """
        target = self._checkpoints / f"step-{progress.updates:08d}"
        temporary = self._checkpoints / f".writing-{target.name}"
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / "progress.json").write_text(json.dumps(asdict(progress), indent=2))
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            keep = {self.last(), self.best()}
            for old in self.checkpoints():
                if old not in keep:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()
        return target

    def load(self, accelerator: Accelerator, checkpoint: Path) -> Progress:
        """Load a checkpoint into what the accelerator prepared."""
        accelerator.load_state(str(checkpoint))
        return read_progress(checkpoint)

    def resume_from(self, resume: str | None) -> Path | None:
        """The checkpoint that `--resume` means.

        Raises:
            ValueError: There is none.
        """
        if resume is None:
            return None
        if resume == "auto":
            return self.last()
        path = Path(resume)
        if not (path / "progress.json").is_file():
            raise ValueError(
                f"--resume {resume} is no checkpoint (it has no progress.json). Give a folder "
                f"checkpoints/step-... of a run, or 'auto'."
            )
        return path


def read_progress(checkpoint: Path) -> Progress:
    """How far training was at a checkpoint."""
    values = json.loads((checkpoint / "progress.json").read_text())
    return Progress(**{**values, "sums": tuple(values["sums"])})


def check_folder(config: TrainConfig, accelerator: Accelerator) -> RunFolder:
    """See that the output folder may become this run's own, before anything is trained.

    Args:
        config: The run.
        accelerator: The main process looks, all hear of it.

    Returns:
        The folder; `RunFolder.claim` makes it the run's own when nothing else can go wrong.

    Raises:
        ValueError: It cannot be written, holds something else, or a run with another configuration.
    """
    folder = RunFolder(Path(config.output_dir))
    verdict: list[str | None] = [None]
    if accelerator.is_main_process:
        verdict = [_refusal(folder.path, config)]
    broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise ValueError(verdict[0])
    return folder


def _refusal(path: Path, config: TrainConfig) -> str | None:
    """Why a folder cannot be this run's, or None."""
    mark = path / MARK
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        return (
            f"The output folder {path} cannot be written ({error.strerror}). Choose another one "
            f"with --output-dir."
        )
    if any(path.iterdir()):
        if not mark.is_file():
            return f"{path} is not empty and holds no run. Choose another --output-dir."
        if config.resume is None:
            return (
                f"{path} holds a run already. Continue it with --resume auto, or choose another "
                f"--output-dir."
            )
        return _difference(path, json.loads(mark.read_text()), config.to_json())
    return None


def _difference(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """In what the run in a folder differs from the one that should continue it."""
    changed = [
        f"{name} {old.get(name)!r} -> {value!r}"
        for name, value in new.items()
        if name not in _FREE_FIELDS and old.get(name) != value
    ]
    if not changed:
        return None
    return (
        f"{path} holds another run ({'; '.join(changed)}). Continue it with its own flags (see "
        f"run.json), or choose another --output-dir."
    )

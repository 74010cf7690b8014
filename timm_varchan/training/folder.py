"""The output folder, which belongs to one run."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from timm_varchan.errors import UserError
from timm_varchan.training.checkpoint import NUM_KEPT, Checkpoints
from timm_varchan.training.configuration import MARK, TrainConfig
from timm_varchan.training.environment import environment, write_json

__all__ = ["RunFolder", "check_folder"]

#: Fields in which a resumed run may differ from the one that it continues.
_FREE_FIELDS = frozenset(
    {
        "output_dir", "resume", "workers", "prefetch", "cache", "expect_processes", "eval_modes",
        "eval_orders", "eval_sets", "eval_max_sets", "missing", "baseline",
        "eval_batch_size", "eval_checkpoint", "eval_statistics",
        "checkpoint_steps", "trackers", "push_to_hub", "push_public",
    }
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a run."""

    path: Path

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.path / "checkpoints")

    def claim(self, config: TrainConfig) -> None:
        """Write the run's mark and where it runs; once everything is set up."""
        (self.path / MARK).write_text(json.dumps(config.to_json(), indent=2))
        write_json(environment(), self.path / "environment.json")

    def check_space(self, bytes_each: int) -> None:
        """Refuse a disk that cannot hold the checkpoints.

        Args:
            bytes_each: Size of one.

        Raises:
            UserError: Too little is free.
        """
        old = sum(f.stat().st_size for f in self.checkpoints.path.rglob("*") if f.is_file())
        needed = (NUM_KEPT + 2) * bytes_each - old  # kept, the best, and the one being written
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"The checkpoints need about {needed / 2**20:,.0f} MiB, but {free / 2**20:,.0f} "
                f"MiB are free for {self.path}. Free some, or choose another --output-dir."
            )


def check_folder(config: TrainConfig, accelerator: Accelerator) -> RunFolder:
    """See that the output folder may become this run's own, before anything is trained.

    Args:
        config: The run.
        accelerator: The main process looks, all hear of it.

    Returns:
        The folder; `RunFolder.claim` makes it the run's own when nothing else can go wrong.

    Raises:
        UserError: It cannot be written, holds something else, or a run with another configuration.
    """
    folder = RunFolder(Path(config.output_dir))
    verdict: list[str | None] = [None]
    if accelerator.is_main_process:
        verdict = [_refusal(folder.path, config)]
    broadcast_object_list(verdict)
    if verdict[0] is not None:
        raise UserError(verdict[0])
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
        old = TrainConfig.from_json(json.loads(mark.read_text(encoding="utf-8")))
        return _difference(path, old.to_json(), config.to_json())
    return None


def _difference(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """In what the run in a folder differs from the one that should continue it."""
    # The workers of a stream share its files out: which images they come to hangs on their number.
    free = _FREE_FIELDS - {"workers"} if new["streaming"] else _FREE_FIELDS
    changed = [
        f"{name} {old.get(name)!r} -> {value!r}"
        for name, value in new.items()
        if name not in free and old.get(name) != value
    ]
    if not changed:
        return None
    return (
        f"{path} holds another run ({'; '.join(changed)}). Continue it with its own flags (see "
        f"run.json), or choose another --output-dir."
    )

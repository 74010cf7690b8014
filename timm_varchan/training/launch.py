"""Processes that work together, or a clear error: the launcher's silent failures are refused."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
)

__all__ = ["create_accelerator"]

_TWO_ON_CPU = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0 hf_train.py"
)


def create_accelerator(expect_processes: int | None = None) -> Accelerator:
    """The accelerator of a run, after checking that the launcher did what it was asked.

    DDP does not broadcast buffers: it would send the first process's channel tables to all others,
    whose batches have other channel sets; BatchNorm's statistics are averaged each epoch instead.

    Args:
        expect_processes: How many processes must work together; not checked if None.

    Returns:
        The accelerator.

    Raises:
        SystemExit: Processes that do not know of each other, fewer than expected, or DeepSpeed
            that was asked for and is not on.
    """
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    wants_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wants_deepspeed and not torch.cuda.is_available():
        # DeepSpeed's own choice on a CPU leaves every process alone.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(kwargs_handlers=handlers)
    problem = _problem(accelerator.num_processes, expect_processes)
    if wants_deepspeed and accelerator.distributed_type != DistributedType.DEEPSPEED:
        problem = (
            f"DeepSpeed was asked for, but the launcher set up {accelerator.distributed_type.value}"
            f". Leave ACCELERATE_USE_CPU unset together with --use_deepspeed."
        )
    if problem is not None:
        accelerator.end_training()
        # One process speaks; processes that ignore each other know their place from here only.
        raise SystemExit(problem if os.environ.get("RANK", "0") == "0" else 1)
    return accelerator


def _problem(num_processes: int, expected: int | None) -> str | None:
    """What is wrong with the number of processes, and the cure."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes:
        return (
            f"the launcher started {started} processes, but each works on its own "
            f"({num_processes} of {num_processes}): they would do the same work and overwrite each "
            f"other's files. Without a GPU launch as: {_TWO_ON_CPU.format(n=started)}"
        )
    if expected is not None and expected != num_processes:
        return (
            f"{expected} processes were expected, but {num_processes} run. `accelerate launch "
            f"--cpu` starts only one; launch as: {_TWO_ON_CPU.format(n=expected)}"
        )
    # accelerate sets the address for several processes, then starts one if it is given --cpu.
    launched_alone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if expected is None and launched_alone and "ACCELERATE_MIXED_PRECISION" in os.environ:
        return (
            f"accelerate was asked for several processes, but started one, as it does with --cpu. "
            f"Launch as: {_TWO_ON_CPU.format(n=2)} - or, if one process is right, say "
            f"--expect-processes 1"
        )
    return None

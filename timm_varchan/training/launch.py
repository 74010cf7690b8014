"""Processes that work together, or a clear error: the launcher's silent failures are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    ProjectConfiguration,
)

from timm_varchan.training.configuration import TrainConfig

__all__ = ["create_accelerator", "is_sharded", "stop"]

#: What may be asked for and silently not done, with the cure.
_ASKED = {
    DistributedType.DEEPSPEED: "Leave ACCELERATE_USE_CPU unset together with --use_deepspeed.",
    DistributedType.FSDP: "FSDP needs GPUs under accelerate; on CPUs use configs/zero3.yaml.",
}
#: ZeRO's stage that divides the weights too.
_ALL_SHARDED = 3

_TWO_ON_CPU = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no --main_process_port 0 hf_train.py"
)


#: Prints an error once the launcher is gone: it has much to say of a process that failed.
_LAST_WORD = """
import sys, time, psutil
end = time.monotonic() + 30
try:
    launcher = psutil.Process(int(sys.argv[1]))
    while launcher.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
        time.sleep(0.05)
except psutil.Error:
    pass
sys.stderr.write(sys.argv[2])
"""


def stop(message: str, *, code: int = 1) -> NoReturn:
    """End the process with one line, the last that is shown, also under a launcher.

    Raises:
        SystemExit: Always.
    """
    text, launcher = f"hf_train: {message}\n", psutil.Process(os.getppid())
    try:
        launched = any(name in " ".join(launcher.cmdline()) for name in ("accelerate", "torchrun"))
    except psutil.Error:
        launched = False
    if launched and os.environ.get("RANK", "0") == "0":
        command = [sys.executable, "-c", _LAST_WORD, str(launcher.pid), text]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        raise SystemExit(code)
    if code == 1:
        raise SystemExit(text.strip())  # Python writes it and ends with 1
    sys.stderr.write(text)
    raise SystemExit(code)


def create_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, after checking that the launcher did what it was asked.

    DDP does not broadcast buffers: it would send the first process's channel tables to all others,
    whose batches have other channel sets; BatchNorm's statistics are averaged each epoch instead.

    Args:
        config: Precision, accumulation, clipping, trackers, and how many processes are expected.

    Returns:
        The accelerator.

    Raises:
        SystemExit: Processes that do not know of each other, fewer than expected, or DeepSpeed,
            FSDP or fp16 that was asked for and is not on.
    """
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    wants_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wants_deepspeed and not torch.cuda.is_available():
        # DeepSpeed's own choice on a CPU leaves every process alone.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    folder = Path(config.output_dir)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.grad_accum_steps, sync_with_dataloader=False
        ),
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(folder), str(folder / "tensorboard")),
        kwargs_handlers=handlers,
    )
    problem = _problem(accelerator.num_processes, config.expect_processes)
    problem = problem or _not_as_asked(accelerator.distributed_type)
    problem = problem or _precision_not_as_asked(accelerator)
    if problem is not None:
        accelerator.end_training()
        # One process speaks; processes that ignore each other know their place from here only.
        if os.environ.get("RANK", "0") == "0":
            stop(problem)
        raise SystemExit(1)
    if accelerator.state.deepspeed_plugin is not None:
        _configure_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, config)
    return accelerator


def _configure_deepspeed(values: dict[str, Any], config: TrainConfig) -> None:
    """Say to DeepSpeed what the flags say: left to itself it clips at 1."""
    values["gradient_clipping"] = config.clip_grad or 0.0
    values["gradient_accumulation_steps"] = config.grad_accum_steps
    values["train_micro_batch_size_per_gpu"] = config.batch_size
    values["zero_allow_untested_optimizer"] = True


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has all weights: ZeRO-3, FSDP."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return int(plugin.zero_stage) == _ALL_SHARDED
    return accelerator.distributed_type == DistributedType.FSDP


def _not_as_asked(got: DistributedType) -> str | None:
    """What is wrong with how the processes work together, and the cure."""
    for wanted, cure in _ASKED.items():
        asked = os.environ.get(f"ACCELERATE_USE_{wanted.name}", "false").lower() == "true"
        if asked and got != wanted:
            return f"{wanted.name} was asked for, but the launcher set up {got.value}. {cure}"
    return None


def _precision_not_as_asked(accelerator: Accelerator) -> str | None:
    """What is wrong with the precision, and the cure."""
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        return (
            "fp16 was asked for, but on a CPU accelerate computes in float32 without a word. Give "
            "--mixed-precision bf16 or no."
        )
    return None


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

"""Where a run runs: processes that work together or a clear error, divided weights, versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

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
    broadcast,
)
from timm.utils import unwrap_model
from torch import nn

from timm_varchan.errors import UserError
from timm_varchan.version import __version__

if TYPE_CHECKING:
    from timm_varchan.training.config import TrainConfig

__all__ = [
    "check_sharding",
    "create_accelerator",
    "environment",
    "processor",
    "stop",
    "whole_model",
]

#: Packages that decide about results.
_PACKAGES = ("timm", "torch", "accelerate", "datasets", "evaluate", "numpy")

#: What may be asked for and silently not done, with the cure.
_ASKED = {
    DistributedType.DEEPSPEED: "Leave ACCELERATE_USE_CPU unset together with --use_deepspeed.",
    DistributedType.FSDP: "FSDP needs GPUs under accelerate; on CPUs use configs/zero3.yaml.",
}
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

    Raises:
        SystemExit: Processes that do not know of each other, fewer than expected, or DeepSpeed,
            FSDP or fp16 that was asked for and is not on.
    """
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    wants_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wants_deepspeed and not torch.cuda.is_available():
        # DeepSpeed's own choice on a CPU leaves every process alone.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.grad_accum_steps, sync_with_dataloader=False
        ),
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.folder), str(config.folder / "tensorboard")),
        kwargs_handlers=handlers,
    )
    problem = next(_problems(accelerator, config.expect_processes), None)
    if problem is not None:
        accelerator.end_training()
        # One process speaks; processes that ignore each other know their place from here only.
        if os.environ.get("RANK", "0") == "0":
            stop(problem)
        raise SystemExit(1)
    if accelerator.state.deepspeed_plugin is not None:
        # What the flags say: left to itself DeepSpeed clips at 1.
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            gradient_clipping=config.clip_grad or 0.0,
            gradient_accumulation_steps=config.grad_accum_steps,
            train_micro_batch_size_per_gpu=config.batch_size,
            zero_allow_untested_optimizer=True,
        )
    return accelerator


def _problems(accelerator: Accelerator, expected: int | None) -> Iterator[str]:
    """What the launcher did otherwise than it was asked, and the cure."""
    started, running = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    # accelerate sets the address for several processes, then starts one if it is given --cpu.
    launched_alone = "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ
    if started != running:
        yield (
            f"the launcher started {started} processes, but each works on its own ({running} of "
            f"{running}): they would do the same work and overwrite each other's files. Without a "
            f"GPU launch as: {_TWO_ON_CPU.format(n=started)}"
        )
    if expected not in (None, running):
        yield (
            f"{expected} processes were expected, but {running} run. `accelerate launch --cpu` "
            f"starts only one; launch as: {_TWO_ON_CPU.format(n=expected)}"
        )
    if expected is None and launched_alone and "ACCELERATE_MIXED_PRECISION" in os.environ:
        yield (
            f"accelerate was asked for several processes, but started one, as it does with --cpu. "
            f"Launch as: {_TWO_ON_CPU.format(n=2)} - or, if one process is right, say "
            f"--expect-processes 1"
        )
    for wanted, cure in _ASKED.items():
        asked = os.environ.get(f"ACCELERATE_USE_{wanted.name}", "false").lower() == "true"
        if asked and accelerator.distributed_type != wanted:
            got = accelerator.distributed_type.value
            yield f"{wanted.name} was asked for, but the launcher set up {got}. {cure}"
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        yield (
            "fp16 was asked for, but on a CPU accelerate computes in float32 without a word. Give "
            "--mixed-precision bf16 or no."
        )


def _is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process has all weights: ZeRO-3, FSDP."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return int(plugin.zero_stage) == 3  # the stage that divides the weights too
    return accelerator.distributed_type == DistributedType.FSDP


def check_sharding(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse what needs all weights on every process, where none has them.

    Raises:
        UserError: Names the flag.
    """
    if _is_sharded(accelerator) and config.ema_decay is not None:
        raise UserError(
            "--ema-decay needs all weights on every process, which ZeRO-3 and FSDP divide. Add "
            "--ema-decay none, or use ZeRO-2."
        )


@torch.no_grad()
def whole_model(
    accelerator: Accelerator, model: nn.Module, build: Callable[[], nn.Module]
) -> nn.Module:
    """The trained model, unwrapped, with all its weights on every process.

    Args:
        accelerator: Prepared the model.
        model: The trained model.
        build: Makes an equal one with other weights, which takes them up if they are divided.
    """
    if not _is_sharded(accelerator):
        return unwrap_model(model)
    weights = accelerator.get_state_dict(model)  # all of them, on the main process alone
    whole = build()
    if accelerator.is_main_process:
        whole.load_state_dict(weights)
    whole.to(accelerator.device)
    for tensor in whole.state_dict().values():
        tensor.copy_(broadcast(tensor))
    return whole


def environment() -> dict[str, Any]:
    """Versions of the packages that decide about results, and the commit of the code."""
    return {
        "versions": {
            "python": platform.python_version(),
            "timm_varchan": __version__,
            **{name: metadata.version(name) for name in _PACKAGES},
        },
        "git_commit": _git_commit(),
    }


def processor() -> str:
    """The processor's name; Linux keeps it in a file."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the code that ran, if it runs from a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None

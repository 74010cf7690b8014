"""Timing models against each other: interleaved steps, ratios with their spread, peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Key = TypeVar("Key")

#: What PyTorch says when memory runs out.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Clock:
    """Times one call, in seconds: by the wall clock, on CUDA by events and synchronised."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        """Seconds that the call takes."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000


def interleave(
    calls: Mapping[Key, Callable[[], object]], clock: Clock, *, rounds: int, warmup: int
) -> dict[Key, list[float]]:
    """Time one step of each call in turn: whatever slows the machine down slows all of them.

    Args:
        calls: What to time, by name.
        clock: Times one of them.
        rounds: Timed steps of each.
        warmup: Steps of each before that count for nothing.

    Returns:
        Seconds of each timed step, by name.
    """
    steps: dict[Key, list[float]] = {name: [] for name in calls}
    for number in range(warmup + rounds):
        for name, call in calls.items():
            seconds = clock(call)
            if number >= warmup:
                steps[name].append(seconds)
    return steps


def race(
    benchmark: Any, models: Mapping[str, nn.Module], x: Tensor, *, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Time the first model with pytest-benchmark and, before each of its steps, the others.

    So every round holds one step of each model, in the same order, and whatever slows the machine
    down slows all of them.

    Args:
        benchmark: The fixture of pytest-benchmark.
        models: What to time; the first is the benchmark, the others are its baselines.
        x: The input of all.
        rounds: Timed steps of each model.
        warmup: Steps of each before that count for nothing.

    Returns:
        Seconds of each step, by model: `rounds` of them, or one where benchmarks are disabled.
    """
    own, *baselines = models
    clock = Clock(x.device)
    steps: dict[str, list[float]] = {name: [] for name in models}

    def step(name: str) -> None:
        steps[name].append(clock(lambda: models[name](x)))

    def setup() -> None:
        for name in baselines:
            step(name)

    benchmark.pedantic(step, args=(own,), setup=setup, rounds=rounds, warmup_rounds=warmup)
    timed = 1 if benchmark.disabled else rounds
    return {name: seconds[warmup : warmup + timed] if not benchmark.disabled else seconds
            for name, seconds in steps.items()}  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """The median, the quartiles, and the exact 95 % interval of the median by order statistics."""
    ordered = np.sort(values)
    below = max(0, int(stats.binom.ppf(0.025, len(ordered), 0.5)) - 1)
    q25, median, q75 = np.quantile(ordered, (0.25, 0.5, 0.75))
    figures = {"median": median, "q25": q25, "q75": q75}
    figures |= {"low": ordered[below], "high": ordered[len(ordered) - 1 - below]}
    return {name: float(value) for name, value in figures.items()}


def ratios(steps: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """The first model's time over that of each other one, round by round: `spread` of the ratios.

    Args:
        steps: From `race`.
    """
    own, *baselines = steps
    return {
        name: spread([a / b for a, b in zip(steps[own], steps[name], strict=True)])
        for name in baselines
    }


def peak_mib(model: nn.Module, x: Tensor) -> float:
    """Largest size of the tensors that are alive at once in a forward pass, in MiB.

    Without the weights and the input. On a CPU without what libraries allocate for themselves.
    """
    if x.device.type == "cuda":
        before = torch.cuda.memory_allocated(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        model(x)
        return (torch.cuda.max_memory_allocated(x.device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(x)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(0, *np.cumsum([size for _, size in changes]).tolist()) / 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)

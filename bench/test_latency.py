"""Latency of a twin, each number of channels interleaved with its baselines.

    pytest bench --benchmark-json=latency.json

Baselines: plain timm with `in_chans=C`, and the twin folded for the channel set. The figure is the
ratio of the times of a round, in `extra_info` with its spread; absolute times are of one machine.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from cost import (
    EMPTY_ROWS,
    Clock,
    is_out_of_memory,
    peak_mib,
    ratios,
    spread,
)
from torch import Tensor, nn

import timm_varchan
from timm_varchan import RGB, ChannelSet
from timm_varchan.folding import fold

# Compilers and the profiler warn of this and that; a long measurement must not end by it.
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(0)]


def contestants(options: Namespace, num_channels: int) -> dict[str, nn.Module]:
    """The twin and its baselines, with random weights, in evaluation mode."""
    channels = RGB if num_channels == len(RGB) else ChannelSet.anonymous(num_channels)
    twin = timm.create_model(options.model).eval()
    timm_varchan.set_channels(twin, channels)
    plain = timm.create_model(options.model.removeprefix("dwg_"), in_chans=num_channels).eval()
    models = {options.model: twin, "timm": plain}
    try:
        models["folded"] = fold(twin, channels)
    except ValueError:  # a first layer that is no convolution of the channels
        pass
    return {name: ready(model, options) for name, model in models.items()}


def ready(model: nn.Module, options: Namespace) -> nn.Module:
    """On the device, in the type and memory format that were asked for."""
    model = model.to(options.device, getattr(torch, options.precision))
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return torch.compile(model) if options.compiled else model


def images(options: Namespace, batch_size: int, num_channels: int) -> Tensor:
    """Random input."""
    shape = (batch_size, num_channels, options.img_size, options.img_size)
    x = torch.randn(shape, device=options.device, dtype=getattr(torch, options.precision))
    return x.to(memory_format=torch.channels_last) if options.channels_last else x


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


def test_latency(
    benchmark: Any, num_channels: int, batch_size: int, pytestconfig: pytest.Config
) -> None:
    """Time one row of the table."""
    options = pytestconfig.option
    row = {
        "model": options.model, "num_channels": num_channels, "batch_size": batch_size,
        "img_size": options.img_size, "device": options.device, "precision": options.precision,
        "channels_last": options.channels_last, "compiled": options.compiled,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    torch._dynamo.reset()  # else later rows meet the limit of recompilations
    benchmark.group = f"batch {batch_size}"
    try:
        models = contestants(options, num_channels)
        x = images(options, batch_size, num_channels)
        with torch.inference_mode():
            steps = race(benchmark, models, x, rounds=options.rounds, warmup=options.warmup)
            peaks = {name: peak_mib(model, x) for name, model in models.items()}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        pytestconfig.stash[EMPTY_ROWS].append({**row, "reason": reason})
        pytest.skip(f"no figure, and no smaller batch in its place: {reason}")
    num_steps = 1 if benchmark.disabled else options.rounds
    assert {len(seconds) for seconds in steps.values()} == {num_steps}
    benchmark.extra_info |= {
        **row,
        "rounds": options.rounds,
        "warmup": options.warmup,
        "ms": {name: spread([1000 * s for s in seconds]) for name, seconds in steps.items()},
        "ratios": ratios(steps),
        "peak_mib": peaks,
    }

"""Options of the latency benchmark, checked before anything is built or timed."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

import pytest
import timm
import torch
from cost import EMPTY_ROWS

import timm_varchan


def numbers(text: str) -> tuple[int, ...]:
    """Read `1,3,8`."""
    values = tuple(int(part) if part.isdecimal() else 0 for part in text.split(","))
    if min(values) < 1:
        raise ArgumentTypeError(f"whole numbers above 0 such as 1,3,8, not {text!r}")
    return values


def count(text: str) -> int:
    """Read a number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: it must be above 0, one whole number")
    return int(text)


def no_less(text: str) -> int:
    """Read a number that is not below 0."""
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r}: it must be a whole number, not below 0")
    return int(text)


def twin(name: str) -> str:
    """The name of a twin."""
    if not (name.startswith("dwg_") and timm.is_model(name)):
        raise ArgumentTypeError(
            f"{name!r} is no twin of timm_varchan. Give dwg_<architecture>, such as "
            f"dwg_densenet121; its baseline is <architecture> with in_chans=."
        )
    return name


def device(name: str) -> str:
    """A device that is there."""
    if name not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"{name!r}: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("there is no CUDA device here; use cpu")
    return name


def pytest_addoption(parser: pytest.Parser) -> None:
    """The conditions of the measurement; what cannot be measured is refused at once."""
    group = parser.getgroup("latency", "latency of timm_varchan's models")
    add = group.addoption
    add("--model", type=twin, default="dwg_densenet121", help="a twin, dwg_<architecture>")
    add("--counts", type=numbers, default=(1, 3, 8, 13), help="numbers of channels")
    add("--batches", type=numbers, default=(1, 8), help="batch sizes")
    add("--img-size", type=count, default=224, help="height and width, in pixels")
    add("--rounds", type=count, default=20, help="timed steps of each model")
    add("--warmup", type=no_less, default=3, help="steps before that")
    add("--device", type=device, default="cpu", help="cpu or cuda")
    add("--precision", default="float32", choices=("float32", "bfloat16"))
    add("--channels-last", action="store_true", help="memory format")
    add("--compiled", action="store_true", help="torch.compile each model")
    add("--threads", type=count, default=None, help="CPU threads of PyTorch")


def pytest_configure(config: pytest.Config) -> None:
    """Take the number of threads."""
    if config.option.threads:
        torch.set_num_threads(config.option.threads)
    config.stash[EMPTY_ROWS] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each number of channels and batch size."""
    if "num_channels" in metafunc.fixturenames:
        metafunc.parametrize("num_channels", metafunc.config.option.counts)
        metafunc.parametrize("batch_size", metafunc.config.option.batches)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Add what the times depend on; the host's name is nobody's business."""
    machine_info.pop("node", None)
    machine_info["cpu"] = {
        name: value for name, value in machine_info.get("cpu", {}).items()
        if name in ("brand_raw", "count", "l2_cache_size", "l3_cache_size")
    }  # fmt: skip
    machine_info |= {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "timm_varchan": timm_varchan.__version__,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_benchmark_compare_machine_info(
    machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Refuse to compare times of different machines; other versions are what is compared.

    Raises:
        UsageError: Another processor, accelerator or number of threads.
    """
    other = compared_benchmark["machine_info"]
    kinds = ("machine", "threads", "accelerator")
    different = [f"{k} {other.get(k)}, here {machine_info[k]}" for k in kinds
                 if other.get(k) != machine_info[k]]  # fmt: skip
    brands = [info.get("cpu", {}).get("brand_raw") for info in (other, machine_info)]
    if brands[0] != brands[1]:
        different.append(f"processor {brands[0]}, here {brands[1]}")
    if different:
        raise pytest.UsageError(
            f"The compared file is of another machine: {'; '.join(different)}. Measure again here."
        )
    # The plugin's own check comes next; it warns, and so ends the run, where a version differs.
    compared_benchmark["machine_info"] = machine_info


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Add the rows that could not be measured, and why."""
    output_json["empty_rows"] = config.stash[EMPTY_ROWS]

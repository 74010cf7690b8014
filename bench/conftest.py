"""Options of the latency benchmark, checked before anything is built or timed."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from cost import EMPTY_ROWS, LatencyOptions

import timm_varchan


def numbers(text: str) -> tuple[int, ...]:
    """Read `1,3,8`."""
    values = tuple(int(part) for part in text.split(","))
    if min(values) < 1:
        raise ValueError(text)
    return values


def pytest_addoption(parser: pytest.Parser) -> None:
    """The conditions of the measurement."""
    group = parser.getgroup("latency", "latency of timm_varchan's models")
    group.addoption("--model", default="dwg_densenet121", help="a twin, dwg_<architecture>")
    group.addoption("--counts", default="1,3,8,13", help="numbers of channels")
    group.addoption("--batches", default="1,8", help="batch sizes")
    group.addoption("--img-size", type=int, default=224, help="height and width, in pixels")
    group.addoption("--rounds", type=int, default=20, help="timed steps of each model")
    group.addoption("--warmup", type=int, default=3, help="steps before that")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--precision", default="float32", choices=("float32", "bfloat16"))
    group.addoption("--channels-last", action="store_true", help="memory format")
    group.addoption("--compiled", action="store_true", help="torch.compile each model")
    group.addoption("--threads", type=int, default=None, help="CPU threads of PyTorch")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what cannot be measured.

    Raises:
        UsageError: An unknown model, no CUDA when asked for, numbers that are none.
    """
    get = config.getoption
    name, device = get("--model"), get("--device")
    if not (name.startswith("dwg_") and timm.is_model(name)):
        raise pytest.UsageError(
            f"--model {name!r} is no twin of timm_varchan. Give dwg_<architecture>, such as "
            f"dwg_densenet121; its baseline is <architecture> with in_chans=."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here. Use --device cpu.")
    if device not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device {device!r}: choose cpu or cuda.")
    try:
        counts, batches = numbers(get("--counts")), numbers(get("--batches"))
    except ValueError as error:
        raise pytest.UsageError(
            f"--counts and --batches take whole numbers above 0 such as 1,3,8, not {error}."
        ) from error
    if min(get("--rounds"), get("--img-size")) < 1 or get("--warmup") < 0:
        raise pytest.UsageError("--rounds and --img-size must be above 0, --warmup not below.")
    if get("--threads"):
        torch.set_num_threads(get("--threads"))
    config.stash[EMPTY_ROWS] = []
    config.stash[LatencyOptions.KEY] = LatencyOptions(
        model=name, counts=counts, batches=batches, img_size=get("--img-size"),
        rounds=get("--rounds"), warmup=get("--warmup"), device=device,
        precision=get("--precision"), channels_last=get("--channels-last"),
        compiled=get("--compiled"),
    )  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each number of channels and batch size."""
    if "num_channels" in metafunc.fixturenames:
        options = metafunc.config.stash[LatencyOptions.KEY]
        metafunc.parametrize("num_channels", options.counts)
        metafunc.parametrize("batch_size", options.batches)


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

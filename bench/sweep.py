"""Build every twin and run it with several numbers of channels; write what happened as CSV.

    python bench/sweep.py --output bench/results/twins-timm1.0.31.csv
    python bench/sweep.py --tools factory --output tools.csv                        # all of them
    python bench/sweep.py --tools save --output saved.csv                           # all of them
    python bench/sweep.py --tools factory script trace local --one-per-family --output tools.csv

Architectures with at most `--max-params` million parameters run for real, with one image; larger
ones on the meta device, which checks shapes alone. Rows already in the file are not repeated, so an
interrupted sweep goes on where it stopped. Backbones of free input size run at the smallest of
96, 128, 192 px and their own size that they take, the others at their own size.

`--tools` tries instead, on the meta device, what other programs do: `device=` of the factory,
`torch.jit.script` and `torch.fx.symbolic_trace`; the last two count where the base passes; `save`:
the twin's state dict loaded as its pretrained weights; `local`: saved to a folder and loaded by
`local-dir:`, with real weights.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch
from timm.layers import set_scriptable
from timm.models import save_for_hf
from torch import nn
from tqdm import tqdm

import timm_varchan

COUNTS = (1, 2, 3, 5)
COLUMNS = (
    "model", "base_params", "stem_params", "device", "img_size", "channels", "outcome", "reason",
    "seconds",
)  # fmt: skip
TOOLS = ("factory", "script", "trace", "save", "local")


def sizes(model: nn.Module) -> list[int]:
    """Image sizes to try, in pixels, smallest first."""
    largest = max(model.pretrained_cfg["input_size"][-2:])
    if model.pretrained_cfg.get("fixed_input_size"):
        return [largest]
    return [size for size in (96, 128, 192) if size < largest] + [largest]


def run(model: nn.Module, device: str) -> int:
    """Run the model with every number of channels; returns the image size that it took."""
    tried = sizes(model)
    for size in tried:
        try:
            shapes = {
                tuple(model(torch.randn(1, count, size, size, device=device)).shape)
                for count in COUNTS
            }
        except (RuntimeError, AssertionError, ValueError):
            if size == tried[-1]:
                raise
            continue
        if len(shapes) > 1:
            raise RuntimeError(f"The shape of the answer depends on the channels: {shapes}")
        return size
    raise AssertionError("unreachable")


@torch.inference_mode()
def examine(name: str, max_params: int) -> dict[str, object]:
    """Build one twin, run it, and say what happened."""
    row: dict[str, object] = {"model": name, "channels": "+".join(map(str, COUNTS))}
    start = time.perf_counter()
    try:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        stem = sum(p.numel() for m in model.modules() if isinstance(m, timm_varchan.DWGMixer)
                   for p in m.parameters())  # fmt: skip
        total = sum(p.numel() for p in model.parameters())
        device = "meta" if total > max_params else "cpu"
        row |= {"base_params": total - stem, "stem_params": stem, "device": device}
        if device == "cpu":
            model = timm.create_model(name).eval()
        row |= {"img_size": run(model, device), "outcome": "ok"}
    except Exception as error:  # noqa: BLE001  the reason of every failure is the result
        row |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    row["seconds"] = f"{time.perf_counter() - start:.1f}"
    return row


def _on_meta(name: str) -> nn.Module:
    """A model built by `device="meta"`, every tensor of which is there."""
    model = timm.create_model(name, device="meta")
    tensors = [*model.parameters(), *model.buffers()]
    for mixer in (m for m in model.modules() if isinstance(m, timm_varchan.DWGMixer)):
        tensors += [getattr(mixer, table) for table in mixer.table_names]
    elsewhere = {tensor.device.type for tensor in tensors} - {"meta"}
    if elsewhere:
        raise RuntimeError(f"tensors on {elsewhere}")
    return model


def _from_weights(name: str, state: dict[str, torch.Tensor]) -> nn.Module:
    """A model without memory that was given these weights as pretrained ones."""
    overlay = {"state_dict": state, "url": "", "hf_hub_id": None, "custom_load": False}
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, device="meta", prior="spectral"
    )


def _same_weights(model: nn.Module, again: nn.Module) -> None:
    """Refuse another set of weights, other shapes, or (where there are any) other values."""
    ours, theirs = model.state_dict(), again.state_dict()
    different = set(ours) ^ set(theirs) or {
        key
        for key, value in ours.items()
        if value.shape != theirs[key].shape
        or (value.device.type != "meta" and not torch.equal(value, theirs[key]))
    }
    if different:
        raise RuntimeError(f"weights differ after loading: {sorted(different)[:3]}")


def _use(tool: str, name: str) -> None:
    """Do to a model what other programs do; raises what they would see."""
    if tool in ("factory", "save"):
        model = _on_meta(name)
        if tool == "save":
            _same_weights(model, _from_weights(name, model.state_dict()))
        return
    if tool == "local":
        with tempfile.TemporaryDirectory() as folder:
            model = timm.create_model(name, num_classes=3)
            save_for_hf(model, folder, safe_serialization=True)
            again = timm.create_model(f"local-dir:{folder}", pretrained=True)
        _same_weights(model, again)
        return
    with set_scriptable(tool == "script"):
        model = _on_meta(name).eval()
        torch.jit.script(model) if tool == "script" else torch.fx.symbolic_trace(model)


def examine_tools(name: str, tools: list[str]) -> dict[str, object]:
    """Use tools on a twin; a tool that fails on the base too is no failure of the twin."""
    row: dict[str, object] = {"model": name, "device": "meta", "outcome": "ok"}
    start, reasons, passed = time.perf_counter(), [], []
    for tool in tools:
        try:
            _use(tool, name)
            passed.append(tool)
        except Exception as error:  # noqa: BLE001  the reason of every failure is the result
            with contextlib.suppress(Exception):
                _use(tool, name.removeprefix("dwg_"))
                reasons.append(f"{tool}: {type(error).__name__}: {error}"[:200])
    if reasons:
        row |= {"outcome": "failed", "reason": " | ".join(reasons)}
    else:
        row["reason"] = "+".join(passed)
    row["seconds"] = f"{time.perf_counter() - start:.1f}"
    return row


def one_per_family(names: list[str]) -> list[str]:
    """The first architecture of each of timm's modules."""
    wanted, chosen = set(names), []
    for family in timm.list_modules():
        twins = [f"dwg_{name}" for name in timm.list_models(module=family)]
        found = sorted(wanted.intersection(twins), key=lambda name: (len(name), name))
        chosen += found[:1]
    return chosen


def main() -> None:
    """Parse the command line and sweep."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="CSV file, appended to")
    parser.add_argument("--filter", nargs="+", default=["dwg_*"], help="models, by wildcards")
    parser.add_argument("--max-params", type=int, default=100_000_000, help="largest real forward")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, help="use these, run nothing")
    parser.add_argument("--one-per-family", action="store_true", help="one twin a family of timm")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    done = set()
    if args.output.exists():
        with args.output.open() as file:
            done = {row["model"] for row in csv.DictReader(file)}
    with args.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not done:
            writer.writeheader()
        names = timm.list_models(args.filter)
        names = one_per_family(names) if args.one_per_family else names
        for name in tqdm([n for n in names if n not in done]):
            tried = examine_tools(name, args.tools) if args.tools else None
            writer.writerow(tried or examine(name, args.max_params))
            file.flush()
            gc.collect()
    with args.output.open() as file:
        rows = list(csv.DictReader(file))
    failed = [row for row in rows if row["outcome"] != "ok"]
    print(f"{len(rows) - len(failed)} of {len(rows)} twins ran ({1 - len(failed) / len(rows):.2%})")
    for row in failed:
        print(f"  {row['model']}: {row['reason']}")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()

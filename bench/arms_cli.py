"""The command line that Task I and Task II share: arms and seeds to run, reports to write."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from finished_runs import run_path
from small_images import Images, load


def add_run_arguments(parser: argparse.ArgumentParser, arms: Iterable[str], epochs: int) -> None:
    """What `run` takes."""
    names = list(arms)
    parser.add_argument("--data", type=Path, required=True, help="folder with the Parquet files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs' results")
    parser.add_argument("--arms", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--num-classes", type=int, default=25)
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """What `report` takes."""
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs' results")
    parser.add_argument("--json", type=Path, required=True, help="file; what else is beside it")
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores", help="in words")


def unfinished(args: argparse.Namespace) -> Iterator[tuple[str, int, Path, Images, Images]]:
    """Arm, seed, file, training and test images of every run that has no result yet."""
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    data = None
    for seed in args.seeds:
        for name in args.arms:
            target = run_path(args.output, name, seed)
            if target.exists():
                continue
            data = data or load(args.data, args.num_classes, args.img_size)
            yield name, seed, target, *data


def machine(args: argparse.Namespace) -> str:
    """Where a report is made, in words."""
    return f"{platform.machine()}, torch {torch.__version__}, {args.machine}"


def write_report(path: Path, summary: Mapping[str, Any], table: str) -> None:
    """Write the summary as JSON and the table beside it, and print the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=1) + "\n")
    path.with_suffix(".md").write_text(table)
    print(table)

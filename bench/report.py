r"""Measure, and make every table and picture of the results.

    python bench/report.py --measure complexity latency accuracy   # on an idle machine
    python bench/report.py                                         # tables and pictures alone

Results lie in `bench/results/<version>/`. The tables go into `bench/REPORT.md` and wherever
README.md and docs/method.md ask for one: between `<!-- table: NAME -->` and `<!-- /table -->`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pictures import draw_cost, draw_sizes, draw_trade
from schema import read
from tables import TABLES, block_names, fill
from task1_tables import TASK1_TABLES, draw_task1, versus_table
from task2_report import beside_report_markdown, sets_markdown
from task2_report import markdown as task2_table

BENCH = Path(__file__).parent
ROOT = BENCH.parent
#: Of the version that was measured last; name a new folder here to measure another.
RESULTS = BENCH / "results" / "0.1.0"
REPORT = BENCH / "REPORT.md"
#: Documents that may ask for tables.
DOCUMENTS = (REPORT, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

#: What the accuracy benchmark trains: the package's own synthetic data, five bands, one seed.
MODELS = {
    "dwg": ("--model=dwg_test_resnet", "--channel-aug=hcs-sample"),
    "plain": ("--model=test_resnet", "--channel-aug=none"),
    "plain-masked": ("--model=test_resnet", "--channel-aug=hcs-mask"),
}
EXPERTS = ("RGB", "NIR", "SWIR1")
EPOCHS = 15


def measure_complexity(work: Path) -> list[list[str]]:
    """The command that counts."""
    return [[sys.executable, "bench/complexity.py", f"--output={RESULTS / 'complexity.json'}"]]


def measure_latency(work: Path) -> list[list[str]]:
    """The command that times `dwg_densenet121`."""
    target = RESULTS / "latency.json"
    return [[sys.executable, "-m", "pytest", "bench", "-q", "--rounds=60",
             f"--benchmark-json={target}"]]  # fmt: skip


def measure_accuracy(work: Path) -> list[list[str]]:
    """The commands that train what is not there yet, and compare it."""
    runs = dict(MODELS) | {
        f"expert-{name}": ("--model=test_resnet", "--channel-aug=none", f"--channels={name}")
        for name in EXPERTS
    }
    train = [
        [sys.executable, "hf_train.py", *options, f"--epochs={EPOCHS}", "--img-size=32",
         f"--output-dir={work / name}"]
        for name, options in runs.items() if not (work / name / "model").is_dir()
    ]  # fmt: skip
    models = [f"--model={name}={work / name / 'model'}" for name in MODELS]
    experts = [f"--expert={name}={work / f'expert-{name}' / 'model'}" for name in EXPERTS]
    target = RESULTS / "accuracy.json"
    return [*train, [sys.executable, "bench/accuracy.py", "--data=synthetic", "--split=test",
                     "--img-size=32", *models, *experts, f"--output={target}"]]  # fmt: skip


STEPS = {
    "complexity": measure_complexity,
    "latency": measure_latency,
    "accuracy": measure_accuracy,
}


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by kind.

    Raises:
        ValueError: A file of another schema version, or a latency file that this bench did not
            write.
    """
    results = {
        kind: read(folder / f"{kind}.json", kind)
        for kind in ("complexity", "accuracy") if (folder / f"{kind}.json").is_file()
    }  # fmt: skip
    for kind, key in (
        ("latency", "empty_rows"), ("task1", "arms"), ("task2", "arms"), ("task2_short", "arms"),
        ("task1_seeds", "arms"), ("loading", "rows"), ("throughput", "loops"),
    ):  # fmt: skip
        path = folder / f"{kind}.json"
        if path.is_file():
            results[kind] = json.loads(path.read_text())
            if key not in results[kind]:
                raise ValueError(f"{path} has no {key!r}. Its command is in bench/README.md.")
    return results


def make_tables(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Every table that the results allow, by name."""
    tables = {name: make(results[kind]) for name, (kind, make) in TABLES.items() if kind in results}
    if "task1" in results:
        tables |= {name: make(results["task1"]) for name, make in TASK1_TABLES.items()}
    if "task1_seeds" in results:
        tables["task1-seeds"] = TASK1_TABLES["task1"](results["task1_seeds"])
        tables["task1-versus"] = versus_table(results["task1_seeds"])
    tables |= {k: task2_table(results[k]) for k in ("task2", "task2_short") if k in results}
    if "task2" in results:
        tables["task2-sets"] = sets_markdown(results["task2"])
        tables["task2-beside-report"] = beside_report_markdown(results["task2"])
    return tables


def draw(results: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    """Every picture that the results allow; the names of the files."""
    made: list[Path | None] = []
    if "complexity" in results:
        made.append(draw_cost(results["complexity"], results.get("latency"), folder / "cost.png"))
    if "accuracy" in results:
        made.append(draw_trade(results["accuracy"], folder / "accuracy_latency.png"))
        made.append(draw_sizes(results["accuracy"], folder / "sizes.png"))
    if "task1" in results:
        made.append(draw_task1(results["task1"], folder / "task1_curves.png"))
    return [path.name for path in made if path is not None]


def update(path: Path, tables: Mapping[str, str]) -> bool:
    """Put the tables into a document; whether it changed."""
    if not path.is_file():
        return False
    old = path.read_text()
    new = fill(old, tables)
    if new != old:
        path.write_text(new)
    return new != old


def main() -> None:
    """Parse the command line, measure what was asked for, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", nargs="*", choices=list(STEPS), default=[], metavar="STEP",
                        help=f"measure first: {', '.join(STEPS)}")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), metavar="FOLDER",
                        help="trained models; those there are not trained again")  # fmt: skip
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for step in args.measure:
        for command in STEPS[step](args.work.resolve()):
            subprocess.run(command, cwd=ROOT, check=True)
    try:
        results = read_results(RESULTS)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    tables = make_tables(results)
    pictures = draw(results, RESULTS)
    for path in DOCUMENTS:
        changed = update(path, tables)
        asked = [name for name in block_names(path.read_text()) if name not in tables]
        state = "changed" if changed else "as it was"
        print(f"{path.relative_to(ROOT)}: {state}" + (f"; no results for {asked}" if asked else ""))
    print(f"pictures in {RESULTS.relative_to(ROOT)}: {', '.join(pictures)}")


if __name__ == "__main__":
    main()

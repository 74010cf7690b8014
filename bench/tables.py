"""Every table of the results, made of the CSV files in `results/` alone: `TABLES`, by name."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, str]
#: Label of a row: arm and way.
Rows = Mapping[str, tuple[str, str]]

FEW = ("RGB", "all but one", "one", "every set")
MANY = ("all", "all but one", "RGB+NIR", "RGB", "one", "random")

#: Plain timm as people train it today, and the twin: 13 bands, from ImageNet weights.
UNTRAINED_13: Rows = {
    "plain timm, trained on all bands; absent ones are zero": ("tiled", "zero"),
    "the same; absent ones are the mean of the others": ("tiled", "mean"),
    "the same; absent ones are predicted (ours)": ("tiled", "measured"),
}
TRAINED_13: Rows = {
    "plain timm, trained with zeros": ("tiled-zero", "trained"),
    "plain timm, trained with the mean": ("tiled-mean", "trained"),
    "plain timm, trained with predictions (ours)": ("tiled-measured", "trained"),
    "RGB's kernels kept, others from zero, trained with zeros": ("rgb-zero", "trained"),
    "twin (ours)": ("twin-prior", "trained"),
    "twin with a learned part (ours)": ("twin", "trained"),
}
MORE_13: Rows = {
    "13 kernels": ("twin", "trained"),
    "6 kernels": ("twin-k6", "trained"),
    "3 kernels": ("twin-k3", "trained"),
    "a quarter of the images whole": ("twin-full25", "trained"),
    "three quarters of the images whole": ("twin-full75", "trained"),
}
RIVALS: Rows = {
    "trained with zeros": ("zero", "trained"),
    "trained with the mean": ("mean", "trained"),
    "twin (ours)": ("twin-prior", "trained"),
    "twin with a learned part (ours)": ("twin", "trained"),
}
RGB: Rows = {
    "plain timm, trained on RGB; absent channels are zero": ("expert-RGB", "zero"),
    "the same; absent channels are predicted (ours)": ("expert-RGB", "measured"),
    **RIVALS,
    "twin with a learned part, twice the budget (ours)": ("twin-2x", "trained"),
}
#: What the picture shows: questions by the number of channels left, and its lines.
LEFT = {1: "one", 3: "3 left", 4: "4 left", 8: "8 left", 10: "10 left", 12: "all but one",
        13: "all"}  # fmt: skip
LINES: Rows = {
    "twin (ours)": ("twin-prior", "trained"),
    "plain timm, trained with the mean": ("tiled-mean", "trained"),
    "plain timm, trained with zeros": ("tiled-zero", "trained"),
}
README: Rows = {
    label: row
    for label, row in {**UNTRAINED_13, **TRAINED_13}.items()
    if row[0] in ("tiled-zero", "tiled-mean", "tiled-measured", "twin-prior", "twin")
    or row == ("tiled", "zero")
}
#: The networks of Task II.
NETWORKS = ("resnet34", "rrdb_small", "rrdb_rnn_small")
#: As printed in Chia-Ming Lee, Deep Learning Assignment II; units as there.
PRINTED = {
    "report: DWG DenseNet-121": (32.84, 14.13, 174.19, 2.65, 65.78, 69.79, 65.78, 65.47),
    "report: the same, shuffling": (32.84, 14.13, 174.19, 2.65, 76.00, 76.61, 76.00, 75.20),
}
PRINTED_TASK2 = {
    "report: ResNet34 from scratch": (90.16, 3.66, 59.81, 3.41, 26.67, 11.81, 26.67, 15.83),
    "report: RRDB": (0.17, 0.20, 20.07, 0.19, 35.11, 44.25, 35.11, 34.35),
    "report: RRDB-RNN": (0.30, 0.42, 20.07, 0.39, 42.67, 46.73, 42.67, 41.33),
}


def read(name: str) -> list[Row]:
    """The rows of `NAME-CONDITIONS.csv`."""
    rows: list[Row] = []
    for file in sorted(RESULTS.glob(f"{name}-*.csv")):
        with file.open(newline="") as lines:
            rows += csv.DictReader(lines)
    return rows


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of anything that has a text."""
    lines = [header, ["---"] * len(header), *(map(str, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(row: Row | None) -> str:
    """Accuracy with its interval, and the deviation between seeds where there are several."""
    if row is None:
        return ""
    value, low, high = (100 * float(row[key]) for key in ("accuracy", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})" + spread(row, "sd_seeds")


def short(row: Row | None) -> str:
    """Accuracy without its interval."""
    return f"{100 * float(row['accuracy']):.1f}{spread(row, 'sd_seeds')}" if row else ""


def points(row: Row | None) -> str:
    """A paired difference with its interval, and its deviation between seeds."""
    if row is None or not row["difference"]:
        return ""
    value, low, high = (100 * float(row[f"difference{key}"]) for key in ("", "_low", "_high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})" + spread(row, "sd_difference")


def spread(row: Row, key: str) -> str:
    """The deviation between seeds, if there are several."""
    return f" ± {100 * float(row[key]):.1f}" if row.get(key) else ""


class Results:
    """The rows of a benchmark.

    Args:
        name: Of the benchmark.
    """

    def __init__(self, name: str) -> None:
        self.rows = read(name)

    def get(self, arm: str, way: str, question: str, reference: str | None = None) -> Row | None:
        """The row of most seeds, then most folds; or None."""
        found = [
            row for row in self.rows
            if (row["arm"], row["way"], row["question"]) == (arm, way, question)
            and (reference is None or (row["reference"] == reference and row["difference"]))
        ]  # fmt: skip
        return max(found, key=lambda row: (row["seed"].count("+"), row["folds"]), default=None)


def accuracies(
    name: str,
    rows: Rows,
    questions: Sequence[str],
    show: Callable[[Row | None], str] = percent,
) -> str:
    """Accuracy of arms on questions, in per cent.

    Args:
        name: The benchmark.
        rows: Which, by what they are called; those that were not run are left out.
        questions: The columns.
        show: How an accuracy is written.
    """
    found, lines, used = Results(name), [], []
    for label, (arm, way) in rows.items():
        cells = [found.get(arm, way, question) for question in questions]
        if any(cells):
            used += [cell for cell in cells if cell]
            lines.append([label, seeds_of(cells), *map(show, cells)])
    return table(("", "seeds", *questions), lines) + conditions(used)


def differences(name: str, rows: Rows, questions: Sequence[str], first: tuple[str, str]) -> str:
    """The first arm minus others, in points, paired by image."""
    found, lines, used = Results(name), [], []
    for label, (arm, way) in rows.items():
        names = (arm, f"{arm}|{way}")
        cells = [
            next((row for ref in names if (row := found.get(*first, q, ref))), None)
            for q in questions
        ]
        if (arm, way) != first and any(cells):
            used += [cell for cell in cells if cell]
            lines.append([label, seeds_of(cells), *map(points, cells)])
    return table(("minus", "seeds", *questions), lines) + conditions(used)


def gain(name: str, questions: Sequence[str], first: str, rivals: Mapping[str, str]) -> str:
    """An arm beside others that were trained alike, a row for each question.

    Args:
        name: The benchmark.
        questions: The rows.
        first: The arm.
        rivals: The others, by what they are called.
    """
    found, lines = Results(name), []
    cells = {
        (question, label): row
        for question in questions
        for label, arm in rivals.items()
        if (row := found.get(first, "trained", question, arm))
    }
    labels = [label for label in rivals if any(key[1] == label for key in cells)]
    for question in questions:
        rows = [cells[question, label] for label in labels]
        theirs = [f"{100 * float(row['reference_accuracy']):.1f}" for row in rows]
        lines.append([question, *theirs, *map(short, rows[:1]), *map(points, rows)])
    header = ["accuracy (%) on", *labels, "twin"]
    for label in labels:
        header.append(f"gain over {label} (seeds: {seeds_of([cells[questions[0], label]])})")
    return table(header, lines) + conditions([*cells.values()])


def seeds_of(cells: Sequence[Row | None]) -> int:
    """How many seeds a row of a table has."""
    return max(cell["seed"].count("+") + 1 for cell in cells if cell)


def conditions(rows: Sequence[Row]) -> str:
    """What the rows of a table were measured on, from the rows themselves."""

    def values(key: str) -> str:
        found = {row[key] for row in rows if row.get(key)}
        if key == "commit":
            found = {commit for commits in found for commit in commits.split("+")}
        return ", ".join(sorted(found, key=lambda value: (len(value), value)))

    parts = {"Test images": values("images"), "training images": values("train_images"),
             "epochs": values("epochs"), "folds": values("folds"),
             "seeds": values("seed"), "trained by commit": values("commit")}  # fmt: skip
    return "\n" + "; ".join(f"{key}: {value}" for key, value in parts.items() if value) + ".\n"


def macro(row: Row) -> list[str]:
    """Precision, recall and f1, macro means in per cent."""
    return [f"{100 * float(row[k]):.1f}" if row[k] else "" for k in ("precision", "recall", "f1")]


def beside(
    name: str, columns: Mapping[str, tuple[str, str, str]], printed: Mapping[str, Sequence[float]]
) -> str:
    """Ours on RGB and the reference report's figures; cost at its size, 224 px.

    Args:
        name: The benchmark.
        columns: By label: arm, way and the model whose cost it has.
        printed: The report's.
    """
    found = Results(name)
    costs = {row["model"]: row for row in read("complexity") if row["channels"] == "3"}
    ours: dict[str, list[str]] = {}
    for label, (arm, way, model) in columns.items():
        row, cost = found.get(arm, way, "RGB"), costs.get(model)
        if row is None or cost is None:
            continue
        macs = float(cost["macs"]) / 1e9
        ours[label] = [
            f"{float(cost['params']) / 1e6:.2f}", f"{macs:.2f}",
            f"{float(cost['forward_backward_mb']):.2f}", f"{2 * macs:.2f}", percent(row),
            *macro(row),
        ]  # fmt: skip
    theirs = {key: [f"{value:.2f}" for value in values] for key, values in printed.items()}
    quantities = (
        "parameters (M)", "multi-adds (G)", "forward/backward (MB)", "FLOPs (G)", "accuracy (%)",
        "precision (%)", "recall (%)", "f1 (%)",
    )  # fmt: skip
    cells = {**ours, **theirs}
    return table(("", *cells), zip(quantities, *cells.values(), strict=True))


def task2_table(name: str) -> str:
    """Networks on RGB, and the share of ResNet34's accuracy that they reach."""
    found, lines, used = Results(name), [], []
    costs = {row["model"]: row for row in read("complexity") if row["channels"] == "3"}
    for arm in NETWORKS:
        row, gap = (found.get(arm, "trained", "RGB", ref) for ref in (None, "resnet34"))
        if row is None:
            continue
        used.append(row)
        share = ""
        if gap is not None:
            bar = float(gap["reference_accuracy"])
            value, low, high = (
                100 * (1 + float(gap[f"difference{end}"]) / bar) for end in ("", "_low", "_high")
            )
            share = f"{value:.0f} % ({low:.0f} to {high:.0f})"
        cost = costs[arm]
        lines.append([
            arm, f"{float(cost['params']) / 1e6:.2f}", f"{float(cost['macs']) / 1e9:.2f}",
            row["seed"].replace("+", ", "), percent(row), points(gap), share,
        ])  # fmt: skip
    header = ("network", "parameters (M)", "multi-adds at 224 px (G)", "seed", "accuracy",
              "minus ResNet34", "share of ResNet34's accuracy")  # fmt: skip
    return table(header, lines) + conditions(used)


def plain_table(name: str, columns: Mapping[str, Callable[[Row], str]]) -> str:
    """A row for each row of a file; of several numbers of channels only 13 is shown."""
    rows = [row for row in read(name) if row.get("channels", "13") == "13"]
    return table(tuple(columns), [[make(row) for make in columns.values()] for row in rows])


def number(key: str, digits: int = 0, scale: float = 1) -> Callable[[Row], str]:
    """A column as a number."""
    return lambda row: f"{float(row[key]) / scale:,.{digits}f}" if row[key] else ""


def text(key: str) -> Callable[[Row], str]:
    """A column as it is."""
    return lambda row: row[key]


def ratio(key: str) -> Callable[[Row], str]:
    """A ratio with its interval."""

    def show(row: Row) -> str:
        if not row[key]:
            return ""
        value, low, high = (float(row[key + end]) for end in ("", "_low", "_high"))
        return f"{value:.3f} ({low:.3f} to {high:.3f})"

    return show


#: The tables by name: how they are made, of which results, and what else that needs.
TABLES: dict[str, tuple[Any, ...]] = {
    "readme": (accuracies, "eurosat", README, ("all", *MANY[2:]), short),
    "gain": (
        gain, "eurosat", MANY, "twin-prior", {"zeros": "tiled-zero", "the mean": "tiled-mean"}
    ),
    "thirteen": (accuracies, "eurosat", {**UNTRAINED_13, **TRAINED_13}, MANY, short),
    "thirteen-minus": (
        differences, "eurosat",
        {key: row for key, row in {**UNTRAINED_13, **TRAINED_13}.items()
         if row[0] not in ("tiled-zero", "tiled-mean")},  # these stand in `gain`
        MANY, ("twin-prior", "trained"),
    ),
    "learned": (
        differences, "eurosat", {"twin": ("twin-prior", "trained")}, MANY, ("twin", "trained")
    ),
    "thirteen-untrained": (
        differences, "eurosat", {"zeros": ("tiled", "zero")}, MANY, ("tiled", "measured")
    ),
    "thirteen-more": (accuracies, "eurosat", MORE_13, MANY, short),
    "transfer": (
        accuracies, "transfer",
        {
            "zeros": ("lite0", "zero"), "mean of the others": ("lite0", "mean"),
            "predicted from wavelengths (ours)": ("lite0", "spectral"),
            "predicted, correlation measured (ours)": ("lite0", "measured"),
            "zeros, BatchNorm estimated anew": ("lite0", "zero, estimated"),
            "predicted, BatchNorm estimated anew": ("lite0", "measured, estimated"),
        },
        FEW,
    ),
    "finetune": (accuracies, "finetune", RGB, FEW),
    "finetune-minus": (
        differences, "finetune", {**RIVALS, "the expert of each set": ("expert-{set}", "trained")},
        FEW, ("twin", "trained"),
    ),
    "scratch": (
        accuracies, "scratch",
        {**RIVALS, "DOFA's mechanism": ("dofa", "trained"),
         "ChannelViT's mechanism": ("channel-vit", "trained"),
         "a plain transformer behind our stem": ("vit-twin", "trained")},
        MANY, short,
    ),
    "stains": (
        accuracies, "stains",
        {"plain timm, trained on all; absent ones are zero":
             ("expert-brightfield+DNA+darkfield", "zero"), **RIVALS},
        ("brightfield+DNA+darkfield", *FEW[1:]),
    ),
    "flagship": (
        beside, "flagship",
        {
            "plain timm": ("plain", "trained", "densenet121"),
            "twin, never shuffled": ("none", "trained", "dwg_densenet121"),
            "the same, not told the channels, in any order":
                ("none", "anonymous", "dwg_densenet121"),
            "twin, trained shuffled, in any order": ("shuffle", "anonymous", "dwg_densenet121"),
        },
        PRINTED,
    ),
    "task2": (task2_table, "task2"),
    "task2-beside-report": (
        beside, "task2", {name: (name, "trained", name) for name in NETWORKS}, PRINTED_TASK2
    ),
    "complexity": (
        plain_table, "complexity",
        {
            "model": text("model"), "C": text("channels"),
            "parameters (M)": number("params", 3, 1e6), "multi-adds (G)": number("macs", 3, 1e9),
            "forward/backward (MB)": number("forward_backward_mb", 2),
            "M multi-adds a further channel": number("macs_per_added_channel", 2, 1e6),
        },
    ),
    "peers_cost": (
        plain_table, "peers_cost",
        {
            "model": text("model"), "C": text("channels"), "parameters": number("params"),
            "M multi-adds": number("macs", 1, 1e6), "time / twin": ratio("to_twin"),
        },
    ),
    "latency": (
        plain_table, "latency",
        {
            "model": text("model"), "batch": text("batch"), "C": text("channels"),
            "twin (ms)": number("twin_ms", 1), "timm (ms)": number("timm_ms", 1),
            "ratio to timm": ratio("to_timm"), "ratio to the folded model": ratio("to_folded"),
        },
    ),
    "throughput": (
        plain_table, "throughput",
        {
            "loop": text("loop"), "images/s": number("images_per_second", 1),
            "of the plain loop": ratio("of_plain"),
        },
    ),
    "loading": (
        plain_table, "loading",
        {
            "13 x 64 x 64, 16 bits": text("format"), "plain reader (images/s)": number("plain"),
            "ours (images/s)": number("ours"), "of the plain reader": ratio("of_plain"),
            "of torchvision's augmentation": ratio("of_torchvision"),
        },
    ),
}  # fmt: skip


def made(name: str) -> str:
    """A table, or the command that it waits for."""
    make, results, *needed = TABLES[name]
    if read(results):
        return make(results, *needed)
    script = f"cost.py {results}" if make is plain_table else f"run.py {results} --data DATA"
    return f"Not measured yet: `python bench/{script}`.\n"

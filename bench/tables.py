"""Tables in Markdown of the results, and putting them into documents.

A document holds a table between `<!-- table: NAME -->` and `<!-- /table -->`; `fill` replaces what
stands there, so that no figure is ever typed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from timm_varchan.cards import markdown_table
from timm_varchan.stems import MIXERS

_BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

#: How models meet the channels in the table of differences.
MODES = ("named", "anonymous", "mask")
#: Figures as printed in Chia-Ming Lee, Deep Learning Assignment II; their units are as there.
REPORT = {
    "DWG DenseNet-121": (32.84, 14.13, 174.19, 2.65, 65.78, 69.79, 65.78, 65.47),
    "the same, shuffling": (32.84, 14.13, 174.19, 2.65, 76.00, 76.61, 76.00, 75.20),
}
#: The same of Task II.
REPORT_TASK2 = {
    "ResNet34 from scratch": (90.16, 3.66, 59.81, 3.41, 26.67, 11.81, 26.67, 15.83),
    "RRDB": (0.17, 0.20, 20.07, 0.19, 35.11, 44.25, 35.11, 34.35),
    "RRDB-RNN": (0.30, 0.42, 20.07, 0.39, 42.67, 46.73, 42.67, 41.33),
}
#: The report's columns.
QUANTITIES = (
    "parameters (M)", "multi-adds (G)", "forward/backward (MB)", "FLOPs (G)", "accuracy (%)",
    "precision (%)", "recall (%)", "f1 (%)",
)  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of anything that has a text."""
    return markdown_table(header, [list(map(str, row)) for row in rows])


def beside(columns: Mapping[str, Sequence[str]], printed: Mapping[str, Sequence[float]]) -> str:
    """Our own figures of `QUANTITIES` and the report's, a column for each network."""
    theirs = {f"report: {name}": [f"{v:.2f}" for v in values] for name, values in printed.items()}
    everything = {**columns, **theirs}
    return table(("", *everything), zip(QUANTITIES, *everything.values(), strict=True))


def fill(text: str, tables: Mapping[str, str]) -> str:
    """Put the tables into a document; blocks of other names stay as they are."""

    def put(match: re.Match[str]) -> str:
        start, name, old, end = match.groups()
        return start + tables.get(name, old) + end

    return _BLOCK.sub(put, text)


def block_names(text: str) -> list[str]:
    """The tables that a document asks for."""
    return [match[2] for match in _BLOCK.finditer(text)]


def _percent(estimate: Mapping[str, float]) -> str:
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _points(paired: Mapping[str, float]) -> str:
    ends = f"{100 * paired['low']:+.1f} to {100 * paired['high']:+.1f}"
    return f"{100 * paired['difference']:+.1f} ({ends}), p {paired['p']:.2g}"


def _ratio(figures: Mapping[str, float] | None) -> str:
    if figures is None:
        return ""
    return f"{figures['median']:.3f} ({figures['low']:.3f} to {figures['high']:.3f})"


def complexity_table(result: Mapping[str, Any]) -> str:
    """Cost of plain models with `in_chans=C` and of twins, for each number of channels."""
    rows = [r for r in result["rows"] if ", stem " not in r["model"]]
    return table(
        ("model", "C", "parameters (M)", "multi-adds (G)", "forward/backward (MB)",
         "parameters (MB)", "first layer's share of multi-adds (%)",
         "M multi-adds a further channel"),
        [
            (r["model"], r["num_channels"], f"{r['params'] / 1e6:.3f}", f"{r['macs'] / 1e9:.3f}",
             f"{r['forward_backward_mb']:.2f}", f"{r['params_mb']:.2f}",
             f"{100 * r['stem_macs'] / r['macs']:.2f}", _growth(r, rows))
            for r in rows
        ],
    )  # fmt: skip


def _growth(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """M multi-adds for one more channel: counted, or between the rows of a model built anew."""
    if row["macs_per_added_channel"] is not None:
        return f"{row['macs_per_added_channel'] / 1e6:.2f}"
    own = sorted((r["num_channels"], r["macs"]) for r in rows if r["model"] == row["model"])
    if len(own) < 2:
        return ""
    (few, less), (many, more) = own[0], own[-1]
    return f"{(more - less) / (many - few) / 1e6:.2f}"


def stems_table(result: Mapping[str, Any]) -> str:
    """What each stem can and what it costs on RGB."""
    rows = []
    for row in result["rows"]:
        base, _, name = row["model"].partition(", stem ")
        if not name or row["num_channels"] != 3:
            continue
        mixer = MIXERS[name]
        can = [mixer.any_count, mixer.supports_anonymous, mixer.supports_unseen,
               mixer.content_dependent]  # fmt: skip
        plain = next(r for r in result["rows"] if (r["model"], r["num_channels"]) == (base, 3))
        rows.append((
            name, *("yes" if flag else "no" for flag in can),
            f"{row['params'] - plain['params']:,}", f"{(row['macs'] - plain['macs']) / 1e6:+.2f}",
        ))  # fmt: skip
    return table(
        ("stem", "any count", "anonymous channels", "unseen wavelengths", "depends on content",
         "parameters", "M multi-adds more than timm"), rows,
    )  # fmt: skip


def latency_table(result: Mapping[str, Any]) -> str:
    """Ratios of times, model to baseline, for each batch size and number of channels."""
    rows = []
    for benchmark in result["benchmarks"]:
        row = benchmark["extra_info"]
        own = row["model"]
        rows.append((
            row["batch_size"], row["num_channels"], f"{row['ms'][own]['median']:.1f}",
            f"{row['ms']['timm']['median']:.1f}", _ratio(row["ratios"]["timm"]),
            _ratio(row["ratios"].get("folded")), f"{row['peak_mib'][own]:.0f}",
            f"{row['peak_mib']['timm']:.0f}",
        ))  # fmt: skip
    rows += [(r["batch_size"], r["num_channels"], r["reason"], *[""] * 5)
             for r in result["empty_rows"]]  # fmt: skip
    return table(
        ("batch", "C", "twin (ms)", "timm (ms)", "ratio to timm", "ratio to the folded model",
         "twin, peak (MiB)", "timm, peak (MiB)"), rows,
    )  # fmt: skip


def accuracy_table(result: Mapping[str, Any]) -> str:
    """Accuracy on every channel set, a column for each model as it is told or masked."""
    columns: dict[str, dict[str, str]] = {}
    names: dict[str, None] = {}
    for model in result["models"]:
        for row in model["sets"]:
            if row["order"] == "shuffled" and row["mode"] == "named":
                continue
            key = f"{model['name']}, {row['mode']}" + ", shuffled" * (row["order"] == "shuffled")
            columns.setdefault(key, {})[row["channels"]] = _percent(row["accuracy"])
            names[row["channels"]] = None
    return table(
        ("channels", *columns),
        [(name, *(column.get(name, "") for column in columns.values())) for name in names],
    )


def series_table(result: Mapping[str, Any]) -> str:
    """All channels, the uniform mean over sizes, and the worst set."""
    return table(
        ("model", "mode", "order", "all channels", "uniform mean", "worst set"),
        [
            (model["name"], row["mode"], row["order"], f"{100 * row['full']:.1f}",
             f"{100 * row['uniform_mean']:.1f}", f"{100 * row['worst']:.1f} ({row['worst_set']})")
            for model in result["models"] for row in model["series"]
        ],
    )  # fmt: skip


def gaps_table(result: Mapping[str, Any]) -> str:
    """Differences on the same images, planes in order: to experts, and without one channel."""
    kinds = {
        "experts": lambda row: f"{row['channels']} minus its expert",
        "leave_one_out": lambda row: f"without {row['left_out']} minus with all",
    }
    rows = [
        (model["name"], row["mode"], name(row), _points(row["paired"]))
        for kind, name in kinds.items() for model in result["models"] for row in model[kind]
        if row["order"] == "in order" and row["mode"] in MODES
    ]  # fmt: skip
    return table(("model", "mode", "comparison", "points"), rows)


def _grouped(
    rows: Iterable[Mapping[str, Any]], keys: Sequence[str]
) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """Rows by the values of some of their fields."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def pairs_table(result: Mapping[str, Any]) -> str:
    """Every two models on the same images, planes in order: on how many sets which is ahead."""
    rows = []
    pairs = [row for row in result["pairs"] if row["order"] == "in order"]
    for (a, mode_a, b, mode_b), group in _grouped(pairs, ("a", "mode_a", "b", "mode_b")).items():
        paired = sorted((row["paired"] for row in group), key=lambda p: p["difference"])
        mean = sum(p["difference"] for p in paired) / len(paired)
        rows.append((
            f"{a}, {mode_a}", f"{b}, {mode_b}", len(group), sum(p["low"] > 0 for p in paired),
            sum(p["high"] < 0 for p in paired), f"{100 * mean:+.1f}", _points(paired[-1]),
            _points(paired[0]),
        ))  # fmt: skip
    return table(
        ("a", "b", "sets", "a ahead", "b ahead", "a minus b, mean (points)", "most", "least"), rows
    )


def flips_table(result: Mapping[str, Any]) -> str:
    """How often answers change without any reason in the image, sets of several channels."""
    rows = []
    for model in result["models"]:
        size = {row["channels"]: row["size"] for row in model["sets"]}
        several = [row for row in model["flips"] if size[row["channels"]] > 1]
        for (mode, change), group in _grouped(several, ("mode", "change")).items():
            mean = sum(row["rate"]["value"] for row in group) / len(group)
            worst = max(group, key=lambda row: row["rate"]["value"])
            rows.append((model["name"], mode, change, len(group), f"{100 * mean:.1f}",
                         f"{_percent(worst['rate'])}, {worst['channels']}"))  # fmt: skip
    return table(
        (
            "model",
            "mode",
            "change",
            "sets",
            "answers that change, mean (%)",
            "on the worst set (%)",
        ),
        rows,
    )


def loading_table(result: Mapping[str, Any]) -> str:
    """Images a second that are read, and of the plainest reader of the same bytes."""
    rows = []
    for row in result["rows"]:
        speeds = row["images_per_second"]
        rows.append((
            row["format"], *(f"{speeds[kind]['median']:,.0f}" for kind in ("plain", "ours")),
            _ratio(row["of_plain"]), f"{speeds['augmented']['median']:,.0f}",
            _ratio(row["of_torchvision"]),
        ))  # fmt: skip
    return table(
        ("13 x 64 x 64, 16 bits", "plain reader (images/s)", "ours (images/s)",
         "of the plain reader", "ours with augmentation (images/s)",
         "of torchvision's augmentation"), rows,
    )  # fmt: skip


def throughput_table(result: Mapping[str, Any]) -> str:
    """Images a second of the training loops, and of the plainest one."""
    return table(
        ("loop", "images/s", "of the plain loop"),
        [(name, f"{row['images_per_second']['median']:.1f}", _ratio(row["of_plain"]))
         for name, row in result["loops"].items()],
    )  # fmt: skip


#: The tables by name, and the result that each is made of.
TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "complexity": ("complexity", complexity_table),
    "stems": ("complexity", stems_table),
    "latency": ("latency", latency_table),
    "accuracy": ("accuracy", accuracy_table),
    "series": ("accuracy", series_table),
    "gaps": ("accuracy", gaps_table),
    "pairs": ("accuracy", pairs_table),
    "flips": ("accuracy", flips_table),
    "loading": ("loading", loading_table),
    "throughput": ("throughput", throughput_table),
}

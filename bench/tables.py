"""Every table of the results, made of the CSV files in `results/` alone: `TABLES`, by name."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from timm_varchan.cards import markdown_table

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, str]

#: Questions of the benchmarks on RGB: all, the means over pairs, single channels, everything.
FEW = ("RGB", "all but one", "one", "every set")
MANY = ("all", "all but one", "RGB+NIR", "RGB", "one", "random")
CONTRASTS = ("brightfield+DNA+darkfield", *FEW[1:])
EXPERTS = "expert-{set}"
#: What the picture and README's table show of a benchmark: title, questions, arm and way by label.
SERIES: dict[str, tuple[str, Sequence[str], dict[str, tuple[str, str]]]] = {
    "transfer": (
        "ImageNet weights, nothing trained",
        FEW[:3],
        {
            "plain timm, zeros": ("lite0", "zero"),
            "mean of the others": ("lite0", "mean"),
            "predicted from wavelengths (ours)": ("lite0", "spectral"),
            "predicted, correlation measured (ours)": ("lite0", "measured"),
        },
    ),
    "finetune": (
        "ImageNet weights, fine-tuned",
        FEW[:3],
        {
            "plain timm, zeros": ("expert-RGB", "zero"),
            "trained with zeros": ("zero-fill", "trained"),
            "trained with the mean of the others": ("mean-fill", "trained"),
            "twin (ours), the same budget": ("twin-1x", "trained"),
            "twin (ours), three times the budget": ("twin-3x", "trained"),
        },
    ),
    "eurosat": (
        "13 bands of Sentinel-2, from ImageNet weights",
        MANY[:5],
        {
            "plain timm, zeros": ("lite-tiled", "zero"),
            "plain timm, mean of the others": ("lite-tiled", "mean"),
            "plain timm, predicted (ours), nothing trained": ("lite-tiled", "measured"),
            "twin (ours)": ("lite-k13", "trained"),
        },
    ),
}
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
    """The rows of `NAME-CONDITIONS.csv`, those of versions measured before first."""
    files = sorted(RESULTS.glob(f"*/{name}-*.csv")) + sorted(RESULTS.glob(f"{name}-*.csv"))
    rows: list[Row] = []
    for file in files:
        with file.open(newline="") as lines:
            rows += csv.DictReader(lines)
    return rows


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table of anything that has a text."""
    return markdown_table(header, [list(map(str, row)) for row in rows])


def percent(row: Row | None) -> str:
    """Accuracy with its interval, and the deviation between seeds where there are several."""
    if row is None:
        return ""
    value, low, high = (100 * float(row[key] or "nan") for key in ("accuracy", "low", "high"))
    text = f"{value:.1f}" + (f" ({low:.1f} to {high:.1f})" if row["low"] else "")
    return text + (f" ± {100 * float(row['sd_seeds']):.1f}" if row["sd_seeds"] else "")


def points(row: Row | None) -> str:
    """A paired difference with its interval."""
    if row is None or not row["difference"]:
        return ""
    value, low, high = (100 * float(row[f"difference{key}"]) for key in ("", "_low", "_high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


class Results:
    """The rows of a benchmark by arm, way and seed; of several seeds the row that means them all.

    Args:
        rows: As `run.py` writes them.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.cells: dict[tuple[str, str, str, str, str], Row] = {}
        for row in rows:
            for reference in (row["reference"], ""):
                key = (row["arm"], row["way"], row["seed"], row["question"], reference)
                self.cells.setdefault(key, row)

    def ways(self) -> list[tuple[str, str, str]]:
        """Arms, ways and seeds, in the order of the file."""
        seeds: dict[tuple[str, str], dict[str, None]] = {}
        for row in self.rows:
            seeds.setdefault((row["arm"], row["way"]), {})[row["seed"]] = None
        found = []
        for (arm, way), of in seeds.items():
            together = max(of, key=len)
            found += [(arm, way, seed) for seed in ([together] if "+" in together else of)]
        return found

    def get(
        self, arm: str, way: str, question: str, reference: str = "", seed: str | None = None
    ) -> Row | None:
        """The row of a question, of the first seeds where none are named; or None."""
        if seed is None:
            seed = next((s for a, w, s in self.ways() if (a, w) == (arm, way)), "")
        return self.cells.get((arm, way, seed, question, reference))

    def experts(self, question: str) -> Row | None:
        """What each set's own expert comes to, from a row that was compared with all of them."""
        for row in self.rows:
            known = row["question"] == question and row["reference"] == EXPERTS
            if known and row["reference_accuracy"]:
                return {"accuracy": row["reference_accuracy"], "low": "", "high": "",
                        "sd_seeds": ""}  # fmt: skip
        return None


def comparison(
    name: str,
    questions: Sequence[str],
    minus: Mapping[str, tuple[str, str]],
    ways: Callable[[str, str], bool] = lambda arm, way: True,
) -> str:
    """Accuracy of arms on questions, and paired differences.

    Args:
        name: The benchmark.
        questions: The columns, in per cent.
        minus: Columns of differences in points: reference and question by title.
        ways: Which arms and ways have a row.
    """
    found = Results(read(name))
    rows = []
    if any(found.experts(question) for question in questions):
        cells = [percent(found.experts(question)) for question in questions]
        rows.append(["an expert for each set", "", "", "", "", *cells, *[""] * len(minus)])
    for arm, way, seed in found.ways():
        of = [found.get(arm, way, question, seed=seed) for question in questions]
        about = next((row for row in of if row is not None), None)
        if about is None or not ways(arm, way):
            continue
        gaps = [points(found.get(arm, way, q, ref, seed)) for ref, q in minus.values()]
        rows.append([arm, way, seed, about["epochs"], about["images"], *map(percent, of), *gaps])
    header = ("arm", "tested", "seeds", "epochs", "images", *questions, *minus)
    return table(header, rows) + conditions(found.rows)


def conditions(rows: Sequence[Row]) -> str:
    """What the rows of a table were measured on, from the rows themselves."""

    def values(key: str) -> str:
        found = {row[key] for row in rows if row.get(key)}
        return ", ".join(sorted(found, key=lambda value: (len(value), value)))

    parts = {"test images": values("images"), "training images": values("train_images"),
             "folds": values("folds"), "timm_varchan": values("version")}  # fmt: skip
    return "\n" + "; ".join(f"{key}: {value}" for key, value in parts.items() if value) + ".\n"


def macro(row: Row) -> list[str]:
    """Precision, recall and f1, macro means in per cent."""
    return [f"{100 * float(row[k]):.1f}" if row[k] else "" for k in ("precision", "recall", "f1")]


def beside(
    name: str, columns: Mapping[str, tuple[str, str]], printed: Mapping[str, Sequence[float]]
) -> str:
    """Ours on RGB and the reference report's figures; cost at its size, 224 px.

    Args:
        name: The benchmark.
        columns: Arm and way by the model whose cost it has.
        printed: The report's.
    """
    found = Results(read(name))
    costs = {row["model"]: row for row in read("complexity") if row["channels"] == "3"}
    ours: dict[str, list[str]] = {}
    for (arm, way), model in ((pair, model) for model, pair in columns.items()):
        row, cost = found.get(arm, way, "RGB"), costs.get(model.split()[0])
        if row is None or cost is None:
            continue
        macs = float(cost["macs"]) / 1e9
        ours[f"{arm} ({way})"] = [
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


def task2_table(name: str, reference: str) -> str:
    """Networks on RGB, with cost at the size of the images."""
    found = Results(read(name))
    rows = []
    for arm, way, seed in found.ways():
        row = found.get(arm, way, "RGB", seed=seed)
        if row is None or way != "trained":
            continue
        gap = found.get(arm, way, "RGB", reference, seed)
        rows.append([
            arm, f"{float(row['params']) / 1e6:.2f}", f"{float(row['macs']) / 1e6:.1f}",
            f"{float(row['forward_backward_mb']):.2f}", row["seed"], percent(row),
            *macro(row),
            points(gap), f"{float(gap['p']):.2g}" if gap and gap["p"] else "",
            row.get("time_ratio", ""),
        ])  # fmt: skip
    header = ("network", "params (M)", "multi-adds (M)", "fwd/bwd size (MB)", "seeds", "accuracy",
              "precision", "recall", "f1", f"minus {reference} (points)", "p",
              f"time / {reference}, batches of 1, 32")  # fmt: skip
    return table(header, rows) + conditions(found.rows)


def sets_table(name: str, arms: Sequence[str]) -> str:
    """Every channel set, a column for each arm."""
    found = Results(read(name))
    single = [row["question"] for row in found.rows if row["question"] not in FEW[1:]]
    names = dict.fromkeys(single)
    return table(
        ("channels", *arms),
        [(one, *(percent(found.get(arm, "trained", one)) for arm in arms)) for one in names],
    )


def versus_table(name: str, arm: str) -> str:
    """How far every other arm is from one, told the channels, on the same images."""
    found = Results(read(name))
    rows = [
        (other, way, seed, *cells)
        for other, way, seed in found.ways()
        if any(cells := [points(found.get(other, way, q, arm, seed)) for q in FEW])
    ]
    return table((f"minus {arm}", "tested", "seeds", *FEW), rows)


def readme_table() -> str:
    """What is left with all channels, without one, and with one alone, by benchmark."""
    rows = []
    for name, (title, questions, series) in SERIES.items():
        found = Results(read(name))
        for label, (arm, way) in series.items():
            of = [found.get(arm, way, q) for q in (questions[0], "all but one", "one")]
            if any(row is not None for row in of):
                rows.append((title, label, *map(percent, of)))
    header = ("", "missing channels are", "all channels", "one missing", "one left")
    return table(header, rows)


def plain_table(name: str, columns: Mapping[str, Callable[[Row], str]]) -> str:
    """A row for each row of a file."""
    return table(tuple(columns), [[make(row) for make in columns.values()] for row in read(name)])


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


#: The tables by name: which results they need, and how they are made.
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "readme": (" ".join(SERIES), readme_table),
    "transfer": (
        "transfer",
        partial(
            comparison, "transfer", FEW, {"minus zeros: one": ("lite0|zero", "one")}
        ),
    ),
    "finetune": (
        "finetune",
        partial(
            comparison, "finetune", FEW,
            {
                "minus experts: RGB": (EXPERTS, "RGB"),
                "minus experts: every set": (EXPERTS, "every set"),
            },
        ),
    ),
    "eurosat": (
        "eurosat",
        partial(
            comparison, "eurosat", MANY,
            {
                "minus plain, zeros: random": ("plain|zero", "random"),
                "minus tiled Lite0, zeros: random": ("lite-tiled|zero", "random"),
            },
        ),
    ),
    "peers": (
        "peers",
        partial(
            comparison, "peers", MANY,
            {
                "minus k13: all": ("k13", "all"), "minus k13: random": ("k13", "random"),
                "minus vit-k13: random": ("vit-k13", "random"),
            },
        ),
    ),
    "peers_cost": (
        "peers_cost",
        partial(
            plain_table, "peers_cost",
            {
                "model": text("model"), "C": text("channels"), "parameters": number("params"),
                "M multi-adds": number("macs", 1, 1e6), "ms a batch": number("ms", 1),
                "time / k13": ratio("to_k13"),
            },
        ),
    ),
    "stains": (
        "stains",
        partial(
            comparison, "stains", CONTRASTS,
            {
                "minus experts: all": (EXPERTS, CONTRASTS[0]),
                "minus experts: every set": (EXPERTS, "every set"),
            },
        ),
    ),
    "flagship": (
        "flagship",
        partial(
            comparison, "flagship", FEW,
            {
                "minus expert-RGB: RGB": ("expert-RGB", "RGB"),
                "minus expert-RGB, zeros: one": ("expert-RGB|zero", "one"),
                "shuffle minus none, anonymous: RGB": ("none|anonymous", "RGB"),
            },
        ),
    ),
    "flagship60": (
        "flagship60",
        partial(
            comparison, "flagship60", FEW,
            {
                "minus expert-RGB: RGB": ("expert-RGB", "RGB"),
                "shuffle minus none, anonymous: RGB": ("none|anonymous", "RGB"),
            },
        ),
    ),
    "flagship-beside-report": (
        "flagship",
        partial(
            beside, "flagship",
            {
                "densenet121": ("expert-RGB", "trained"),
                "dwg_densenet121": ("none", "trained"),
                "dwg_densenet121 shuffled": ("shuffle", "anonymous"),
                "dwg_densenet121 sampled": ("hcs-sample", "trained"),
            },
            PRINTED,
        ),
    ),
    "task1": (
        "task1",
        partial(
            comparison, "task1", FEW,
            {"minus experts: RGB": (EXPERTS, "RGB"), "minus experts: one": (EXPERTS, "one")},
            lambda arm, way: not way.endswith("estimated"),
        ),
    ),
    "task1-versus": ("task1", partial(versus_table, "task1", "hcs-sample")),
    "batchnorm": (
        "task1",
        partial(
            comparison, "task1", ("RGB", "RG", "RB", "GB", "R", "G", "B"),
            {"minus experts: RGB": (EXPERTS, "RGB"), "minus experts: one": (EXPERTS, "one")},
            lambda arm, way: arm in ("none", "shuffle", "hcs-sample", "hcs"),
        ),
    ),
    "task2": ("task2", partial(task2_table, "task2", "resnet34")),
    "task2-sets": ("task2", partial(sets_table, "task2", ("dwg_rrdb_rnn_small",))),
    "task2-beside-report": (
        "task2",
        partial(
            beside, "task2",
            {name: (name, "trained") for name in ("resnet34", "rrdb_small", "rrdb_rnn_small")},
            PRINTED_TASK2,
        ),
    ),
    "task2_short": ("task2_short", partial(task2_table, "task2_short", "rrdb_rnn_small")),
    "complexity": (
        "complexity",
        partial(
            plain_table, "complexity",
            {
                "model": text("model"), "C": text("channels"),
                "parameters (M)": number("params", 3, 1e6),
                "multi-adds (G)": number("macs", 3, 1e9),
                "forward/backward (MB)": number("forward_backward_mb", 2),
                "M multi-adds a further channel": number("macs_per_added_channel", 2, 1e6),
            },
        ),
    ),
    "stems": (
        "stems",
        partial(
            plain_table, "stems",
            {
                "stem": text("stem"), "any count": text("any_count"),
                "anonymous channels": text("anonymous"), "unseen wavelengths": text("unseen"),
                "depends on content": text("content"), "parameters": number("params"),
                "M multi-adds more than timm": number("macs", 2, 1e6),
            },
        ),
    ),
    "latency": (
        "latency",
        partial(
            plain_table, "latency",
            {
                "batch": text("batch"), "C": text("channels"), "twin (ms)": number("twin_ms", 1),
                "timm (ms)": number("timm_ms", 1), "ratio to timm": ratio("to_timm"),
                "ratio to the folded model": ratio("to_folded"),
                "twin, peak (MiB)": number("twin_mib"), "timm, peak (MiB)": number("timm_mib"),
            },
        ),
    ),
    "throughput": (
        "throughput",
        partial(
            plain_table, "throughput",
            {
                "loop": text("loop"), "images/s": number("images_per_second", 1),
                "of the plain loop": ratio("of_plain"),
            },
        ),
    ),
    "channels": (
        "channels",
        partial(
            plain_table, "channels",
            {
                "channels": text("channels"), "batch": text("batch"), "px": text("img_size"),
                "step of": text("model"), "choosing (ms)": number("channels_ms", 1),
                "step (ms)": number("step_ms"), "share of the step": ratio("of_step"),
            },
        ),
    ),
    "loading": (
        "loading",
        partial(
            plain_table, "loading",
            {
                "13 x 64 x 64, 16 bits": text("format"), "plain reader (images/s)": number("plain"),
                "ours (images/s)": number("ours"), "of the plain reader": ratio("of_plain"),
                "ours with augmentation (images/s)": number("augmented"),
                "of torchvision's augmentation": ratio("of_torchvision"),
            },
        ),
    ),
}  # fmt: skip
COST = ("complexity", "stems", "peers_cost", "latency", "throughput", "channels", "loading")


def made(name: str) -> str:
    """A table, or the command that it waits for."""
    results, make = TABLES[name]
    if any(read(one) for one in results.split()):
        return make()
    results = results.split()[0]
    script = f"cost.py {results}" if results in COST else f"run.py {results} --data DATA"
    return f"Not measured yet: `python bench/{script}`.\n"

"""Every document of the results, made of the CSV files in `results/` alone.

    python bench/report.py

Tables go into `bench/REPORT.md` and wherever README.md and docs/ ask for one, between
`<!-- table: NAME -->` and `<!-- /table -->`; then the pictures, and the model cards of
`dwg_densenet121` and the networks of Task II. No figure is typed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tables
import timm
from arms import BENCHMARKS
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from timm_varchan import RGB
from timm_varchan.cards import Card, usage

BENCH = Path(__file__).parent
ROOT = BENCH.parent
REPORT = BENCH / "REPORT.md"
CARDS_FOLDER = ROOT / "model_cards"
PICTURE = ROOT / "docs" / "channels_left.png"
DOCUMENTS = (REPORT, ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

NORMALISED = f"R, G, B: values / 255, mean {RGB.mean}, standard deviation {RGB.std}"
ASSIGNMENT = """@misc{chia2024assignment,
  author = {Chia-Ming Lee},
  title = {Deep Learning Assignment II},
  note = {National Cheng Kung University, github.com/ming0531/DL-Assignment-2}
}"""
ESRGAN = """@misc{wang2018esrgan,
  author = {Xintao Wang and others},
  title = {ESRGAN: Enhanced Super-Resolution Generative Adversarial Networks},
  year = {2018},
  note = {arXiv:1809.00219}
}"""
DENSENET = """@misc{huang2016densely,
  author = {Gao Huang and Zhuang Liu and Laurens van der Maaten and Kilian Q. Weinberger},
  title = {Densely Connected Convolutional Networks},
  year = {2016},
  note = {arXiv:1608.06993}
}"""
INTERVALS = "Per cent, differences in points, with 95 % intervals over the choice of test images"


def fill(document: str) -> str:
    """A document with its tables made anew; blocks that nobody knows stay as they are."""

    def put(match: re.Match[str]) -> str:
        start, name, old, end = match.groups()
        return start + (tables.made(name) if name in tables.TABLES else old) + end

    return BLOCK.sub(put, document)


def draw_channels_left(file: Path) -> Path | None:
    """Accuracy against the number of channels that are left, a panel for each benchmark.

    Args:
        file: A picture.

    Returns:
        The file, or None where nothing of `tables.SERIES` was measured.
    """
    panels = [name for name in tables.SERIES if tables.read(name)]
    if not panels:
        return None
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        title, questions, series = tables.SERIES[name]
        found = tables.Results(tables.read(name))
        for place, (label, (arm, way)) in enumerate(series.items()):
            cells = [found.get(arm, way, question) for question in questions]
            draw_series(axes, label, cells, place - len(series) / 2)
        axes.set(title=title, xlabel="channels that are left", ylabel="accuracy (%)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, metadata={"Software": None})
    return file


def draw_series(
    axes: Axes, label: str, cells: Sequence[tables.Row | None], aside: float = 0.0
) -> None:
    """One line with its intervals, of those questions that were asked.

    Args:
        axes: Where to.
        label: For the legend.
        cells: Results.
        aside: How far to the side, in percent of the width, so that equal lines are both seen.
    """
    known = sorted((row for row in cells if row is not None), key=lambda row: int(row["channels"]))
    if not known:
        return
    middle, low, high = (
        [100 * float(row[k]) for row in known] for k in ("accuracy", "low", "high")
    )
    spread = [[m - a for m, a in zip(middle, low, strict=True)],
              [b - m for m, b in zip(middle, high, strict=True)]]  # fmt: skip
    style = {"linewidth": 2.4} if "ours" in label else {"linewidth": 1.2, "linestyle": "--"}
    most = int(known[-1]["channels"])
    counts = [int(row["channels"]) + aside * most / 100 for row in known]
    axes.errorbar(counts, middle, yerr=spread, label=label, marker="o", capsize=3, **style)


def cost_of(name: str) -> tables.Row:
    """What a model costs on RGB."""
    return next(r for r in tables.read("complexity") if (r["model"], r["channels"]) == (name, "3"))


def dwg_densenet121(name: str) -> Card:
    """Cost, and what the flagship keeps on channel sets."""
    cost = cost_of(name)
    rows = [row for row in tables.read("complexity") if row["model"] in ("densenet121", name)]
    header = ("model", "channels", "params (M)", "multi-adds (G)", "fwd/bwd size (MB)")
    costs = [
        (r["model"], r["channels"], f"{float(r['params']) / 1e6:.2f}",
         f"{float(r['macs']) / 1e9:.3f}", f"{float(r['forward_backward_mb']):.1f}")
        for r in rows
    ]  # fmt: skip
    trained = bool(tables.read("flagship"))
    what, run = ("flagship", "this network") if trained else ("task1", "a small network")
    return Card(
        name=name,
        description="DenseNet-121 for any number, order and subset of channels: timm's network "
        "behind a stem that generates a kernel for each channel of each image. No weights come "
        "with this card: `pretrained=True` loads timm's for RGB, of which the twin gives the same "
        f"logits. Accuracies below are those of {run} with this stem, trained for the benchmark.",
        details={
            "Model Type": "Image classification / feature backbone",
            "Model Stats": {
                "Params (M)": f"{float(cost['params']) / 1e6:.2f}",
                "GMACs": f"{float(cost['macs']) / 1e9:.3f}",
                "Image size": "224 x 224",
            },
            "Channels": f"any; by wavelength in nm, by name, or anonymous. {NORMALISED}",
            "Papers": ["https://arxiv.org/abs/1608.06993", "https://arxiv.org/abs/1912.03458"],
        },
        usage=usage(name, RGB, 224, stem=True),
        comparison="### Cost\nAt 224 px with 50 classes (`bench/cost.py complexity`).\n\n"
        f"{tables.table(header, costs)}\n### Channel sets\n{INTERVALS} "
        f"(`bench/run.py {what}`: {BENCHMARKS[what].conditions}).\n\n{tables.made(what)}",
        limits=["With BatchNorm, accuracy on a channel set depends on how often training saw it.",
                "Trained from scratch on few small images: figures compare arms under this budget, "
                "not at convergence."],
        license=timm.get_pretrained_cfg("densenet121").license,
        citations=(ASSIGNMENT, DENSENET),
    )  # fmt: skip


#: What the networks of Task II are, and what their cards cite and allow.
TASK2: dict[str, tuple[str, dict[str, Any]]] = {
    "rrdb_small": (
        "Three residual-in-residual dense blocks: three layers as the task counts them, five with "
        "stem and classifier. The recommended network of Task II: as accurate as "
        "`rrdb_rnn_small`, smaller and faster. Its weights do not come with the package.",
        {"license": "other", "license_name": "research", "citations": (ASSIGNMENT, ESRGAN)},
    ),
    "rrdb_rnn_small": (
        "A recurrent convolution and three residual-in-residual dense blocks: four layers as the "
        "task counts them (a block, or the recurrence, is one), six with stem and classifier.",
        {"license": "other", "license_name": "research", "citations": (ASSIGNMENT, ESRGAN)},
    ),
    "dwg_rrdb_rnn_small": (
        "`rrdb_rnn_small` behind a stem that generates a kernel for each channel of each image: "
        "any number, order and subset of channels. Trained on RGB with a random subset of its "
        "channels for every image.",
        {"license": "other", "license_name": "research", "citations": (ASSIGNMENT, ESRGAN)},
    ),
    "resnet34": (
        "timm's ResNet34 trained from scratch: the bar of Task II. Its weights do not come with "
        "the package.",
        {"citations": (ASSIGNMENT,)},
    ),
}


def from_task2(name: str) -> Card:
    """A network of Task II."""
    about, more = TASK2[name]
    found = tables.Results(tables.read("task2"))
    row, cost = found.get(name, "trained", "RGB"), cost_of(name)
    if row is None:
        raise SystemExit(f"error: no results of {name}. Run: python bench/run.py task2 --data DATA")
    recipe, twin = BENCHMARKS["task2"].arms[name].config, name.startswith("dwg_")
    sets = tables.made("task2-sets") if twin else ""
    return Card(
        name=name,
        description=f"{about} Accuracy on {row['images']} test images: {tables.percent(row)} %, "
        f"seed {row['seed']}, timm_varchan {row['version']}.",
        details={
            "Model Type": "Image classification / feature backbone",
            "Model Stats": {
                "Params (M)": f"{float(row['params']) / 1e6:.2f}",
                "MMACs at 32 px": f"{float(row['macs']) / 1e6:.1f}",
                "MMACs at 224 px": f"{float(cost['macs']) / 1e6:.1f}",
            },
            "Channels": NORMALISED,
            "Data": f"25 classes of Tiny-ImageNet-200 at 32 px, {row['train_images']} training "
            "images",
            "Recipe": {
                "epochs": row["epochs"],
                "optimizer": "AdamW, weight decay 0.05, cosine schedule",
                "learning rate": f"{recipe['lr']:g}, from a search on images set aside",
                "batch size": str(recipe["batch_size"]),
                "label smoothing": str(recipe["smoothing"]),
            },
        },
        usage=usage(name, RGB, 32, stem=twin, pretrained=False),
        comparison=f"{INTERVALS}; p of the exact McNemar test (`bench/run.py task2`).\n\n"
        + tables.made("task2")
        + (f"\n### Channel sets\nTold the channels.\n\n{sets}" if twin else ""),
        limits=[
            f"Trained for {row['epochs']} epochs on {row['train_images']} small images: figures "
            "rank networks under this budget, not at convergence.",
            "At 32 px ResNet34's stem (stride 2, then pooling) leaves a map of 8 x 8; a stem for "
            "small images makes it slower, and may make it stronger.",
            "Intervals cover the choice of test images, not of seeds.",
        ],
        **more,
    )


CARDS = {
    "dwg_densenet121": partial(dwg_densenet121, "dwg_densenet121"),
    **{name: partial(from_task2, name) for name in TASK2},
}


def write(path: Path, text: str) -> None:
    """Write a document, and say whether it changed."""
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text != old:
        path.write_text(text, encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {'changed' if text != old else 'as it was'}")


def main() -> None:
    """Write the tables into the documents, the cards, and the picture."""
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    for path in DOCUMENTS:
        write(path, fill(path.read_text(encoding="utf-8")))
    for name, make in CARDS.items():
        write(CARDS_FOLDER / f"{name}.md", make().render())
    drawn = draw_channels_left(PICTURE)
    print(f"{PICTURE.relative_to(ROOT)}: {'drawn' if drawn else 'no results'}")


if __name__ == "__main__":
    main()

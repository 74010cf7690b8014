"""Every document of the results, made of the CSV files in `results/` alone.

    python bench/report.py

Tables go into `bench/REPORT.md` and wherever README.md and docs/ ask for one, between
`<!-- table: NAME -->` and `<!-- /table -->`; then the picture, and the model cards of
`dwg_densenet121` and the networks of Task II. No figure is typed.
"""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

import tables
import timm
from arms import BENCHMARKS
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
#: Colours of the picture's lines, and the height of their labels in per cent.
STYLES = (("#c2410c", 90), ("#0f766e", 46), ("#475569", 36))


def fill(document: str) -> str:
    """A document with its tables made anew; blocks that nobody knows stay as they are."""

    def put(match: re.Match[str]) -> str:
        start, name, old, end = match.groups()
        return start + (tables.made(name) if name in tables.TABLES else old) + end

    return BLOCK.sub(put, document)


def draw_channels_left(file: Path) -> Path | None:
    """Accuracy against the number of bands that are left, of models trained alike.

    Args:
        file: A picture, whose words can be read when it is 400 pixels wide.

    Returns:
        The file, or None where nothing of `tables.LINES` was measured.
    """
    found = tables.Results("eurosat")
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (label, (arm, way)), style in zip(tables.LINES.items(), STYLES, strict=True):
        cells = {n: found.get(arm, way, question) for n, question in tables.LEFT.items()}
        points = {n: row for n, row in cells.items() if row is not None}
        if not points:
            continue
        colour, height = style
        values = [100 * float(row["accuracy"]) for row in points.values()]
        spread = [100 * float(row["sd_seeds"] or 0) for row in points.values()]
        axes.errorbar(list(points), values, yerr=spread, color=colour, marker="o", markersize=9,
                      linewidth=4, capsize=6)  # fmt: skip
        axes.text(13, height, label, color=colour, fontsize=18, weight="bold", ha="right")
    if not axes.containers:
        return None
    axes.set_xlabel("bands left of 13", fontsize=19)
    axes.set_ylabel("accuracy (%)", fontsize=19)
    axes.set(xticks=list(tables.LEFT), ylim=(0, 100))
    axes.tick_params(labelsize=17)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Software": None})
    return file


def cost_of(name: str) -> tables.Row:
    """What a model costs on RGB."""
    return next(r for r in tables.read("complexity") if (r["model"], r["channels"]) == (name, "3"))


def dwg_densenet121() -> Card:
    """Cost, and the reference report's comparison."""
    name = "dwg_densenet121"
    cost = cost_of(name)
    return Card(
        name=name,
        description="DenseNet-121 for any number, order and subset of channels: timm's network "
        "behind a stem that generates a kernel for each channel of each image. No weights come "
        "with this card: `pretrained=True` loads timm's for RGB, of which the twin gives the same "
        "logits. Accuracies below are those of networks trained from scratch for the benchmark.",
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
        comparison="Per cent, with 95 % intervals over the choice of test images; cost at 224 px "
        f"(`bench/run.py flagship`: {BENCHMARKS['flagship'].conditions}).\n\n"
        f"{tables.made('flagship')}",
        limits=["With BatchNorm, accuracy on a channel set depends on how often training saw it.",
                "Trained from scratch on few small images: figures compare arms under this budget, "
                "not at convergence."],
        license=timm.get_pretrained_cfg("densenet121").license,
        citations=(ASSIGNMENT, DENSENET),
    )  # fmt: skip


#: What the networks of Task II are.
TASK2 = {
    "rrdb_small": "Three residual-in-residual dense blocks: three layers as the task counts them, "
    "five with stem and classifier. The recommended network of Task II: as accurate as "
    "`rrdb_rnn_small`, smaller and faster.",
    "rrdb_rnn_small": "A recurrent convolution and three residual-in-residual dense blocks: four "
    "layers as the task counts them, six with stem and classifier.",
}


def from_task2(name: str) -> Card:
    """A network of Task II."""
    row, cost = tables.Results("task2").get(name, "trained", "RGB"), cost_of(name)
    if row is None:
        raise SystemExit(f"error: no results of {name}. Run: python bench/run.py task2 --data DATA")
    recipe = BENCHMARKS["task2"].arms[name].config
    return Card(
        name=name,
        description=f"{TASK2[name]} No weights come with this card. Accuracy on {row['images']} "
        f"test images: {tables.percent(row)} %, seed {row['seed']}.",
        details={
            "Model Type": "Image classification / feature backbone",
            "Model Stats": {
                "Params (M)": f"{float(cost['params']) / 1e6:.2f}",
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
        usage=usage(name, RGB, 32, stem=False, pretrained=False),
        comparison=f"Per cent, with 95 % intervals over the choice of test images.\n\n"
        f"{tables.made('task2')}",
        limits=[
            f"Trained for {row['epochs']} epochs on {row['train_images']} small images: figures "
            "rank networks under this budget, not at convergence.",
            "At 32 px ResNet34's stem (stride 2, then pooling) leaves a map of 8 x 8; a stem for "
            "small images makes it slower, and may make it stronger.",
            "Intervals cover the choice of test images, not of seeds.",
        ],
        license="other", license_name="research", citations=(ASSIGNMENT, ESRGAN),
    )  # fmt: skip


CARDS = {
    "dwg_densenet121": dwg_densenet121,
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

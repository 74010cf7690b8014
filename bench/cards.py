"""Model cards from the results: `dwg_densenet121`, `rrdb_rnn_small`, its twin, and ResNet34.

python bench/cards.py --output model_cards
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import report
import timm
from arms import BENCHMARKS

from timm_varchan import RGB
from timm_varchan.cards import Card, usage

NORMALISED = f"R, G, B: values / 255, mean {RGB.mean}, standard deviation {RGB.std}"
REPORT = """@misc{chia2024assignment,
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


def cost_of(name: str) -> report.Row:
    """What a model costs on RGB."""
    return next(r for r in report.read("complexity") if (r["model"], r["channels"]) == (name, "3"))


def dwg_densenet121(name: str) -> Card:
    """Cost, and what the flagship keeps on channel sets."""
    cost = cost_of(name)
    rows = [row for row in report.read("complexity") if row["model"] in ("densenet121", name)]
    header = ("model", "channels", "params (M)", "multi-adds (G)", "fwd/bwd size (MB)")
    costs = [
        (r["model"], r["channels"], f"{float(r['params']) / 1e6:.2f}",
         f"{float(r['macs']) / 1e9:.3f}", f"{float(r['forward_backward_mb']):.1f}")
        for r in rows
    ]  # fmt: skip
    trained = bool(report.read("flagship"))
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
        f"{report.table(header, costs)}\n### Channel sets\n{INTERVALS} "
        f"(`bench/run.py {what}`: {BENCHMARKS[what].conditions}).\n\n{report.made(what)}",
        limits=["With BatchNorm, accuracy on a channel set depends on how often training saw it.",
                "Trained from scratch on few small images: figures compare arms under this budget, "
                "not at convergence."],
        license=timm.get_pretrained_cfg("densenet121").license,
        citations=(REPORT, DENSENET),
    )  # fmt: skip


#: What the networks of Task II are, and what their cards cite and allow.
TASK2: dict[str, tuple[str, dict[str, Any]]] = {
    "rrdb_rnn_small": (
        "A recurrent convolution and three residual-in-residual dense blocks: four layers as the "
        "task counts them (a block, or the recurrence, is one), six with stem and classifier.",
        {"license": "other", "license_name": "research", "citations": (REPORT, ESRGAN)},
    ),
    "dwg_rrdb_rnn_small": (
        "`rrdb_rnn_small` behind a stem that generates a kernel for each channel of each image: "
        "any number, order and subset of channels. Trained on RGB with a random subset of its "
        "channels for every image.",
        {"license": "other", "license_name": "research", "citations": (REPORT, ESRGAN)},
    ),
    "resnet34": (
        "timm's ResNet34 trained from scratch: the bar of Task II. Its weights do not come with "
        "the package.",
        {"citations": (REPORT,)},
    ),
}


def from_task2(name: str) -> Card:
    """A network of Task II."""
    about, more = TASK2[name]
    found = report.Results(report.read("task2"))
    row, cost = found.get(name, "trained", "RGB"), cost_of(name)
    if row is None:
        raise SystemExit(f"error: no results of {name}. Run: python bench/run.py task2 --data DATA")
    recipe, twin = BENCHMARKS["task2"].arms[name].config, name.startswith("dwg_")
    sets = report.made("task2-sets") if twin else ""
    return Card(
        name=name,
        description=f"{about} Accuracy on {row['images']} test images: {report.percent(row)} %, "
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
        usage=usage(name, RGB, 32, stem=twin, pretrained=name != "resnet34"),
        comparison=f"{INTERVALS}; p of the exact McNemar test (`bench/run.py task2`).\n\n"
        + report.made("task2")
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


def main() -> None:
    """Write the cards."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the cards")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, make in CARDS.items():
        (args.output / f"{name}.md").write_text(make().render(), encoding="utf-8")
        print(args.output / f"{name}.md")


if __name__ == "__main__":
    main()

"""Model cards from committed results: `dwg_densenet121`, `rrdb_rnn_small`, its twin, and ResNet34.

    python bench/cards.py --results bench/results --output model_cards

A card is written where the results that it needs are there: `complexity.json` (bench/complexity.py)
and, if there, `task1.json` for the first, `task2.json` for the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
from task1_arms import ARMS as TASK1_ARMS
from task1_report import markdown as task1_table
from task2_arms import BAR, OWN, TWIN
from task2_report import markdown as task2_table
from task2_report import sets_markdown

from timm_varchan import RGB
from timm_varchan.cards import Card, markdown_table, usage, with_interval

Results = Mapping[str, Any]
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


def dwg_densenet121(complexity: Results, task1: Results | None = None) -> Card:
    """Cost, and what Task I measured on a small network with the same stem."""
    name = "dwg_densenet121"
    rows = [row for row in complexity["rows"] if row["model"] in ("densenet121", name)]
    header = ("model", "channels", "params (M)", "multi-adds (G)", "fwd/bwd size (MB)")
    costs = [
        (row["model"], str(row["num_channels"]), f"{row['params'] / 1e6:.2f}",
         f"{row['macs'] / 1e9:.3f}", f"{row['forward_backward_mb']:.1f}")
        for row in rows
    ]  # fmt: skip
    own = next(row for row in rows if row["model"] == name and row["num_channels"] == len(RGB))
    size = own["img_size"]
    return Card(
        name=name,
        description="DenseNet-121 for any number, order and subset of channels: timm's network "
        "behind a stem that generates a kernel for each channel of each image. No weights were "
        "trained for this card: `pretrained=True` loads timm's for RGB, of which the twin gives "
        "the same logits."
        + (" Accuracies below are those of a small network with this stem." if task1 else ""),
        details={
            "Model Type": "Image classification / feature backbone",
            "Model Stats": {
                "Params (M)": f"{own['params'] / 1e6:.2f}",
                "GMACs": f"{own['macs'] / 1e9:.3f}",
                "Image size": f"{size} x {size}",
            },
            "Channels": f"any; by wavelength in nm, by name, or anonymous. {NORMALISED}",
            "Papers": ["https://arxiv.org/abs/1608.06993", "https://arxiv.org/abs/1912.03458"],
        },
        usage=usage(name, RGB, size, stem=True),
        comparison=f"### Cost\nAt {size} px with {complexity['settings']['num_classes']} classes "
        f"(`bench/complexity.py`).\n\n{markdown_table(header, costs)}\n"
        f"{_task1_section(task1) if task1 else ''}",
        limits=["Nothing here was measured with DenseNet-121 on images.",
                "With BatchNorm, accuracy on a channel set depends on how often training saw it."],
        license=timm.get_pretrained_cfg("densenet121").license,
        citations=(REPORT, DENSENET),
    )  # fmt: skip


def _task1_section(task1: Results) -> str:
    settings = task1["settings"]
    arms = {arm: task1["arms"][arm] for arm in TASK1_ARMS if arm in task1["arms"]}
    return (
        f"### Accuracy of the stem on a small network\nA {settings['architecture']} of reduced "
        f"width, {settings['num_classes']} classes of Tiny-ImageNet at {settings['img_size']} px, "
        f"{settings['training_images']} training and {settings['test_images']} test images, "
        f"{settings['epochs']} epochs (`bench/task1.py`), {task1['machine']}. Per cent; losses in "
        f"points against one network for each channel set.\n\n{task1_table(arms)}"
    )


def _recipe(task2: Results, name: str) -> dict[str, str]:
    settings, one = task2["settings"], next(iter(task2["arms"][name]["seeds"].values()))
    tried = ", ".join(f"{float(lr):g}: {value:.1f} %" for lr, value in one["tried"].items())
    return {
        "epochs": str(settings["epochs"]),
        "optimizer": f"AdamW, weight decay {settings['weight_decay']}, cosine schedule",
        "learning rate": f"{one['lr']:g}, from a search with {one.get('lr_of', name)}, "
                         f"{settings['search_epochs']} epochs each on images set aside ({tried})",
        "batch size": str(settings["batch_size"]),
        "augmentation": "flip, shift by up to an eighth",
        "label smoothing": str(settings["smoothing"]),
        "machine": task2["machine"],
    }  # fmt: skip


#: What the networks of Task II are.
TASK2 = {
    OWN: "A recurrent convolution and three residual-in-residual dense blocks: four layers as the "
    "task counts them (a block, or the recurrence, is one), six with stem and classifier.",
    TWIN: "`rrdb_rnn_small` behind a stem that generates a kernel for each channel of each image: "
    "any number, order and subset of channels. Trained on RGB with a random subset of its "
    "channels for every image.",
    BAR: "timm's ResNet34 trained from scratch: the bar of Task II. Its weights do not come with "
    "the package.",
}
_OF_BAR: dict[str, Any] = {"citations": (REPORT,)}
_OF_OWN: dict[str, Any] = {
    "license": "other", "license_name": "research", "citations": (REPORT, ESRGAN)
}  # fmt: skip


def from_task2(name: str, task2: Results) -> Card:
    """A network of Task II."""
    arm, settings = task2["arms"][name], task2["settings"]
    size, classes = settings["img_size"], settings["num_classes"]
    cost = arm["complexity"]
    shipped = bool(timm.list_pretrained(f"{name}*")) and name != BAR
    is_twin = name == TWIN
    sets = f"\n### Channel sets\nTrained with `{arm['aug']}`, told the channels.\n\n"
    stats = {"Params (M)": f"{cost[str(size)]['params'] / 1e6:.2f}"}
    stats |= {f"MMACs at {px} px": f"{c['macs'] / 1e6:.1f}" for px, c in cost.items()}
    seeds = ", ".join(
        f"seed {seed}: {with_interval(one['sets']['RGB']['accuracy'], 1)} %"
        for seed, one in arm["seeds"].items()
    )
    return Card(
        name=name,
        description=f"{TASK2[name]} Accuracy on {settings['test_images']} test images: {seeds}.",
        details={
            "Model Type": "Image classification / feature backbone",
            "Model Stats": stats,
            "Layers": f"{arm['num_convs']} convolutions on the longest path",
            "Channels": NORMALISED,
            "Data": f"{classes} classes of Tiny-ImageNet-200 at {size} px, "
                    f"{settings['training_images']} training images",
            "Recipe": _recipe(task2, name),
        },
        usage=usage(name, RGB, size, stem=is_twin, pretrained=shipped),
        comparison="Per cent with 95 % intervals over the choice of test images; paired "
        "differences by the exact McNemar test; times as ratios of interleaved steps "
        "(`bench/task2.py`; curves: `task2.png` beside the results).\n\n"
        + task2_table(task2) + (sets + sets_markdown(task2) if is_twin else ""),
        limits=[
            f"Trained for {settings['epochs']} epochs on {settings['training_images']} small "
            "images: figures rank networks under this budget, not at convergence.",
            f"At {size} px ResNet34's stem (stride 2, then pooling) leaves a map of {size // 4} x "
            f"{size // 4}; a stem for small images would make it stronger and slower.",
            "Intervals cover the choice of test images, not of seeds.",
        ],
        **_OF_BAR if name == BAR else _OF_OWN,
    )  # fmt: skip


#: Each card with the results that it needs and those that it can do without.
CARDS: dict[str, tuple[Callable[..., Card], tuple[str, ...], tuple[str, ...]]] = {
    "dwg_densenet121": (dwg_densenet121, ("complexity",), ("task1",)),
    **{name: (partial(from_task2, name), ("task2",), ()) for name in TASK2},
}


def render(folder: Path) -> dict[str, str]:
    """All cards that the results in a folder, or in folders below it, allow, by name."""
    texts = {}
    for name, (make, needs, likes) in CARDS.items():
        results = {key: _newest(folder, key) for key in (*needs, *likes)}
        if not all(results[key] for key in needs):
            continue
        if name not in TASK2 or name in results["task2"]["arms"]:
            texts[name] = make(**results).render()
    return texts


def _newest(folder: Path, name: str) -> Results | None:
    """The results of this name; those of the latest version where folders of versions hold them."""
    files = sorted(folder.rglob(f"{name}.json"))
    return json.loads(files[-1].read_text()) if files else None


def main() -> None:
    """Parse the command line and write the cards."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the results")
    parser.add_argument("--output", type=Path, required=True, help="folder for the cards")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in render(args.results).items():
        (args.output / f"{name}.md").write_text(text, encoding="utf-8")
        print(args.output / f"{name}.md")


if __name__ == "__main__":
    main()

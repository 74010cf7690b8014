"""Model cards with timm's sections: generated from results, never written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_varchan.channels import Channel, ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.hub import read_config

__all__ = ["CITATION", "Card", "folder_card", "markdown_table", "usage", "write_card"]

RESULTS, CARD = "results.json", "README.md"
TEMPLATE = Path(__file__).parent / "card.md.jinja"
TAGS = ["image-classification", "timm", "timm_varchan"]
CITATION = """@misc{timm_varchan,
  title = {timm\\_varchan: any timm model on any number, order and subset of input channels},
  note = {Python package}
}"""
TIMM_CITATION = """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""
#: What a metric of a result is given as.
ESTIMATE = {"value", "low", "high"}
#: Rows of a table of results; a card is read by people.
MAX_ROWS = 32


@dataclass(frozen=True)
class Card:
    """What a card says, in the order in which it says it.

    Args:
        name: Of the model.
        description: A few sentences.
        details: Text, a list of texts or a dictionary of texts by heading.
        usage: Markdown with code, from `usage`.
        comparison: Markdown with the tables of results.
        evaluated: The results for the hub's own table (`model-index`).
        datasets: Names on the hub of what it was trained on.
        limits: What the figures do not say, one text each.
        license: Of the weights, as the hub spells it; `"other"` with `license_name`.
        license_name: What another licence is called.
        citations: BibTeX entries.
    """

    name: str
    description: str
    details: Mapping[str, Any]
    usage: str
    comparison: str = ""
    evaluated: Sequence[EvalResult] = ()
    datasets: Sequence[str] = ()
    limits: Sequence[str] = ()
    license: str = "apache-2.0"
    license_name: str | None = None
    citations: Sequence[str] = field(default=(TIMM_CITATION, CITATION))

    def render(self) -> str:
        """The card as Markdown with the hub's front matter."""
        about = ModelCardData(
            license=self.license,
            license_name=self.license_name,
            library_name="timm",
            pipeline_tag="image-classification",
            tags=list(TAGS),
            datasets=list(self.datasets) or None,
            model_name=self.name if self.evaluated else None,
            eval_results=list(self.evaluated) or None,
        )
        card = ModelCard.from_template(
            about,
            template_path=str(TEMPLATE),
            **{name.name: getattr(self, name.name) for name in fields(self)},
        )
        return f"{card}\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_interval(estimate: Mapping[str, float], factor: float = 100) -> str:
    """An estimate with its 95 % interval, by default in per cent."""
    value, low, high = (f"{factor * estimate[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def usage(
    source: str,
    channels: ChannelSet,
    img_size: int,
    *,
    stem: bool,
    pretrained: bool = True,
) -> str:
    """Code that classifies, extracts features and embeds.

    Args:
        source: What `timm.create_model` takes.
        channels: Of the input.
        img_size: Height and width, in pixels.
        stem: Whether the model takes other channels too.
        pretrained: Whether there are weights to be had.
    """
    shape = f"1, {len(channels)}, {img_size}, {img_size}"
    other = f"""
timm_varchan.set_channels(model, [490.0, 842.0])  # other channels, by name or wavelength in nm
logits = model(torch.randn(1, 2, {img_size}, {img_size}))
"""
    return f"""### Image Classification
```python
import timm_varchan  # registers the architecture with timm
import timm
import torch

model = timm.create_model("{source}", pretrained={pretrained}).eval()
x = torch.randn({shape})  # {channels}, normalised by the means and deviations above
probabilities, classes = model(x).softmax(dim=1).topk(min(5, model.num_classes))
{other if stem else ""}```

### Feature Map Extraction
```python
import timm_varchan
import timm
import torch

model = timm.create_model("{source}", pretrained={pretrained}, features_only=True).eval()
for features in model(torch.randn({shape})):
    print(features.shape)
```

### Image Embeddings
```python
import timm_varchan
import timm
import torch

model = timm.create_model("{source}", pretrained={pretrained}, num_classes=0).eval()
embeddings = model(torch.randn({shape}))  # (1, num_features)
```
"""


def folder_card(
    folder: str | Path,
    *,
    name: str | None = None,
    source: str | None = None,
    license: str | None = None,
) -> Card:
    """The card of a saved model, from its `config.json` and, where a run left it, `results.json`.

    Args:
        folder: What `timm_varchan.hub.save` or a training run wrote.
        name: What the card calls it; by default the last part of its source.
        source: Where the model will be loaded from, as `"hf-hub:ORG/NAME"`; the folder itself by
            default.
        license: Of the weights, as the hub spells it; by default what the configuration says.

    Returns:
        The card.

    Raises:
        FileNotFoundError: The folder is no saved model.
        UserError: Its configuration or results are broken.
    """
    folder = Path(folder)
    config = read_config(folder, str(folder))
    results = _read_results(folder / RESULTS)
    cfg = config.get("pretrained_cfg") or {}
    architecture = str(config["architecture"])
    img_size = int(cfg["input_size"][-1])
    saved = config.get("channels")
    channels = ChannelSet.from_dict(saved) if saved else ChannelSet.anonymous(cfg["input_size"][0])
    details: dict[str, Any] = {
        "Model Type": f"Image classification, `{architecture}`",
        "Model Stats": {
            "Image size": f"{img_size} x {img_size}", "Features": str(config["num_features"])
        },
        "Channels": [_channel_text(c, i) for i, c in enumerate(channels, start=1)],
        "Classes": ", ".join(config.get("label_names") or ()) or str(config["num_classes"]),
    }  # fmt: skip
    scale = channels.value_scale
    divided = f"divided by {scale:g} and then " if scale else ""
    limits = [
        f"Images must be {divided}normalised by the means and deviations above, channel by channel."
    ]
    measured: dict[str, Any] = {}
    if results is not None:
        size = f"{results['model']['num_parameters'] / 1e6:.2f}"
        details["Model Stats"]["Params (M)"] = size
        details |= _data_details(results)
        seeds = ", ".join(map(str, results["seeds"]))
        limits.append(f"Intervals cover the choice of test images, not of seeds (seed {seeds}).")
        measured = {
            "comparison": _results_section(results),
            "evaluated": _evaluated(results),
            "datasets": _hub_datasets(results),
        }
    limits.append(
        f"Made with timm {timm.__version__}; `import timm_varchan` first: timm alone does not know "
        f"the architecture."
    )
    return Card(
        name=name or (source or str(folder.resolve())).rpartition("/")[2],
        description=_description(architecture, results),
        details=details,
        usage=usage(
            source or f"local-dir:{folder}", channels, img_size,
            stem=architecture.startswith("dwg_"),
        ),
        limits=limits,
        license=license or cfg.get("license") or "other",
        **measured,
    )  # fmt: skip


def write_card(folder: str | Path, **kwargs: Any) -> Path:
    """Write the card of a saved model into its folder, where the hub looks for it; the path.

    Args:
        folder: As in `folder_card`.
        **kwargs: As in `folder_card`.
    """
    path = Path(folder) / CARD
    path.write_text(folder_card(folder, **kwargs).render(), encoding="utf-8")
    return path


def _read_results(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["evaluation"]["sets"], results["data"]["num_images"], results["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no result of a training run ({type(error).__name__}: {error}). Remove it "
            f"or run the evaluation again."
        ) from error
    return results


def _channel_text(channel: Channel, number: int) -> str:
    parts = [channel.name or f"channel {number}"]
    if channel.wavelength_nm is not None:
        parts.append(f"{channel.wavelength_nm:g} nm")
    if channel.mean is not None and channel.std is not None:
        parts.append(f"mean {channel.mean:.4g}, standard deviation {channel.std:.4g}")
    return ", ".join(parts)


def _description(architecture: str, results: Mapping[str, Any] | None) -> str:
    if results is None:
        return f"A `{architecture}`. No results lie beside it that would say how it was trained."
    config, data = results["config"], results["data"]
    if results["training"] is None:
        return f"A `{architecture}`, evaluated on {data['name']}; this run did not train it."
    start = "timm's pretrained weights" if config.get("pretrained") else "random weights"
    return (
        f"A `{architecture}`, trained from {start} on {data['name']} "
        f"({data['num_images']['train']} images, {len(data['class_names'])} classes)."
    )


def _data_details(results: Mapping[str, Any]) -> dict[str, Any]:
    config, data = results["config"], results["data"]
    counts = ", ".join(f"{n} {split}" for split, n in data["num_images"].items() if n)
    details: dict[str, Any] = {"Data": data["name"], "Images": counts}
    if results["training"] is not None:
        recipe = ("opt", "lr", "sched", "weight_decay", "batch_size", "smoothing", "channel_aug",
                  "channel_identity", "seed")  # fmt: skip
        training = results["training"]
        details["Recipe"] = {
            "epochs": str(training["epochs"]),
            **{key: str(config[key]) for key in recipe if key in config},
            "machine": f"{results['machine']['num_processes']} x {results['machine']['device']}",
        }
    return details


def _hub_datasets(results: Mapping[str, Any]) -> list[str]:
    """The data, if its name can be one of the hub's, which links it."""
    name = str(results["data"]["name"])
    can_be = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return [name.lower()] if can_be else []


def _evaluated(results: Mapping[str, Any]) -> list[EvalResult]:
    """All metrics on all channels, accuracy on other channel sets, as the hub lists them."""
    name, split = str(results["data"]["name"]), str(results["evaluation"]["split"])
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_config=f"channels {one['channels']}, {one['mode']}, {one['order']}",
            dataset_split=split,
            metric_type=metric,
            metric_name=metric,
            metric_value=round(one[metric]["value"], 4),
        )
        for number, one in enumerate(results["evaluation"]["sets"][:MAX_ROWS])
        for metric in (_metrics(one) if number == 0 else ["accuracy"])
    ]


def _metrics(one: Mapping[str, Any]) -> list[str]:
    """The names of the estimates in a result: accuracy and the macro averages."""
    return [name for name, v in one.items() if isinstance(v, Mapping) and {*v} == ESTIMATE]


def _results_section(results: Mapping[str, Any]) -> str:
    sets, evaluation = results["evaluation"]["sets"], results["evaluation"]
    metrics = _metrics(sets[0])
    shown = [one for one in sets if one.get("kind") in ("all", "natural", "asked")]
    shown = sets if len(sets) <= MAX_ROWS else shown or sets[:MAX_ROWS]
    head = ("channels", "mode", "order", *metrics)
    rows = [
        [one.get("name", one["channels"]), one["mode"], one["order"],
         *(with_interval(one[m]) for m in metrics)]
        for one in shown
    ]  # fmt: skip
    left = len(sets) - len(rows)
    more = f"\n{left} more rows are in `{RESULTS}`.\n" if left else ""
    score, loss = evaluation.get("robustness"), ""
    if score:
        loss = (
            f"\nMean over the numbers of channels of the mean over the sets of a number: "
            f"{100 * score['uniform_mean']:.1f}."
        )
        if score["worst_loss"]:
            points = 100 * score["worst_loss"]["difference"]
            loss += f" Worst loss of a single channel: {points:.1f} ({score['worst_channel']})."
    return (
        f"Per cent with 95 % intervals on {results['data']['num_images']['evaluated']} images "
        f"({evaluation['split']}).\n\n{markdown_table(head, rows)}{more}{loss}\n"
    )

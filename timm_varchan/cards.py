"""Model cards: what it is, how to use it, its limits, and the figures at the end."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from timm_varchan.channels import Channel, ChannelSet
from timm_varchan.errors import UserError
from timm_varchan.hub import read_config
from timm_varchan.input_spec import InputSpec
from timm_varchan.results import headline, metrics_table

__all__ = ["CARD", "Card", "folder_card", "usage", "write_card"]

RESULTS, CARD = "results.json", "README.md"
CITATION = """@misc{timm_varchan,
  title = {timm\\_varchan: any timm model on any number, order and subset of input channels},
  note = {Python package}
}"""
TIMM_CITATION = """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  doi = {10.5281/zenodo.4414861}
}"""
#: What training did, of the flags of a run.
_RECIPE = ("opt", "lr", "sched", "weight_decay", "batch_size", "smoothing", "channel_aug", "seed")


@dataclass(frozen=True)
class Card:
    """What a card says, in the order in which it says it.

    Args:
        name: Of the model.
        description: A few sentences.
        details: Text, a list of texts or a dictionary of texts by heading.
        usage: Markdown with code, from `usage`.
        limits: What the figures do not say, one text each.
        citations: BibTeX entries.
        comparison: Markdown with the tables of results.
        evaluated: The results for the hub's own table (`model-index`).
        datasets: Names on the hub of what it was trained on.
        license: Of the weights, as the hub spells it; `"other"` with `license_name`.
        license_name: What another licence is called.
    """

    name: str
    description: str
    details: Mapping[str, Any]
    usage: str
    limits: Sequence[str] = ()
    citations: Sequence[str] = (TIMM_CITATION, CITATION)
    comparison: str = ""
    evaluated: Sequence[EvalResult] = ()
    datasets: Sequence[str] = ()
    license: str = "apache-2.0"
    license_name: str | None = None

    def render(self) -> str:
        """The card as Markdown with the hub's front matter."""
        about = ModelCardData(
            license=self.license,
            license_name=self.license_name,
            library_name="timm",
            pipeline_tag="image-classification",
            tags=["image-classification", "timm", "timm_varchan"],
            datasets=list(self.datasets) or None,
            model_name=self.name if self.evaluated else None,
            eval_results=list(self.evaluated) or None,
        )
        details = []
        for label, value in self.details.items():
            if isinstance(value, str):
                details.append(f"- **{label}:** {value}")
                continue
            rows = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, Mapping) else value
            details += [f"- **{label}:**", *(f"  - {row}" for row in rows)]
        sections = {
            "Usage": self.usage,
            "Details": "\n".join(details),
            "Limits": "\n".join(f"- {text}" for text in self.limits),
            "Citation": "\n".join(f"```bibtex\n{entry}\n```" for entry in self.citations),
            "Results": self.comparison,
        }
        body = [f"## {heading}\n{text.strip()}" for heading, text in sections.items() if text]
        head = f"---\n{about.to_yaml()}\n---\n# Model card for {self.name}"
        return "\n\n".join([head, self.description, *body]) + "\n"


def usage(
    source: str, channels: ChannelSet, img_size: int, *, stem: bool, pretrained: bool = True
) -> str:
    """Code that classifies, extracts features and embeds.

    Args:
        source: What `timm.create_model` takes.
        channels: Of the input.
        img_size: Height and width, in pixels.
        stem: Whether the model takes other channels too.
        pretrained: Whether there are weights to be had.
    """
    create = f'timm.create_model("{source}", pretrained={pretrained}'
    other = f"""
timm_varchan.set_channels(model, [490.0, 842.0])  # other channels, by name or wavelength in nm
logits = model(torch.randn(1, 2, {img_size}, {img_size}))
"""
    return f"""```python
import timm_varchan  # registers the architecture with timm
import timm
import torch

model = {create}).eval()
x = torch.randn(1, {len(channels)}, {img_size}, {img_size})  # {channels}, normalised as below
probabilities, classes = model(x).softmax(dim=1).topk(min(5, model.num_classes))

features = {create}, features_only=True).eval()(x)  # a list of maps
embedding = {create}, num_classes=0).eval()(x)  # (1, num_features)
{other if stem else ""}```"""


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

    Raises:
        FileNotFoundError: The folder is no saved model.
        UserError: Its configuration or results are broken.
    """
    folder = Path(folder)
    config, results = read_config(folder, str(folder)), _read_results(folder / RESULTS)
    cfg = config.get("pretrained_cfg") or {}
    architecture, img_size = str(config["architecture"]), int(cfg["input_size"][-1])
    spec = InputSpec.from_dict(config["input"]) if "input" in config else InputSpec()
    channels = spec.channels if len(spec.channels) else ChannelSet.anonymous(cfg["input_size"][0])
    divided = f"divided by {channels.value_scale:g}, then " if channels.value_scale else ""
    details: dict[str, Any] = {
        "Architecture": f"`{architecture}`, {img_size} x {img_size} px",
        "Channels": [_channel_text(c, i) for i, c in enumerate(channels, start=1)],
        "Classes": ", ".join(spec.class_names) or str(config["num_classes"]),
    }
    limits = [f"Images must be {divided}normalised by the means and deviations above."]
    described = f"A `{architecture}`. No results lie beside it that would say how it was trained."
    measured: dict[str, Any] = {}
    if results is not None:
        described = f"{_trained(architecture, results)} {headline(results).capitalize()}."
        details |= _data_details(results)
        seeds = ", ".join(map(str, results["seeds"]))
        limits.append(f"Intervals cover the choice of test images, not of seeds (seed {seeds}).")
        measured = {
            "comparison": metrics_table(results),
            "evaluated": _evaluated(results),
            "datasets": _hub_datasets(str(results["data"]["name"])),
        }
    limits.append(f"Made with timm {timm.__version__}, which knows it after `import timm_varchan`.")
    return Card(
        name=name or (source or str(folder.resolve())).rpartition("/")[2],
        description=described,
        details=details,
        usage=usage(source or f"local-dir:{folder}", channels, img_size,
                    stem=architecture.startswith("dwg_")),
        limits=limits,
        license=license or cfg.get("license") or "other",
        **measured,
    )  # fmt: skip


def write_card(folder: str | Path, **kwargs: Any) -> Path:
    """Write the card of a saved model where the hub looks for it; arguments as `folder_card`."""
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


def _trained(architecture: str, results: Mapping[str, Any]) -> str:
    data, size = results["data"], f"{results['model']['num_parameters'] / 1e6:.2f} M parameters"
    if results["training"] is None:
        return f"A `{architecture}` ({size}), evaluated on {data['name']}."
    start = "timm's pretrained weights" if results["config"].get("pretrained") else "random weights"
    return f"A `{architecture}` ({size}), trained from {start} on {data['name']}."


def _data_details(results: Mapping[str, Any]) -> dict[str, Any]:
    config, data, training = results["config"], results["data"], results["training"]
    counts = ", ".join(f"{n} {split}" for split, n in data["num_images"].items() if n)
    details: dict[str, Any] = {"Data": f"{data['name']}, images: {counts}"}
    if training is not None:
        recipe = {"epochs": training["epochs"], **{k: config[k] for k in _RECIPE if k in config}}
        details["Recipe"] = ", ".join(f"{key} {value}" for key, value in recipe.items())
    return details


def _hub_datasets(name: str) -> list[str]:
    """The data, if its name can be one of the hub's, which links it."""
    can_be = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    return [name.lower()] if can_be else []


def _evaluated(results: Mapping[str, Any]) -> list[EvalResult]:
    """All metrics on all channels, accuracy on sets that people chose, as the hub lists them."""
    name, evaluation = str(results["data"]["name"]), results["evaluation"]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_config=f"channels {entry['channels']}, {entry['mode']}, {entry['order']}",
            dataset_split=str(evaluation["split"]),
            metric_type=metric,
            metric_name=metric,
            metric_value=round(entry[metric]["value"], 4),
        )
        for entry in evaluation["sets"]
        if entry["kind"] != "sample"
        for metric in ([m for m in entry if m.endswith("_macro") and entry["kind"] == "all"]
                       + ["accuracy"])
    ]  # fmt: skip

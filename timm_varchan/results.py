"""What an evaluation tells people: the page of results, as Markdown and as one HTML file."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from timm_varchan.channels import ChannelSet
from timm_varchan.data import ImageSplit
from timm_varchan.evaluation import (
    METRICS,
    PREDICTIONS,
    Difference,
    Estimate,
    Evaluation,
    Predictions,
    class_counts,
    compare_predictions,
    confusion_cells,
    foretold,
    paired_difference,
    rank_bands,
    robustness,
    smallest_difference,
    spread,
    summarise_sizes,
    wilson_interval,
)
from timm_varchan.plots import (
    picture_of,
    plot_bands,
    plot_channel_sets,
    plot_confusion,
    plot_curves,
)

__all__ = [
    "Evaluated",
    "evaluation_entry",
    "headline",
    "html_page",
    "markdown_page",
    "metrics_table",
    "write_results",
    "write_rows",
]

#: Rows of a table for people; everything is in `results.json` and `sets.csv`.
MAX_ROWS = 15
#: Classes of a table; of more, those that are recognised worst.
MAX_CLASSES = 30
#: Images of the page that were classified wrongly, the surest mistakes first.
MAX_WRONG = 24
_THUMBNAIL = 112


class Evaluated(NamedTuple):
    """What an evaluation came to.

    Args:
        split: What the images are: `validation`, `test`.
        sets: The results of the channel sets.
        predictions: The answers in them.
        unexplained: Of each result the variance that its channels do not explain, a fraction of
            that of the model's virtual channels; None where nothing is known of it.
        baseline: The answers of another model on the same images.
    """

    split: str
    sets: Evaluation
    predictions: Predictions
    unexplained: Sequence[float | None]
    baseline: Predictions | None = None


# The entry of results.json ------------------------------------------------------------------------


def evaluation_entry(evaluated: Evaluated) -> dict[str, Any]:
    """The entry `evaluation` of `results.json`, accuracy first; `docs/evaluation.md` explains it.

    Raises:
        UserError: The baseline answered other images, classes or sets.
    """
    sets, names = evaluated.sets, evaluated.predictions.class_names
    whole, check = sets[0], sets.order_check
    counts = np.bincount(whole.references, minlength=len(names))
    return {
        "accuracy": _plain(whole.metrics["accuracy"]),
        "chance": 1 / len(names),
        "most_frequent": {
            "class": names[int(counts.argmax())], "fraction": float(counts.max() / counts.sum())
        },
        "smallest_difference": smallest_difference(whole.num_images) / whole.num_images,
        "split": evaluated.split,
        "num_images": whole.num_images,
        "num_passes": sets.num_passes,
        "sets": _set_entries(evaluated),
        "sizes": _plain(summarise_sizes(sets)),
        "bands": _plain(rank_bands(sets)),
        "robustness": _plain(robustness(sets)),
        "foretold": foretold(sets, evaluated.unexplained),
        "order_check": check and {**_plain(check), "equal": check.equal},
        "confusion": confusion_cells(whole.predictions, whole.references, len(names)).tolist(),
        "baseline": None if evaluated.baseline is None else evaluated.baseline.model,
    }  # fmt: skip


def _set_entries(evaluated: Evaluated) -> list[dict[str, Any]]:
    """Every result with its paired differences: to all channels, and to the baseline's answers."""
    sets = evaluated.sets
    whole = {r.mode: r for r in reversed(sets) if r.kind == "all" and r.order == "in order"}
    compared = {}
    if evaluated.baseline is not None:
        compared = compare_predictions(evaluated.predictions, evaluated.baseline)
    entries = []
    for number, (result, error) in enumerate(zip(sets, evaluated.unexplained, strict=True)):
        entry = {**result.to_json(), "loss": None, "unexplained": error}
        full, other = whole.get(result.mode), compared.get(number)
        if full is not None and full is not result:
            entry["loss"] = _plain(paired_difference(full.correct, result.correct))
        entries.append({**entry, "baseline": _plain(other)})
    return entries


def _plain(value: Any) -> Any:
    """Named tuples and data classes as dictionaries, also in lists, as JSON and the page want."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    fields = value._asdict() if hasattr(value, "_asdict") else getattr(value, "__dict__", None)
    return value if fields is None else {key: _plain(part) for key, part in fields.items()}


# Words --------------------------------------------------------------------------------------------


def headline(results: Mapping[str, Any]) -> str:
    """Accuracy with its interval, and what knowing nothing would give, in one sentence."""
    data, evaluation = results["data"], results["evaluation"]
    whole, most = evaluation["sets"][0], evaluation["most_frequent"]
    value, low, high = (100 * evaluation["accuracy"][key] for key in ("value", "low", "high"))
    size = whole["size"]
    channels = f"all {size} channels" if size > 1 else f"channel {whole['channels']}"
    return (
        f"accuracy {value:.1f} %, 95 % interval {low:.1f} to {high:.1f}, on "
        f"{evaluation['num_images']:,} images ({evaluation['split']}) of "
        f"{len(data['class_names'])} classes with {channels} ({whole['mode']}); always saying "
        f"{most['class']}, the most "
        f"frequent class, gives {100 * most['fraction']:.1f} %, chance "
        f"{100 * evaluation['chance']:.1f} %"
    )


def _resolution(evaluation: Mapping[str, Any]) -> str:
    """What so many images can tell."""
    count = evaluation["num_images"]
    low, high = wilson_interval(count // 2, count)
    changed = round(evaluation["smallest_difference"] * count)
    if changed > count:
        return f"{count} images are too few to tell any two channel sets apart."
    return (
        f"What {count:,} images can tell: an accuracy to within {50 * (high - low):.1f} points; "
        f"differences between channel sets under {100 * evaluation['smallest_difference']:.1f} "
        f"points ({changed} images) say nothing. Intervals are of 95 % and cover the choice of "
        f"images, not of seeds; differences are paired, on the same images."
    )


def _points(difference: Mapping[str, float] | None) -> str:
    """A paired difference in points with its interval; empty where there is none."""
    return "" if difference is None else str(Difference(**difference))


# The page -----------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """A table: first column to the left, numbers to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


#: A heading (starts with #), a paragraph, lines of a list, or a table.
_Block = str | list[str] | _Table


def _page(results: Mapping[str, Any]) -> list[_Block]:
    """Everything that the page says, in order."""
    evaluation, data = results["evaluation"], results["data"]
    first, *_ = evaluation["sets"]
    sentence = headline(results)
    others = ", ".join(f"{m.partition('_')[0]} {Estimate(**first[m])}" for m in METRICS[1:])
    blocks: list[_Block] = [
        f"# {results['model']['name']} on {Path(data['name']).name}",
        f"**A{sentence[1:]}.**",
        _resolution(evaluation),
        f"Means over classes: {others}. {_trained(results)}",
        "## Channel sets",
        _sets_table(evaluation),
        _notes(evaluation),
    ]
    if evaluation["bands"]:
        blocks += ["## Which channels matter", *_bands(evaluation)]
    if len(evaluation["sizes"]) > 1:
        blocks += ["## By number of channels", _size_table(evaluation)]
    return [*blocks, "## Classes", *_classes(evaluation, data["class_names"])]


def _trained(results: Mapping[str, Any]) -> str:
    training, machine, config = results["training"], results["machine"], results["config"]
    where = f"{machine['num_processes']} x {machine['device']}"
    if training is None:
        return f"Evaluated on {where}."
    return (
        f"Trained on {results['data']['num_images']['train']} images for {training['epochs']} "
        f"epochs, channels `{config['channel_aug']}`, seed {config['seed']}, on {where}."
    )


def _sets_table(evaluation: Mapping[str, Any]) -> _Table:
    """Accuracy in per cent with intervals, and what is lost against all channels."""
    sets, shown = evaluation["sets"], evaluation["sets"]
    if len(sets) > MAX_ROWS:
        shown = [s for s in sets if s["kind"] in ("all", "natural", "asked")][:MAX_ROWS]
    has_unexplained = any(s["unexplained"] is not None for s in sets)
    rows = [
        [
            _row_name(s, sets),
            str(Estimate(**s["accuracy"])),
            _points(s["loss"]),
            *(["" if (e := s["unexplained"]) is None else f"{e:.2f}"] if has_unexplained else []),
            *([_points((s["baseline"] or {}).get("difference"))] if evaluation["baseline"] else []),
        ]
        for s in shown
    ]
    head = ["channels", "accuracy", "lost against all"]
    head += ["unexplained"] if has_unexplained else []
    head += [f"minus {evaluation['baseline']}"] if evaluation["baseline"] else []
    return _Table(head, rows)


def _row_name(entry: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> str:
    """The set, with what tells it from other rows of the same set."""
    parts = [entry["name"]]
    parts += [entry["mode"]] if len({s["mode"] for s in sets}) > 1 else []
    parts += [entry["order"]] if entry["order"] != sets[0]["order"] else []
    return ", ".join(parts)


def _bands(evaluation: Mapping[str, Any]) -> Iterable[_Block]:
    """Channels whose loss is certain, a line about the others, and what each does alone."""
    tested = [b for b in evaluation["bands"] if b["loss_without"]]
    certain = [b for b in tested if not b["loss_without"]["low"] <= 0 <= b["loss_without"]["high"]]
    rows = [[b["name"], _points(b["loss_without"])] for b in certain[:MAX_ROWS]]
    if rows:
        yield _Table(["without", "lost (points)"], rows)
    rest = [b["name"] for b in tested if b not in certain]
    if rest:
        any_of = "" if certain else "any single one of "
        yield (
            f"No difference that these {evaluation['num_images']:,} images can tell without "
            f"{any_of}{', '.join(rest)}."
        )
    alone = [b for b in evaluation["bands"] if b["alone"]]
    alone.sort(key=lambda b: (-b["alone"]["value"], b["index"]))
    if alone:
        rows = [
            [b["name"], str(Estimate(**b["alone"])), _like(b["alone"], alone[0], evaluation)]
            for b in alone[:MAX_ROWS]
        ]
        yield _Table(["alone", "accuracy", "may be no other than"], rows)


def _like(
    estimate: Mapping[str, float], best: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> str:
    """What an accuracy cannot be told from: the best channel's, or that of knowing nothing."""
    if estimate["low"] <= evaluation["most_frequent"]["fraction"]:
        return "the most frequent class"
    is_near = estimate["high"] >= best["alone"]["low"] and estimate is not best["alone"]
    return str(best["name"]) if is_near else ""


def _size_table(evaluation: Mapping[str, Any]) -> _Table:
    """Accuracy in per cent by number of channels: mean, worst and best set, and which."""
    first = evaluation["sets"][0]
    series = first["mode"], first["order"]
    summaries = [s for s in evaluation["sizes"] if (s["mode"], s["order"]) == series]
    rows = [
        [
            str(s["size"]), f"{s['num_sets']} of {s['num_possible']:,}", f"{100 * s['mean']:.1f}",
            f"{100 * s['worst']:.1f} to {100 * s['best']:.1f}" if s["num_sets"] > 1 else "",
            s["worst_set"][:24] if s["num_sets"] > 1 else "",
        ]
        for s in spread(summaries, MAX_ROWS)
    ]  # fmt: skip
    return _Table(["number", "sets", "mean", "worst to best", "worst set"], rows)


def _classes(evaluation: Mapping[str, Any], names: Sequence[str]) -> Iterable[_Block]:
    """Counts of every class on all channels; of many classes those that are recognised worst."""
    counts = class_counts(evaluation["confusion"], names)
    shown = counts
    if len(counts) > MAX_CLASSES:
        shown = sorted(counts, key=lambda c: c.num_right / c.num_images)[:MAX_CLASSES]
        yield f"The {len(shown)} of {len(counts)} classes that are recognised worst."
    rows = []
    for c in shown:
        interval = wilson_interval(c.num_right, c.num_images)
        recall = Estimate(c.num_right / c.num_images, *interval)
        numbers = map(str, (c.num_images, c.num_right, recall, c.num_said))
        rows.append([c.name, *numbers, c.mistaken_for])
    head = ["class", "images", "right", "recall, % (interval)", "said", "mistaken for"]
    yield _Table(head, rows)


def _notes(evaluation: Mapping[str, Any]) -> list[str]:
    """What is to be said of the figures, a line each."""
    notes = []
    bad = [s for s in evaluation["sets"] if s["num_not_finite"]]
    if bad:
        named = ", ".join(f"{s['name']} {s['num_not_finite']}" for s in bad[:5])
        notes.append(
            f"**Logits that are not finite** (counted as wrong) in {len(bad)} sets; images: {named}"
        )
    score = evaluation["robustness"]
    if score is not None:
        worst = score["worst_loss"]
        notes.append(
            f"Robustness: {100 * score['uniform_mean']:.1f} if first the number of channels is "
            f"drawn, then which (all channels: {100 * score['full']:.1f})"
            + (f"; worst single loss {_points(worst)}, {score['worst_channel']}." if worst else ".")
        )
    check = evaluation["order_check"]
    if check is not None:
        verdict = "the same answer" if check["equal"] else "**ANOTHER answer**"
        notes.append(
            f"Order: {verdict} with the planes of {check['num_images']} images in another order "
            f"(logits of up to {check['scale']:.3g} differ by {check['difference']:.1g})."
        )
    if evaluation["foretold"] is not None:
        notes.append(
            f"Unexplained: the fraction of the variance of the model's virtual channels that a set "
            f"does not explain. Over all sets its rank correlation with the loss of accuracy is "
            f"{evaluation['foretold']:.2f}; it ranks many sets, not single channels."
        )
    return notes


def metrics_table(results: Mapping[str, Any]) -> str:
    """Accuracy on the channel sets that people know, as Markdown."""
    evaluation = results["evaluation"]
    note = f"Per cent of {evaluation['num_images']:,} {evaluation['split']} images."
    return f"{note}\n\n{_markdown_table(_sets_table(evaluation))}"


def markdown_page(results: Mapping[str, Any]) -> str:
    """`results.md` from the content of `results.json`: a page that reads well as text too."""
    parts = []
    for block in _page(results):
        if isinstance(block, _Table):
            parts.append(_markdown_table(block))
        elif isinstance(block, list):
            parts.append("\n".join(f"- {line}" for line in block))
        else:
            parts.append(block)
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: _Table) -> str:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * w if i == 0 else "-" * max(1, w - 1) + ":" for i, w in enumerate(widths)]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        first, *others = zip(row, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join(lines)


# HTML ---------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem }
img { max-width: 100%; background: white }
div.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #8884; text-align: right }
th, td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
div.wrong { display: flex; flex-wrap: wrap; gap: .8rem }
figure { margin: 0; width: 8rem; font-size: .75rem; overflow-wrap: anywhere }
figure img { width: 7rem; height: 7rem; object-fit: contain; image-rendering: pixelated }
"""


class WrongImage(NamedTuple):
    """An image that was classified wrongly: its file, a small JPEG, what it is, what was said."""

    name: str
    thumbnail: bytes
    text: str


def html_page(
    results: Mapping[str, Any],
    pictures: Sequence[Path] = (),
    wrong: Sequence[WrongImage] = (),
) -> str:
    """`results.html`: the same page in one file that needs no other, its pictures (PNG) in it."""
    body = []
    for block in _page(results):
        if isinstance(block, _Table):
            body.append(_html_table(block))
        elif isinstance(block, list):
            body.append(f"<ul>{''.join(f'<li>{_inline(line)}</li>' for line in block)}</ul>")
        elif block.startswith("#"):
            level = len(block) - len(block.lstrip("#"))
            body.append(f"<h{level}>{_inline(block[level:].strip())}</h{level}>")
        else:
            body.append(f"<p>{_inline(block)}</p>")
    for path in pictures:
        body.append(f'<p><img src="{_data_uri(path.read_bytes(), "png")}" alt="{path.stem}"></p>')
    if wrong:
        body.append("<h2>Wrong answers</h2><p>The surest first.</p>")
        body.append(f'<div class="wrong">{"".join(map(_figure, wrong))}</div>')
    title = html.escape(results["model"]["name"])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _inline(text: str) -> str:
    """Escaped text with the bold and code of Markdown."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def _html_table(table: _Table) -> str:
    head, *rows = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in (("th", table.header), *(("td", row) for row in table.rows))
    )
    lines = "".join(f"<tr>{row}</tr>\n" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{lines}</table></div>'


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _figure(wrong: WrongImage) -> str:
    return (
        f'<figure><img src="{_data_uri(wrong.thumbnail, "jpeg")}" alt="">'
        f"<figcaption>{html.escape(wrong.name)}<br>{html.escape(wrong.text)}</figcaption></figure>"
    )


def wrong_images(
    predictions: Predictions, images: ImageSplit, channels: ChannelSet
) -> list[WrongImage]:
    """The images that all channels got wrong, the surest mistakes first, at most `MAX_WRONG`."""
    found, names = [], [*predictions.class_names, "no answer"]
    wrong = np.flatnonzero(~predictions.right(0))
    sure = np.nan_to_num(predictions.probabilities[wrong, 0], nan=-1.0)
    for i in wrong[np.argsort(-sure, kind="stable")][:MAX_WRONG]:
        answer, true = int(predictions.classes[i, 0]), int(predictions.references[i])
        buffer = io.BytesIO()
        picture = Image.fromarray(picture_of(images[int(i)][0], channels))
        picture.resize((_THUMBNAIL, _THUMBNAIL)).save(buffer, "JPEG", quality=80)
        sureness = f" {predictions.probabilities[i, 0]:.0%}" if answer >= 0 else ""
        text = f"{names[true]}, said {names[answer] if answer >= 0 else names[-1]}{sureness}"
        found.append(WrongImage(images.name(int(i)), buffer.getvalue(), text))
    return found


# Files --------------------------------------------------------------------------------------------


def write_results(
    results: Mapping[str, Any],
    evaluated: Evaluated,
    folder: Path,
    channels: ChannelSet,
    images: ImageSplit | None = None,
) -> list[Path]:
    """Write everything that people look at: pages, table of sets, predictions and pictures.

    Args:
        results: The content of `results.json`.
        evaluated: What it was made of.
        folder: Where to.
        channels: All channels of the data.
        images: The evaluated images; without them the page shows none.

    Returns:
        The files, those for a saved model's folder: tables and pictures.
    """
    sets, names = evaluated.sets, results["data"]["class_names"]
    evaluation = results["evaluation"]
    title = f"{results['model']['name']} on {Path(results['data']['name']).name}"
    levels = {"most frequent class": evaluation["most_frequent"]["fraction"]}
    theirs = {
        tuple(s["indices"]): s["baseline"]["accuracy"] for s in evaluation["sets"] if s["baseline"]
    }
    pictures = [
        plot_channel_sets(sets, folder / "channel_sets.png", title, baseline=theirs, levels=levels)
    ]
    if evaluation["bands"]:
        pictures.append(plot_bands(sets, folder / "bands.png", title, levels=levels))
    pictures.append(plot_confusion(sets[0], names, folder / "confusion.png", title))
    if results["training"] is not None:
        history = results["training"]["history"]
        pictures.append(plot_curves(history, folder / "curves.png", levels=levels))
    evaluated.predictions.save(folder / PREDICTIONS)
    wrong = [] if images is None else wrong_images(evaluated.predictions, images, channels)
    for name, text in (
        ("results.md", markdown_page(results)),
        ("results.html", html_page(results, pictures, wrong)),
    ):
        (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    _write_sets(results, folder / "sets.csv")
    return [folder / "results.md", folder / "results.html", folder / "sets.csv", *pictures]


def _write_sets(results: Mapping[str, Any], path: Path) -> None:
    """`sets.csv`: a line for every set, mode and order."""
    rows = []
    for entry in results["evaluation"]["sets"]:
        row = {k: v for k, v in entry.items() if not isinstance(v, (dict, list)) and v is not None}
        row["indices"] = "+".join(map(str, entry["indices"]))
        for name in (*METRICS, "loss"):
            row |= _columns(name, entry[name] or {})
        if entry["baseline"]:
            row |= _columns("baseline", entry["baseline"]["accuracy"])
            row |= _columns("minus_baseline", entry["baseline"]["difference"])
        rows.append(row)
    write_rows(rows, path)


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file with a column for every name in the rows."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def _columns(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """A column for each part of an estimate or a difference, the first under the name alone."""
    return {
        name if key in ("value", "difference") else f"{name}_{key}": value
        for key, value in values.items()
    }

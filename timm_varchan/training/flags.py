"""From the command line to a configuration."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from timm_varchan.training.configuration import GROUPS, MARK, TrainConfig, flag
from timm_varchan.training.launch import stop
from timm_varchan.training.recipes import RECIPES

__all__ = ["parse_args"]


def parse_args(args: Sequence[str] | None = None) -> TrainConfig:
    """The configuration of a command line, `sys.argv` by default.

    With `--resume` the flags of the run in the output folder hold where none is given.

    Raises:
        SystemExit: Wrong flags or values, after saying which.
    """
    parser = _parser(_defaults(args))
    values: dict[str, Any] = vars(parser.parse_args(args))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return TrainConfig(**values)
    except ValueError as error:
        parser.error(str(error))


def _defaults(args: Sequence[str] | None) -> TrainConfig:
    """What holds where no flag says otherwise: the run to resume, a recipe, or the usual."""
    first = _Parser(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--resume", "--output-dir"):
        first.add_argument(name)
    given = first.parse_known_args(args)[0]
    mark = Path(given.output_dir or TrainConfig.output_dir) / MARK
    if given.resume not in (None, "none") and mark.is_file():
        try:
            return TrainConfig.from_json(json.loads(mark.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            first.error(f"{mark} holds no run ({error}). Choose another --output-dir.")
    return RECIPES[given.recipe]() if given.recipe in RECIPES else TrainConfig()


def _parser(defaults: TrainConfig) -> argparse.ArgumentParser:
    """An argument parser with a flag for every field."""
    parser = _Parser(
        usage="%(prog)s [--recipe {" + ",".join(RECIPES) + "}] [--FLAG VALUE ...]",
        description="Train a model for any number of channels, then test it on every channel set.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    groups = {name: parser.add_argument_group(name, text) for name, text in GROUPS.items()}
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        options = _argument(field, hints[field.name])
        options["default"] = getattr(defaults, field.name)
        groups[field.metadata["group"]].add_argument(flag(field.name), **options)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, which is the last also under a launcher."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message.rstrip('.')}. All flags: python hf_train.py --help", code=2)


class _Help(argparse.HelpFormatter):
    """Shows the defaults that are some."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS, (), {}):
            return text
        if default is False or isinstance(action, argparse.BooleanOptionalAction):
            return f"{text} ({'on' if default else 'off'})"
        shown = " ".join(map(_short, default)) if isinstance(default, tuple) else _short(default)
        return f"{text} ({shown})".replace("%", "%%")


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _argument(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """The keywords of `add_argument` for a field of some type."""
    choices = tuple(RECIPES) if field.name == "recipe" else field.metadata["choices"]
    options: dict[str, Any] = {"help": field.metadata["help"]}
    optional = type(None) in get_args(hint)
    kind = next(t for t in get_args(hint) if t is not type(None)) if optional else hint
    if kind is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if str(kind).startswith("dict"):
        return options | {"action": _KeyValues, "nargs": "*", "metavar": "NAME=VALUE"}
    if str(kind).startswith("tuple"):
        parts = get_args(kind)
        options["nargs"] = "*" if parts[-1] is Ellipsis else len(parts)
        kind = parts[0]
    if choices is not None:
        return options | {"choices": choices, "metavar": "{" + ",".join(choices) + "}"}
    options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
    return options | {"type": _or_none(kind) if optional else kind}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type whose value may be 'none', which takes back what a recipe says."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = getattr(kind, "__name__", "value")
    return convert


class _KeyValues(argparse.Action):
    """Collects `name=value`; values are Python literals, else text."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        result = {}
        for item in values:
            name, separator, text = item.partition("=")
            if not separator:
                parser.error(f"{option_string} {item!r} needs the form name=value.")
            try:
                result[name] = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                result[name] = text
        setattr(namespace, self.dest, result)

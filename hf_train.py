"""Train a model for any number of channels and evaluate it on every channel set.

python hf_train.py                        one process
accelerate launch hf_train.py             as `accelerate config`, or --config_file configs/*.yaml
"""

import dataclasses
import logging
import os
import shlex
import sys
from pathlib import Path

from timm_varchan.cards import write_card
from timm_varchan.errors import UserError
from timm_varchan.hub import push
from timm_varchan.training import (
    CheckpointError,
    Interrupted,
    NonFiniteLossError,
    markdown_report,
    parse_args,
    run,
    to_args,
)


def main(args: list[str] | None = None) -> None:
    """Parse, train, evaluate, report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    config = parse_args(args)
    try:
        outcome = run(config)
    except (UserError, NonFiniteLossError, CheckpointError) as error:
        raise SystemExit(f"hf_train: {_one_line(error)}") from error
    except Interrupted:
        if os.environ.get("RANK", "0") == "0":
            flags = shlex.join(to_args(dataclasses.replace(config, resume="auto")))
            print("Stopped; a checkpoint is saved. Launch as before to resume, with:")
            print(f"{sys.argv[0]} {flags}", flush=True)
        return
    if outcome.is_main:
        print(f"\n{markdown_report(outcome.results)}\nEverything is in {outcome.folder}/")
        if config.push_to_hub is not None:
            _push(outcome.folder / "model", config.push_to_hub, private=not config.push_public)


def _one_line(error: Exception) -> str:
    """The text of an error, also where a worker met it and torch added its traceback."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.rstrip().splitlines()[-1].partition("Error: ")[2]


def _push(folder: Path, repo_id: str, *, private: bool) -> None:
    """Push the saved model with its card; what goes wrong is said with the command to repeat it."""
    try:
        write_card(folder, source=f"hf-hub:{repo_id}")
        print(push(folder, repo_id, private=private, commit_message="Trained with timm_varchan"))
    except (OSError, UserError) as error:
        raise SystemExit(f"hf_train: {error}") from error


if __name__ == "__main__":
    main()

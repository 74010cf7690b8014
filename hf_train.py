"""Train a model for any number of channels and evaluate it on every channel set.

python hf_train.py                        one process
accelerate launch hf_train.py             as `accelerate config`, or --config_file configs/*.yaml
"""

import io
import logging
import os
import shlex
import sys
from pathlib import Path

from timm_varchan.cards import write_card
from timm_varchan.errors import MissingExtraError, UserError
from timm_varchan.hub import push

try:
    from timm_varchan.results import markdown_page
    from timm_varchan.training import (
        CheckpointError,
        Interrupted,
        NonFiniteLossError,
        closing,
        parse_args,
        run,
        stop,
    )
except MissingExtraError as error:
    raise SystemExit(f"hf_train: {error}") from None


def main(args: list[str] | None = None) -> None:
    """Parse, train, evaluate, report."""
    for stream in (sys.stdout, sys.stderr):  # names that a console's code page lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    config = parse_args(args)
    try:
        outcome = run(config)
    except (UserError, NonFiniteLossError, CheckpointError) as error:
        stop(_one_line(error))
    except Interrupted:
        if os.environ.get("RANK", "0") == "0":
            print("Stopped; a checkpoint is saved. Launch as before to resume, with:")
            again = [sys.argv[0], "--output-dir", config.output_dir, "--resume", "auto"]
            print(shlex.join(again), flush=True)
        return
    if outcome.is_main:
        print(f"\n{markdown_page(outcome.results)}\n{closing(outcome.results, outcome.folder)}")
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
        stop(str(error))


if __name__ == "__main__":
    main()

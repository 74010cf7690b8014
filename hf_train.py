"""Train a model for any number of channels and evaluate it on every channel set.

python hf_train.py                        one process
accelerate launch hf_train.py             as `accelerate config`, or --config_file configs/*.yaml
"""

import dataclasses
import logging
import os
import shlex
import sys

from timm_varchan.training import (
    CheckpointError,
    Interrupted,
    NonFiniteLossError,
    SetupError,
    accuracy_table,
    parse_args,
    run,
    size_table,
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
    except (SetupError, NonFiniteLossError, CheckpointError) as error:
        raise SystemExit(f"hf_train: {error}") from error
    except Interrupted:
        if os.environ.get("RANK", "0") == "0":
            flags = shlex.join(to_args(dataclasses.replace(config, resume="auto")))
            print("Stopped; a checkpoint is saved. Launch as before to resume, with:")
            print(f"{sys.argv[0]} {flags}", flush=True)
        return
    if outcome.is_main:
        print(f"\n{accuracy_table(outcome.sets)}\n\n{size_table(outcome.sets)}\n")
        print(f"Accuracy in per cent, 95 % intervals. Everything is in {outcome.folder}/")


if __name__ == "__main__":
    main()

"""`python -m timm_varchan measure DATA`: mean, deviation and correlation of a data set's channels.

`hf_train.py` measures them itself where they are not known; measured once and written to a file,
every run uses the same: `hf_train.py --channels channels.json`. The file says what stored numbers
were divided by. `python -m timm_varchan.data.measure` is the same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from timm_varchan.channels import write_channels
from timm_varchan.data.dataset import load_data, measure_split
from timm_varchan.data.decode import NO_DATA
from timm_varchan.errors import UserError

__all__ = ["main"]


def main(
    argv: Sequence[str] | None = None, prog: str = "python -m timm_varchan.data.measure"
) -> int:
    """Measure, print, write; errors that a user can cure are one line."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("data", help="folder, Parquet or list file, or hub name")
    parser.add_argument("--channels", help="planes of the files, as GB or B02+B08")
    parser.add_argument("--value-scale", type=float, help="divide stored numbers by this, as 10000")
    parser.add_argument("--no-data", default="refuse", choices=NO_DATA, help="pixels without data")
    parser.add_argument("--image-column", help="column of the images")
    parser.add_argument("--label-column", help="column of the labels")
    parser.add_argument("--train-split", help="what the source calls its training split")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out unreadable images")
    parser.add_argument("--num-images", type=int, default=1000, help="images to look at (1000)")
    parser.add_argument("--output", help="JSON file to write, for hf_train.py --channels")
    try:
        _run(parser.parse_args(argv))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    data = load_data(
        args.data,
        channels=args.channels,
        image_column=args.image_column,
        label_column=args.label_column,
        splits={} if args.train_split is None else {"train": args.train_split},
        skip_corrupt=args.skip_corrupt,
        value_scale=args.value_scale,
        no_data=args.no_data,
    )
    split = data.train or data.validation or data.test
    assert split is not None  # load_data refuses data without any
    channels, invalid = measure_split(split, args.num_images)
    for channel, share in zip(channels, invalid, strict=True):
        without = f"  no data in {share:.2%}" if share else ""
        print(f"{channel.label:12} mean {channel.mean:.5g}  std {channel.std:.5g}{without}")
    if args.output:
        print(write_channels(channels.with_scale(args.value_scale), args.output))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m timm_varchan.data.measure` is the command `timm-varchan measure`."""

import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the channels of data; the words after the command's name by default."""
    command = importlib.import_module("timm_varchan.__main__")  # it knows us, not we it
    return int(command.main(["measure", *(sys.argv[1:] if argv is None else argv)]))


if __name__ == "__main__":
    sys.exit(main())

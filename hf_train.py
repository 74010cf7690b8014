"""Train a model for any number of channels: the command `timm-varchan train` as a script.

python hf_train.py                        one process
accelerate launch hf_train.py             as `accelerate config`, or --config_file configs/*.yaml
"""

import sys

from timm_varchan.__main__ import main

if __name__ == "__main__":
    words = sys.argv[1:]
    command = ["train", *words]
    if "--eval-only" in words:  # the command `evaluate` by an older name
        at = words.index("--eval-only")
        left = iter(words[:at] + words[at + 2 :])
        kept = [word for word in left if word != "--mixed-precision" or not next(left, "")]
        command = ["evaluate", *words[at + 1 : at + 2], *kept]
    sys.exit(main(command))

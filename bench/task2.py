r"""Task II: networks of a few layers against a ResNet34, all from scratch.

Trains timm's ResNet34, the RRDB family and variants of it (`ARMS`) on the same data with the same
budget and recipe. ResNet34 and `rrdb_rnn_small` each get their own learning rate from a small
search on training images that are set aside for it; variants take that of `rrdb_rnn_small`.
Each run is written to `--output` as soon as it is finished and is not repeated.

    python bench/task2.py run --data DIR --output runs/task2
    python bench/task2.py report --output runs/task2 --json bench/results/0.1.0/task2.json

Variants are compared with each other by shorter runs; `search-*.json` may be copied:

    python bench/task2.py run --data DIR --output runs/task2_short --epochs 4 \
        --arms rrdb_rnn_small no-recurrence attention graph 1-step no-gates one-gate 6-steps
    python bench/task2.py report --output runs/task2_short --reference rrdb_rnn_small \
        --json bench/results/0.1.0/task2_short.json

Weights for the package:

    python bench/task2.py weights --data DIR --output runs/task2 --arm rrdb_rnn_small \
        --folder timm_varchan/weights

`--data` is a folder with `train.parquet` and `validation.parquet` (columns `image`, `label`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from arms_cli import add_report_arguments, add_run_arguments, unfinished
from finished_runs import read_runs, run_path, write_run
from safetensors.torch import load_file, save_file, save_model
from small_images import Images, class_names, fit, load
from task2_arms import ARMS, BAR, OWN, TWIN, Arm, build, predict, test_views
from task2_report import report
from torch import Tensor, nn

from timm_varchan import RGB
from timm_varchan.evaluation import wilson_interval
from timm_varchan.training import DrawKey, draw_channels

#: The search starts in the middle and goes on while an end of what was tried is the best.
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
#: Of each class, for the search to be judged on; the final runs train on them too.
NUM_ASIDE = 40
#: At most so many test images for the curves; the results are of all.
MAX_CURVE = 1000


def train(
    arm: Arm, data: Images, held_out: Images, args: argparse.Namespace, *, lr: float, epochs: int,
    seed: int,
) -> tuple[nn.Module, list[dict[str, float]]]:  # fmt: skip
    """Train one arm; the model, and by epoch the loss and the accuracies."""
    torch.manual_seed(seed)
    model = build(arm, args.num_classes)
    view = test_views(arm, seed)[0]
    every = -(-len(held_out.y) // MAX_CURVE)
    few = Images(held_out.x[::every], held_out.y[::every])
    labels = few.y.numpy()

    def prepare(x: Tensor, epoch: int, step: int) -> Tensor:
        key = DrawKey(seed, epoch, step)
        view = draw_channels(arm.aug, x, RGB, key, identity="named")
        view.tell(model)
        return view.planes

    def evaluate() -> float:
        return 100 * float((predict(model, few, [view])["RGB"] == labels).mean())

    history = fit(
        model, data, lr=lr, epochs=epochs, warmup_epochs=epochs / 10, seed=seed, prepare=prepare,
        evaluate=evaluate, bfloat16=args.bfloat16,
    )  # fmt: skip
    return model, history


def next_rate(tried: Mapping[float, float]) -> float | None:
    """The learning rate to try next: beside the best one, if that is at an end of those tried."""
    if not tried:
        return LEARNING_RATES[len(LEARNING_RATES) // 2]
    best = LEARNING_RATES.index(max(tried, key=lambda lr: tried[lr]))
    beside = [i for i in (best - 1, best + 1) if 0 <= i < len(LEARNING_RATES)]
    return next((LEARNING_RATES[i] for i in beside if LEARNING_RATES[i] not in tried), None)


def search(name: str, images: Images, args: argparse.Namespace) -> dict[float, float]:
    """Accuracy by learning rate after a short training, on training images set aside."""
    file = args.output / f"search-{name}.json"
    tried: dict[float, float] = {}
    if file.exists():
        tried = {float(lr): value for lr, value in json.loads(file.read_text()).items()}
    aside, others = images.split(NUM_ASIDE)
    while (lr := next_rate(tried)) is not None:
        print(f"{name}: trying learning rate {lr:g}", flush=True)
        _, history = train(
            ARMS[name], others, aside, args, lr=lr, epochs=args.search_epochs, seed=0
        )
        tried[lr] = history[-1]["test_accuracy"]
        file.write_text(json.dumps(tried) + "\n")
    return tried


def run(args: argparse.Namespace) -> None:
    """Train and test every arm and seed that has no result yet."""
    for name, seed, target, images, held_out in unfinished(args):
        arm = ARMS[name]
        source = args.rate_of or (name if arm.search else OWN)
        tried = search(source, images, args)
        lr = max(tried, key=lambda lr: tried[lr])
        print(f"{name}, seed {seed}, learning rate {lr:g}: {len(images.y)} training images")
        start, busy = time.perf_counter(), time.process_time()
        model, history = train(arm, images, held_out, args, lr=lr, epochs=args.epochs, seed=seed)
        details = {"lr": lr, "lr_of": source, "tried": tried,
                   "seconds": time.perf_counter() - start,
                   "cpu_seconds": time.process_time() - busy}  # fmt: skip
        results = predict(model, held_out, test_views(arm, seed))
        keys = ("num_classes", "img_size", "epochs", "search_epochs", "bfloat16")
        meta = {key: getattr(args, key) for key in keys}
        meta |= {"training_images": len(images.y), "test_images": len(held_out.y)}
        save_model(model, str(target.with_suffix(".safetensors")))
        write_run(target, meta=meta, history=history, labels=held_out.y.numpy(),
                  predictions=results, details=details)  # fmt: skip


def weights(args: argparse.Namespace) -> None:
    """Write the weights of an arm in half precision, and the note that describes them."""
    one = read_runs(args.output, ARMS)[args.arm][0]
    settings, arm = json.loads(one.meta), ARMS[args.arm]
    model = build(arm, settings["num_classes"]).eval()
    state = load_file(run_path(args.output, args.arm, 0).with_suffix(".safetensors"))
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(half)
    size = settings["img_size"]
    images = load(args.data, settings["num_classes"], size)[1]
    # behind the training images that were set aside: the validation split
    validation = Images(*(v[settings["num_classes"] * 100 :] for v in (images.x, images.y)))
    labels = validation.y.numpy()
    results = {}
    for key, predicted in predict(model, validation, test_views(arm, 0)).items():
        low, high = wilson_interval(int((predicted == labels).sum()), len(labels))
        value = float((predicted == labels).mean())
        results[key] = {"value": 100 * value, "low": 100 * low, "high": 100 * high}
    reduced = size // model.feature_info[-1]["reduction"]
    note = {
        "tag": f"tin{settings['num_classes']}_{size}",
        "pretrained_cfg": {
            "num_classes": settings["num_classes"], "input_size": [3, size, size],
            "pool_size": [reduced, reduced], "crop_pct": 1.0, "interpolation": "bilinear",
            "mean": RGB.mean, "std": RGB.std, "license": "other",
            "label_names": class_names(args.data)[: settings["num_classes"]],
        },
        "data": f"{settings['training_images']} images of {settings['num_classes']} classes of "
                f"Tiny-ImageNet-200, reduced to {size} px; {settings['epochs']} epochs",
        "licence": "for research, as the images of ImageNet",
        "num_validation_images": len(labels),
        "results": results,
    }  # fmt: skip
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(half, args.folder / f"{arm.architecture}.safetensors")
    (args.folder / f"{arm.architecture}.json").write_text(json.dumps(note, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run", help="search learning rates, train and test")
    add_run_arguments(runs, ARMS, epochs=20)
    runs.add_argument("--search-epochs", type=int, default=2)
    runs.add_argument("--rate-of", choices=[BAR, OWN],
                      help="take its learning rate instead of an own search")  # fmt: skip
    runs.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True,
                      help="train with autocast")  # fmt: skip
    runs.set_defaults(func=run)
    reports = commands.add_parser("report", help="tables of all finished runs")
    add_report_arguments(reports)
    reports.add_argument("--reference", choices=list(ARMS), default=BAR, help="to compare with")
    reports.add_argument("--rounds", type=int, default=30, help="timed steps of each network")
    reports.set_defaults(func=report)
    ship = commands.add_parser("weights", help="weights of a finished run, for the package")
    ship.add_argument("--data", type=Path, required=True, help="folder with the Parquet files")
    ship.add_argument("--output", type=Path, required=True, help="folder of the runs' results")
    ship.add_argument("--arm", choices=[OWN, TWIN], required=True)
    ship.add_argument("--folder", type=Path, required=True, help="timm_varchan/weights")
    ship.set_defaults(func=weights)
    args = parser.parse_args()
    args.func(args)


if __name__ == "__main__":
    main()

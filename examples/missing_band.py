"""A model you have, made for five bands: a band drops out, and nothing is trained again."""

import argparse

import timm
import torch

import timm_varchan
from timm_varchan.data import SYNTHETIC_CHANNELS, eval_transform, load_data

BANDS = "R+G+B+NIR+SWIR1"


def main(args: list[str] | None = None) -> None:
    """Measure the bands, adapt the model, ask what a missing band costs, predict without it."""
    argparse.ArgumentParser(description=__doc__).parse_args(args)
    images = load_data("synthetic", limit=100).train
    prepare = eval_transform(64, SYNTHETIC_CHANNELS, crop_pct=1.0)
    batch = torch.stack([prepare(images[i][0]) for i in range(len(images))])

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", in_chans=5, num_classes=10).eval()  # yours is trained
    before = model(batch[:8])

    known = timm_varchan.measure_channels([batch], BANDS)  # or a loader of training batches
    timm_varchan.adapt(model, virtual_channels=BANDS, channel_stats=known)
    same = (model(batch[:8]) - before).abs().max().item()
    print(f"all bands: answers differ by {same:.1g} from those of the model as it was")

    left = "R+G+B+SWIR1"  # the near infrared failed
    for band, share in timm_varchan.unexplained_variance(model, left).items():
        print(f"{band:5} {share:.0%} of its variance is not explained by {left}")
    timm_varchan.set_channels(model, left)
    answers = model(batch[:8, [0, 1, 2, 4]])
    print(f"without NIR: {answers.shape[0]} answers, as many classes as before: {answers.shape[1]}")


if __name__ == "__main__":
    main()

"""A camera fails in production: the same model goes on with the channels that are left.

Images with different channels share a batch; absent planes may hold anything, NaN too.
"""

import argparse

import timm
import torch

import timm_varchan
from timm_varchan import ChannelSet

CHANNELS = ChannelSet.parse("R+G+B+NIR")


def main(args: list[str] | None = None) -> None:
    """Classify a batch in which some images lack channels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", action="store_true", help="timm's weights of ImageNet")
    pretrained = parser.parse_args(args).pretrained
    torch.manual_seed(0)
    model = timm.create_model("dwg_resnet18", pretrained=pretrained).eval()
    images = torch.randn(3, 4, 64, 64)
    alive = [(0, 1, 2, 3), (0, 1, 2), (3,)]  # the cameras that answered, for each image
    batch = torch.full_like(images, float("nan"))
    for sample, image, planes in zip(batch, images, alive, strict=True):
        sample[: len(planes)] = image[list(planes)]  # the planes that are there come first
    sets = [CHANNELS.take(planes) for planes in alive]
    with torch.inference_mode():
        together = timm_varchan.share(model, sets)(batch)
        for logits, image, channels in zip(together, images, sets, strict=True):
            alone = timm_varchan.share(model, channels)(image[None, list(CHANNELS.index(channels))])
            same = torch.allclose(logits, alone[0], atol=1e-4)
            print(f"{channels}: class {logits.argmax()}, as alone: {same}")


if __name__ == "__main__":
    main()

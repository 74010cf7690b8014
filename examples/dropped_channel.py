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
    alive = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]]).bool()  # which answered
    batch = images.masked_fill(~alive[:, :, None, None], float("nan"))
    together = timm_varchan.share(model, CHANNELS)
    timm_varchan.set_channels(together, CHANNELS, present=alive)
    with torch.inference_mode():
        for logits, image, there in zip(together(batch), images, alive, strict=True):
            planes = there.nonzero()[:, 0].tolist()
            channels = CHANNELS.take(planes)
            alone = timm_varchan.share(model, channels)(image[None, planes])
            same = torch.allclose(logits, alone[0], atol=1e-4)
            print(f"{channels}: class {logits.argmax()}, as alone: {same}")


if __name__ == "__main__":
    main()

"""Grayscale images on a model that was trained on RGB, without copying them to three planes."""

import argparse

import timm
import torch

import timm_varchan


def main(args: list[str] | None = None) -> None:
    """One plane gives what timm gives for the plane copied three times, at a third of the input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", action="store_true", help="timm's weights of ImageNet")
    pretrained = parser.parse_args(args).pretrained
    torch.manual_seed(0)
    base = timm.create_model("resnet18", pretrained=pretrained).eval()
    model = timm.create_model("dwg_resnet18").eval()
    model.load_state_dict(base.state_dict())  # or create_model("dwg_resnet18", pretrained=True)
    gray = torch.randn(2, 1, 64, 64)
    fixed = timm_varchan.fold(model, [None])  # a plain resnet18 with one input channel
    with torch.inference_mode():
        expected = base(gray.expand(-1, 3, -1, -1))
        print(f"difference from timm: {(model(gray) - expected).abs().max():.1e}")
        print(f"folded, {fixed.conv1.weight.shape[1]} channel: ", end="")
        print(f"{(fixed(gray) - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()

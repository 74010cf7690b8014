"""Sentinel-2 bands on a backbone that was trained on RGB photographs.

Every band is told by name; the kernels of the photographs serve the nearest colour from the start,
and training (here thirty steps on made-up reflectances) finds out what the infrared is good for.
"""

import argparse

import timm
import torch
import torch.nn.functional as F

import timm_varchan

BANDS = "B02+B03+B04+B08+B11"


def reflectances(num_images: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bare soil (0) and plants (1): alike in colour, apart in the infrared."""
    labels = torch.arange(num_images) % 2
    x = 0.1 + 0.02 * torch.randn(num_images, 5, size, size)
    x[:, 3] += 0.3 * labels[:, None, None]  # B08, 833 nm
    return (x - 0.15) / 0.1, labels


def main(args: list[str] | None = None) -> None:
    """Train a little, then classify with all bands and without the infrared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", action="store_true", help="timm's weights of ImageNet")
    pretrained = parser.parse_args(args).pretrained
    torch.manual_seed(0)
    model = timm.create_model("dwg_resnet18", pretrained=pretrained, num_classes=2)
    timm_varchan.set_channels(model, BANDS)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(30):
        x, labels = reflectances(16, 32)
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        print(f"step {step}: loss {loss.item():.3f}")
    model.eval()
    x, labels = reflectances(64, 32)
    rgb = timm_varchan.share(model, "B02+B03+B04")
    with torch.inference_mode():
        print(f"{BANDS}: {(model(x).argmax(1) == labels).float().mean():.0%} right")
        print(f"B02+B03+B04: {(rgb(x[:, :3]).argmax(1) == labels).float().mean():.0%} right")


if __name__ == "__main__":
    main()

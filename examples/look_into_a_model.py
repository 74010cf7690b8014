"""What the stem of a model makes of images with different content, as in docs/stem.png.

python examples/look_into_a_model.py --model runs/synthetic/model --output stem.png
"""

import argparse

import torch

from timm_varchan import hub, plots
from timm_varchan.data import TransformedSplit, eval_transform, load_data


def main(args: list[str] | None = None) -> None:
    """Draw three classes of the package's own synthetic images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dwg_test_resnet", help="name, folder or hf-hub:...")
    parser.add_argument("--pretrained", action="store_true", help="with weights, if by name")
    parser.add_argument("--output", default="stem.png", help="picture to write")
    options = parser.parse_args(args)
    torch.manual_seed(0)
    trained = options.pretrained or "/" in options.model
    saved = hub.load(options.model, pretrained=trained)
    data = load_data("synthetic", limit=10)  # one image a class
    transform = eval_transform(saved.spec.img_size, data.channels, crop_pct=saved.spec.crop_pct)
    images = TransformedSplit(data.validation, transform)
    shown = {data.class_names[label]: image for image, label in map(images.__getitem__, range(10))}
    classes = ("vegetation", "snow", "red_roof")
    plots.plot_stem(
        saved.model,
        torch.stack([shown[name] for name in classes]),
        data.channels,
        options.output,
        sets=[data.channels.index(channels) for channels in (data.channels, "RGB", "B")],
        names=classes,
    )
    print(options.output)


if __name__ == "__main__":
    main()

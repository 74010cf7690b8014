"""Embeddings of images with any channels, in a pipeline of scikit-learn."""

import argparse

import numpy as np
import timm
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

import timm_varchan


def main(args: list[str] | None = None) -> None:
    """Fit a linear classifier on embeddings of four bands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", action="store_true", help="timm's weights of ImageNet")
    pretrained = parser.parse_args(args).pretrained
    torch.manual_seed(0)
    model = timm.create_model("dwg_resnet18", pretrained=pretrained, num_classes=0).eval()
    timm_varchan.set_channels(model, "B02+B03+B04+B08")

    @torch.inference_mode()
    def embed(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    labels = np.arange(60) % 2
    rng = np.random.default_rng(0)
    images = rng.normal(size=(60, 4, 32, 32)) + labels[:, None, None, None]
    images = images.astype(np.float32)
    pipeline = make_pipeline(
        FunctionTransformer(embed), StandardScaler(), LogisticRegression(max_iter=1000)
    )
    pipeline.fit(images[:40], labels[:40])
    print(f"{pipeline.score(images[40:], labels[40:]):.0%} right")


if __name__ == "__main__":
    main()

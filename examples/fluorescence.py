"""Stains of a fluorescence microscope, by name.

A stain with an emission wavelength is a channel like any other. What has no wavelength (here phase
contrast) gets a code of its own, that the model learns: `channel_names`.
"""

import argparse

import timm
import torch

import timm_varchan


def main(args: list[str] | None = None) -> None:
    """Embed the same cells with all stains and with those that another laboratory has."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", action="store_true", help="timm's weights of ImageNet")
    pretrained = parser.parse_args(args).pretrained
    torch.manual_seed(0)
    timm_varchan.register_channel("DNA", wavelength_nm=461)  # Hoechst
    timm_varchan.register_channel("ER", wavelength_nm=519)  # concanavalin A, Alexa Fluor 488
    timm_varchan.register_channel("AGP", wavelength_nm=565)  # phalloidin, Alexa Fluor 568
    timm_varchan.register_channel("phase")  # no wavelength: its name has to be learned
    model = timm.create_model(
        "dwg_resnet18", pretrained=pretrained, num_classes=0, channel_names=["phase"]
    ).eval()
    cells = torch.rand(4, 4, 64, 64)
    whole = timm_varchan.share(model, "DNA+ER+AGP+phase")
    with torch.inference_mode():
        reference = whole(cells)
        for stains, planes in (("DNA+ER+AGP", [0, 1, 2]), ("DNA+phase", [0, 3]), ("DNA", [0])):
            embedded = timm_varchan.share(model, stains)(cells[:, planes])
            similar = torch.cosine_similarity(reference, embedded).mean()
            print(f"{stains}: cosine similarity {similar:.3f} to all four")


if __name__ == "__main__":
    main()

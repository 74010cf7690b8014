"""Only those kernels of the bank whose channels are there."""

from timm_varchan.stems.known import KnownMixer

__all__ = ["SliceMixer"]


class SliceMixer(KnownMixer):
    """Convolves each channel with its own kernel of the bank: `W = bank[:, ids]`.

    The same as planes of zeros for absent channels, without any rescaling. The bank holds one
    kernel for each virtual channel; build the model with `in_chans=` and name `virtual_channels`
    for more of them than RGB.

    Source: SliceParam of CHAMMI, arXiv:2310.19224, without class embeddings.
    """

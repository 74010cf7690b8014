"""Where a virtual channel gets its content from before anything is learned."""

import math

import torch
from torch import Tensor

__all__ = ["nearest_prior"]


def nearest_prior(wavelengths_nm: Tensor, present: Tensor, virtual_nm: Tensor) -> Tensor:
    """Coefficients with which each virtual channel takes the channel nearest to it in wavelength.

    Ties are split evenly. Channels without a wavelength get 0, unless no channel of the set (or no
    virtual channel) has one: then every virtual channel takes the mean of the channels.

    Args:
        wavelengths_nm: `(S, P)`, in nm, NaN where a channel has none.
        present: `(S, P)`, whether the row is a channel of the set.
        virtual_nm: `(K,)`, in nm, NaN where a virtual channel has none.

    Returns:
        `(S, P, K)`, summing to 1 over the present channels of each set.
    """
    known = present & ~wavelengths_nm.isnan()
    distance = (wavelengths_nm[:, :, None] - virtual_nm).abs()
    distance = distance.masked_fill(~known[:, :, None], math.inf)
    nearest = (distance <= distance.amin(1, keepdim=True) + 1e-6) & known[:, :, None]
    by_mean = ~known.any(1)[:, None, None] | virtual_nm.isnan()
    chosen = torch.where(by_mean, present[:, :, None], nearest).to(wavelengths_nm.dtype)
    return chosen / chosen.sum(1, keepdim=True)

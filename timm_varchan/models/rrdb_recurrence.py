"""A recurrent convolution that widens the receptive field on a shallow map."""

from typing import Any

import torch
from timm.layers import create_act_layer
from torch import Tensor, nn

from timm_varchan.errors import UserError

__all__ = ["GATINGS", "ConvRecurrence"]

#: Number of gates by name: none is a plain recurrent convolution, minimal has one gate for both
#: purposes (MGU, arXiv:1603.09420), gru has an update and a reset gate.
GATINGS = {"none": 0, "minimal": 1, "gru": 2}


def _convolution(
    in_chs: int, out_chs: int, kernel_size: int, separable: bool, bias: bool, **dd: Any
) -> nn.Module:
    """A convolution that keeps height and width, whole or depthwise followed by 1x1."""
    padding = kernel_size // 2
    if not separable:
        return nn.Conv2d(in_chs, out_chs, kernel_size, padding=padding, bias=bias, **dd)
    return nn.Sequential(
        nn.Conv2d(in_chs, in_chs, kernel_size, padding=padding, groups=in_chs, bias=False, **dd),
        nn.Conv2d(in_chs, out_chs, 1, bias=bias, **dd),
    )


class ConvRecurrence(nn.Module):
    """A gated recurrent unit whose products are convolutions, run on one map for a few steps.

    With the input map x and the state h, which starts as x:

        z, r = sigmoid(W_g x + U_g h)      update and reset gates
        c    = act(W_c x + U_c (r h))      candidate
        h   <- (1 - z) h + z c

    All steps share their weights, so parameters do not grow with the steps, while each step widens
    the receptive field by `2 * (kernel_size - 1)` pixels of the map with reset gates, else by half
    of that. What the input adds is computed once.

    Source: ConvGRU, Ballas et al., arXiv:1511.06432, section 3; there the input is a video, here
    the same map at every step. Separable convolutions: arXiv:1610.02357.

    Args:
        dim: Channels of the map.
        steps: How often the state is renewed, at least 1.
        kernel_size: Of the convolutions of the state, odd.
        gating: Key of `GATINGS`.
        separable: Depthwise followed by 1x1 instead of whole convolutions.
        act_layer: Activation of the candidate.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        UserError: No steps, an even kernel, or an unknown gating.
    """

    def __init__(
        self,
        dim: int,
        steps: int = 3,
        kernel_size: int = 3,
        gating: str = "gru",
        separable: bool = True,
        act_layer: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if gating not in GATINGS:
            raise UserError(f"Unknown gating {gating!r}. Choose one of: {', '.join(GATINGS)}.")
        if steps < 1 or kernel_size % 2 == 0:
            raise UserError(
                f"steps={steps}, kernel_size={kernel_size}: give at least one step and an odd size."
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim, self.steps, self.num_gates = dim, steps, GATINGS[gating]
        self.input = nn.Conv2d(dim, (self.num_gates + 1) * dim, 1, **dd)
        self.candidate = _convolution(dim, dim, kernel_size, separable, bias=False, **dd)
        self.gates: nn.Module | None = None
        if self.num_gates:
            out_chs = self.num_gates * dim
            self.gates = _convolution(dim, out_chs, kernel_size, separable, bias=False, **dd)
        self.act = create_act_layer(act_layer)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """The update gate starts at 0.27, so that a part of the input passes through all steps."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        bias = self.input.bias
        assert bias is not None
        nn.init.zeros_(bias)
        if self.num_gates:
            nn.init.constant_(bias[self.dim : 2 * self.dim], -1)

    @torch.jit.ignore
    def longest_path(self) -> list[nn.Module]:
        """The modules that the state goes through, once for each step."""
        one = [*self.candidate.modules()]
        one += self.gates.modules() if self.gates is not None else []
        return one * self.steps

    def forward(self, x: Tensor) -> Tensor:
        """Renew the state `steps` times; `(B, dim, H, W)` in and out."""
        given = self.input(x)
        h = x
        for _ in range(self.steps):
            if self.gates is not None:
                gates = torch.sigmoid(given[:, self.dim :] + self.gates(h))
                # with one gate both slices are that gate
                update, reset = gates[:, : self.dim], gates[:, -self.dim :]
                c = self.act(given[:, : self.dim] + self.candidate(reset * h))
                h = h + update * (c - h)
            else:
                h = self.act(given[:, : self.dim] + self.candidate(h))
        return h

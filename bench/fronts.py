"""What could stand in the recurrence's place before the blocks: self-attention, graph convolution.

Both look at the whole map at once and are about as large as the recurrence. They are measured by
`bench/task2.py` and are no part of the package.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def feed_forward(dim: int) -> nn.Module:
    """Two 1x1 convolutions."""
    return nn.Sequential(
        nn.BatchNorm2d(dim), nn.Conv2d(dim, dim, 1), nn.GELU(), nn.Conv2d(dim, dim, 1)
    )


class SelfAttention(nn.Module):
    """A transformer block on the pixels of a map `(B, dim, H, W)`.

    Source: arXiv:1706.03762; positions by a depthwise convolution, arXiv:2102.10882.
    """

    def __init__(self, dim: int, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.out = nn.Conv2d(dim, dim, 1)
        self.feed_forward = feed_forward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        B, D, H, W = x.shape
        x = x + self.position(x)
        qkv = self.qkv(self.norm(x)).reshape(B, 3, self.num_heads, D // self.num_heads, H * W)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(B, D, H, W)
        x = x + self.out(mixed)
        return x + self.feed_forward(x)


class GraphConvolution(nn.Module):
    """A max-relative graph convolution over each pixel's most similar pixels, `(B, dim, H, W)`.

    Source: vision GNN, arXiv:2206.00272, section 3.2.
    """

    def __init__(self, dim: int, num_neighbours: int = 9) -> None:
        super().__init__()
        self.num_neighbours = num_neighbours
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = nn.BatchNorm2d(dim)
        self.inner = nn.Conv2d(dim, dim, 1)
        self.out = nn.Conv2d(2 * dim, dim, 1)
        self.feed_forward = feed_forward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        B, D, H, W = x.shape
        x = x + self.position(x)
        nodes = self.inner(self.norm(x)).flatten(2)  # (B, D, N)
        with torch.no_grad():
            unit = F.normalize(nodes, dim=1)
            nearest = (unit.transpose(1, 2) @ unit).topk(min(self.num_neighbours, H * W)).indices
        rows = nearest.reshape(B, 1, -1).expand(B, D, -1)
        neighbours = nodes.gather(2, rows).reshape(B, D, H * W, -1)
        relative = (neighbours - nodes[..., None]).amax(-1)
        x = x + self.out(torch.cat([nodes, relative], 1).reshape(B, 2 * D, H, W))
        return x + self.feed_forward(x)


FRONTS = {"attention": SelfAttention, "graph": GraphConvolution}

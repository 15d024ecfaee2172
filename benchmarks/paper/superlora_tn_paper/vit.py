"""The small pre-trained vision transformer of the data folder: CIFAR-10, 811,146 parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Vit(nn.Module):
    """A vision transformer of torch's own layers, images (batch, 3, 32, 32) -> logits (batch, 10).

    Its state dict is that of ``weights_vit_cifar10``. Those weights were trained with dropout 0.1; here it is a choice.
    """

    def __init__(
        self, dim: int = 128, depth: int = 6, heads: int = 8, hidden: int = 256, patch: int = 4, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, (32 // patch) ** 2 + 1, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, hidden, dropout=dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 10))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        logits: Tensor = self.mlp_head(self.transformer(x)[:, 0])
        return logits

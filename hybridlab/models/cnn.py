"""The convolutional network of the plan's MNIST table."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


class MnistCNN(nn.Module):
    """Two convolutions and two dense layers for 28 x 28 gray images: 1,199,882 parameters.

    image 1x28x28 -> conv 32x26x26 -> conv 64x24x24 -> max-pool 64x12x12 -> dense 128 -> logits 10

    conv_dropout: probability of dropping a feature between the pool and the dense layer
    dense_dropout: probability of dropping a feature before the logits
    """

    def __init__(self, conv_dropout: float = 0.0, dense_dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.conv_dropout = nn.Dropout(conv_dropout)
        self.dense = nn.Linear(64 * 12 * 12, 128)
        self.dense_dropout = nn.Dropout(dense_dropout)
        self.head = nn.Linear(128, 10)

    def forward(
        self, images: Float[Tensor, "batch 1 28 28"], labels: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch 10"] | Float[Tensor, ""]:
        """Logits of the ten classes; with labels, their mean cross-entropy in nats instead."""
        x = F.relu(self.conv2(F.relu(self.conv1(images))))
        x = rearrange(F.max_pool2d(x, 2), "batch channel row column -> batch (channel row column)")
        x = F.relu(self.dense(self.conv_dropout(x)))
        logits: Tensor = self.head(self.dense_dropout(x))
        return logits if labels is None else F.cross_entropy(logits.float(), labels)

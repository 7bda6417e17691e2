"""The guide's task of one's own: the next byte of a text, by a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TEXT = b"The quick brown fox jumps over the lazy dog. " * 40


class Bytes:
    batch_size, block_size = 8, 16

    def __init__(self, seed: int, device: torch.device) -> None:
        text = torch.tensor(list(TEXT), device=device)
        self.held_out, self.training, self.seed = text[:200], text[200:], seed
        layers = (nn.Embedding(256, 16), nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 256))
        self.model = nn.Sequential(*layers).to(device)

    def windows(self, text: Tensor, seed: int) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - self.block_size, (self.batch_size,), generator=draws)
        windows = torch.stack([text[start : start + self.block_size + 1] for start in starts])
        return {"tokens": windows[:, :-1], "targets": windows[:, 1:]}

    def batch(self, step: int) -> dict[str, Tensor]:
        return self.windows(self.training, 10_000 * self.seed + step)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, Tensor]:
        assert not model.training
        losses = [self.loss(model, self.windows(self.held_out, seed)) for seed in range(4)]
        return {"validation_loss": torch.stack(losses).mean()}


class WithoutLoss:
    batch_size = 8

    def __init__(self, seed: int, device: torch.device) -> None:
        self.model = nn.Linear(1, 1)

    def batch(self, step: int) -> Tensor:
        return torch.ones(8, 1)


class WithoutValidation(Bytes):
    def evaluate(self, model: nn.Module) -> dict[str, Tensor]:
        return {"accuracy": torch.tensor(1.0)}

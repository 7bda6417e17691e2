"""WNN+, the network of NiNo without its graph: the loss at the weights that it predicts, horizon by horizon.

git clone https://github.com/SamsungSAILMontreal/nino
python docs/experiments/nowcasting.py nino/checkpoints/nino_mlp.pt nino/checkpoints/nino_mlp_h32.pt

trains a small GPT-2 with AdamW at a constant rate (minutes on a core), asks each network for the weights of 1 to 40
intervals later, writes the losses there beside this file, and prints the table of docs/experiments.md.

Source: Knyazev et al. 2025 (arXiv 2409.04434); the weights of the networks are under the MIT license.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybridlab.memory import MemoryConfig
from hybridlab.optim import OptimizerConfig, Schedule, build_optimizer, set_lr_
from hybridlab.study import TextTaskConfig
from hybridlab.study.statistics import formatted

STEPS, STATES, HORIZONS = 1000, 5, (1, 2, 5, 10, 20, 40)
INTERVALS = (25, 50, 100, 200)
"""Steps between two states; the publication's is 200."""

MATRIX, OTHER, NORM, EMBEDDING, POSITION, QUERY = 1, 2, 4, 5, 6, 7
"""Kinds of weights, as the network numbers them; key and value follow the query."""


class Nowcaster(nn.Module):
    """A weight after k intervals, from its last five values, each by itself.

        w[t + k] = w[t] + s MLP_k(W x + b + e)        x = (w[t - 4] ... w[t] - m) / s

    m, s: mean and deviation of the weight's whole tensor over all five states; e: the embedding of its kind
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.weights: dict[str, Tensor] = torch.load(file, weights_only=True)["state_dict"]

    def layer(self, name: str, x: Tensor) -> Tensor:
        """One linear layer of the file."""
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def forward(self, states: Tensor, kinds: Tensor) -> Tensor:
        """Displacements [weight, horizon] after 1 to 40 intervals; states: [weight, state], kinds: [weight]."""
        deviation = states.std()
        x = (states - states.mean()) / (deviation + 1e-6)
        x = self.layer("edge_proj.fc.0", x) + self.weights["layer_embed.weight"][kinds]
        for i in (0, 2, 4):
            x = F.silu(self.layer(f"edge_mlp.fc.{i}", x))
        return deviation * self.layer("edge_mlp.fc.6", x)


def kinds_of(name: str, weight: Tensor) -> Tensor:
    """The kind of each number of a weight; query, key and value lie one below the other in one matrix."""
    kinds = torch.full_like(weight, OTHER, dtype=torch.long)
    if weight.ndim < 2:
        return kinds.fill_(NORM) if name.endswith("weight") else kinds
    if "c_attn" in name:
        for i, third in enumerate(kinds.chunk(3)):
            third.fill_(QUERY + i)
        return kinds
    return kinds.fill_({"wte.weight": EMBEDDING, "wpe.weight": POSITION}.get(name, MATRIX))


def trained(model: nn.Module, task: Any) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train, and give a copy of the weights at each 25th step."""
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3))
    schedule = Schedule("constant", warmup_steps=20, total_steps=STEPS)
    for step in range(STEPS):
        set_lr_(optimizer, schedule(step))
        optimizer.zero_grad()
        task.loss(model, task.batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % INTERVALS[0] == 0:
            yield step + 1, {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def losses_ahead(task: Any, past: list[dict[str, Tensor]], network: Nowcaster) -> list[float]:
    """Validation loss at the predicted weights of each horizon; past: the states, the newest last."""
    ahead: dict[str, Tensor] = {}
    for name, newest in past[-1].items():
        states = torch.stack([state[name].flatten() for state in past], dim=1)
        moved = network(states, kinds_of(name, newest).flatten())[:, [k - 1 for k in HORIZONS]]
        ahead[name] = newest + moved.T.reshape(-1, *newest.shape)
    return [loss_at(task, {name: tensor[i] for name, tensor in ahead.items()}) for i in range(len(HORIZONS))]


@torch.no_grad()
def loss_at(task: Any, weights: dict[str, Tensor]) -> float:
    """Validation loss of the model with these weights."""
    for name, p in task.model.named_parameters():
        p.copy_(weights[name])
    return float(task.evaluate(task.model)["validation_loss"])


def measured(files: list[str]) -> list[dict[str, Any]]:
    """A row per network, interval and step at which it is asked."""
    task = TextTaskConfig(
        "micro", vocab_size=2048, block_size=64, batch_size=8, validation_batches=8, max_bytes=4_000_000
    ).build(0, torch.device("cpu"), MemoryConfig())
    states = dict(trained(task.model, task))
    rows = []
    for interval in INTERVALS:
        for step in (interval * STATES, STEPS):
            past = [states[step - interval * i] for i in reversed(range(STATES))]
            now = loss_at(task, past[-1])
            for file in files:
                ahead = losses_ahead(task, past, Nowcaster(file))
                rows.append(
                    {"network": Path(file).stem, "interval": interval, "step": step, "now": now, "ahead": ahead}
                )
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = measured(sys.argv[1:])
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"| network | interval | asked at step | loss there | {' | '.join(f'{k} ahead' for k in HORIZONS)} |")
    print("|---" * (4 + len(HORIZONS)) + "|")
    for row in found:
        changes = " | ".join(formatted(loss - row["now"], "+.3f") for loss in row["ahead"])
        print(f"| {row['network']} | {row['interval']} | {row['step']} | {row['now']:.3f} | {changes} |")

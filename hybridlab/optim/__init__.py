"""Builds optimizers: AdamW, Muon, SGD, low-bit state, state on the host, steps inside backward."""

from hybridlab.optim.build import OptimizerConfig, Schedule, build_optimizer, decay_groups, hidden_matrices, set_lr_

__all__ = ["OptimizerConfig", "Schedule", "build_optimizer", "decay_groups", "hidden_matrices", "set_lr_"]

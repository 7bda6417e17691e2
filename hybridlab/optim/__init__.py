"""Builds optimizers: AdamW, Muon, SGD, low-bit state, state on the host, steps inside backward."""

from hybridlab.optim.averaging import PrimalAveraging, averaged_weights
from hybridlab.optim.build import OptimizerConfig, Schedule, build_optimizer, decay_groups, hidden_matrices, set_lr_
from hybridlab.optim.host_adamw import HostAdamW
from hybridlab.optim.in_backward import StepInBackward
from hybridlab.optim.low_bit import low_bit_adamw

"""The settings of everything that lets a model train in less memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from hybridlab.base.errors import UserError
from hybridlab.base.settings import check_bounds, check_choice, check_types
from hybridlab.optim import OptimizerConfig

TRAINING_FORMATS = ("fp32", "bf16")
PREDICT_FORMATS = ("fp32", "bf16", "bf16_weights")
STRATEGIES = ("none", "cpu", "pinned", "compress", "drop")
STATE_FORMATS = ("fp32", "int8", "fp8", "int4")
WEIGHTS = ("fp32", "bf16", "24bit")
INPUTS = ("card", "host")
CLIP_NORM = 1.0
"""Of gradients, wherever nobody asks for another."""


@dataclass(frozen=True)
class MixedPrecisionConfig:
    """In which number format each phase computes.

    training: of Warmup, Full and Correct: "fp32", or "bf16" for autocast over float32 weights
    predict: of Predict: the same two, or "bf16_weights": weights in bf16 on the GPU, the float32 ones in the jump's
        rollback snapshot on the host, to which its motions are added, so that no rounding adds up

    Raises TypeError and ValueError that name the setting and its remedy.
    """

    training: str = "bf16"
    predict: str = "bf16"

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("training", self.training, TRAINING_FORMATS)
        check_choice("predict", self.predict, PREDICT_FORMATS)

    @classmethod
    def conservative(cls) -> Self:
        """bf16 autocast in every phase; weights stay float32 on the GPU."""
        return cls("bf16", "bf16")

    @classmethod
    def aggressive(cls) -> Self:
        """bf16 autocast, and only bf16 weights on the GPU in Predict."""
        return cls("bf16", "bf16_weights")


@dataclass(frozen=True)
class GradientAccumulationConfig:
    """Split each batch into `micro_batches` equal parts, and add their gradients up before the optimizer steps."""

    micro_batches: int = 2

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, "micro_batches", least=1)

    @classmethod
    def conservative(cls) -> Self:
        """Two parts."""
        return cls(2)

    @classmethod
    def aggressive(cls) -> Self:
        """Four parts."""
        return cls(4)


@dataclass(frozen=True)
class PredictAwareMemoryConfig:
    """What becomes of the optimizer's state in Predict, where no optimizer steps.

    strategy: "none" leaves it; "cpu" and "pinned" move it to host memory, pinned memory without waiting; "compress"
        keeps it on the GPU in 8 bits (inexact); "drop" throws it away, so that the optimizer starts anew (inexact)
    lookahead: nominal steps before a jump's end at which the return begins, beside the predicted steps. Weights that
        left too come back with the last of several motions, and the state then with them. 0 leaves all of it away
        until the jump is over
    release: hand what was freed back to the GPU, for others to use; False keeps it in torch's cache, which is quicker

    Raises TypeError and ValueError that name the setting and its remedy.
    """

    strategy: str = "pinned"
    lookahead: int = 5
    release: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        check_choice("strategy", self.strategy, STRATEGIES)
        check_bounds(self, "lookahead", least=0)

    @classmethod
    def conservative(cls) -> Self:
        """Exact: to pinned host memory and back."""
        return cls("pinned")

    @classmethod
    def aggressive(cls) -> Self:
        """Eight bits, on the GPU: nothing crosses the bus."""
        return cls("compress")


@dataclass(frozen=True)
class CheckpointingConfig:
    """Recompute the activations of every block in the backward pass, but of the last `keep_last`.

    inputs: where what they are computed from waits: "card", on the GPU, or "host", copied there and back beside the
        computation

    Raises TypeError and ValueError that name the setting and its remedy.
    """

    keep_last: int = 0
    inputs: str = "card"

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, "keep_last", least=0)
        check_choice("inputs", self.inputs, INPUTS)


@dataclass(frozen=True)
class MemoryConfig:
    """Which memory features a training uses; each is off at its default, and they combine freely or are refused.

    mixed_precision, gradient_accumulation, predict_aware, checkpointing: see their classes; None is off
    loss_chunk_tokens: tokens whose logits exist at a time; 0 keeps those of the whole batch
    pad_vocab_to: round the vocabulary up to a multiple of this, for kernels and quantizers; 0 leaves it to the model
    optimizer_state: format of AdamW's moments: "fp32", or torchao's "int8", "fp8" or "int4"
    step_in_backward: step each block's weights as soon as its gradients are there, and free these. Slopes are not known
        then, nor with `state_on_host`: a jump is not corrected after it
    clip_in_backward: with `step_in_backward`, gradient norm above which gradients are scaled down, estimated while
        they arrive (`hybridlab.optim.in_backward`); None leaves them alone
    state_on_host: gradients and optimizer state live in host memory, where AdamW steps
    weights: "fp32"; "bf16" with stochastic rounding, or, with `state_on_host`, with float32 masters on the host;
        "24bit": bf16, and 8 further bits of each weight beside the low-bit state, which the optimizer's step counts in

    Raises TypeError and ValueError that name the setting and its remedy, or the two that do not go together, and why.
    """

    mixed_precision: MixedPrecisionConfig | None = None
    gradient_accumulation: GradientAccumulationConfig | None = None
    predict_aware: PredictAwareMemoryConfig | None = None
    checkpointing: CheckpointingConfig | None = None
    loss_chunk_tokens: int = 0
    pad_vocab_to: int = 0
    optimizer_state: str = "fp32"
    step_in_backward: bool = False
    clip_in_backward: float | None = None
    state_on_host: bool = False
    weights: str = "fp32"

    @classmethod
    def conservative(cls, **changes: Any) -> Self:
        """Nothing that changes a result by more than rounding: bf16 autocast, chunked loss, exact offload."""
        preset: dict[str, Any] = {
            "mixed_precision": MixedPrecisionConfig.conservative(),
            "predict_aware": PredictAwareMemoryConfig.conservative(),
            "loss_chunk_tokens": 1024,
        }
        return cls(**preset | changes)

    @classmethod
    def aggressive(cls, **changes: Any) -> Self:
        """Every feature that trades time or optimizer precision for memory, with float32 weights."""
        preset: dict[str, Any] = {
            "mixed_precision": MixedPrecisionConfig.aggressive(),
            "predict_aware": PredictAwareMemoryConfig("pinned"),
            "gradient_accumulation": GradientAccumulationConfig.aggressive(),
            "checkpointing": CheckpointingConfig(),
            "loss_chunk_tokens": 1024,
            "pad_vocab_to": 128,
            "optimizer_state": "int8",
        }
        return cls(**preset | changes)

    @classmethod
    def fit_16gb(cls, **changes: Any) -> Self:
        """GPT-2 XL in 16 GB: 24-bit weights and a 4-bit state, in steps that a CUDA graph can hold whole.

        With weights="fp32" the weights are exact. Both are for plain training and for predicted depth. With
        `predict_aware` it is the preset of runs that predict in time: float32 weights, an 8-bit state, and in Predict
        only bf16 weights on the GPU; inputs of blocks wait on the host.
        """
        preset: dict[str, Any] = {
            "mixed_precision": MixedPrecisionConfig.conservative(),
            "checkpointing": CheckpointingConfig(),
            "loss_chunk_tokens": 512,
            "pad_vocab_to": 128,
            "optimizer_state": "int4",
            "step_in_backward": True,
            "clip_in_backward": CLIP_NORM,
            "weights": "24bit",
        }
        if changes.get("predict_aware"):
            preset |= {"mixed_precision": MixedPrecisionConfig.aggressive(), "weights": "fp32"}
            preset |= {"checkpointing": CheckpointingConfig(inputs="host"), "optimizer_state": "int8"}
        return cls(**preset | changes)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant, and what cannot work together."""
        check_types(self)
        check_bounds(self, "loss_chunk_tokens", "pad_vocab_to", least=0)
        check_bounds(self, "clip_in_backward", above=0)
        check_choice("optimizer_state", self.optimizer_state, STATE_FORMATS)
        check_choice("weights", self.weights, WEIGHTS)
        refuse_conflicts(self._conflicts())

    def _conflicts(self) -> dict[str, bool]:
        """Which settings cannot work together, why, and whether they are set."""
        state, strategy = self.optimizer_state, self.predict_strategy
        low_bit, weights = state != "fp32", self.weights
        return {
            "step_in_backward does not go with gradient_accumulation: gradients are gone before they could add up; "
            "leave one of them off": self.step_in_backward and self.gradient_accumulation is not None,
            "step_in_backward does not go with state_on_host: the host steps when all gradients have arrived; "
            "leave one of them off": self.step_in_backward and self.state_on_host,
            "clip_in_backward does not go with step_in_backward=False: with all gradients at hand, clip by their own "
            "norm: set the trainer's clip_norm": self.clip_in_backward is not None and not self.step_in_backward,
            f"state_on_host does not go with optimizer_state={state!r}: host memory is large enough for float32; "
            "leave one of them off": self.state_on_host and low_bit,
            f"state_on_host does not go with predict_aware strategy={strategy!r}: the state has left the GPU already; "
            "leave one of them off": self.state_on_host and strategy in ("cpu", "pinned", "compress"),
            f"optimizer_state={state!r} does not go with predict_aware strategy='compress': the state is compressed "
            "already; use strategy='pinned' or 'none'": low_bit and strategy == "compress",
            f"weights={weights!r} does not go with mixed_precision predict='bf16_weights': no float32 ones are on "
            "the GPU to offload; use predict='bf16'": self.lowers_weights and self.offloads_weights,
            "weights='bf16' does not go with optimizer_state='fp32': plain rounding would swallow small updates; use "
            "optimizer_state='int8', or state_on_host=True": weights == "bf16" and not (low_bit or self.state_on_host),
            "weights='24bit' does not go with optimizer_state='fp32': it is part of a state in few bits; use "
            "optimizer_state='int8'": weights == "24bit" and not low_bit,
        }

    @property
    def predict_strategy(self) -> str:
        """What becomes of the optimizer's state in Predict."""
        return self.predict_aware.strategy if self.predict_aware else "none"

    def refuse_optimizer(self, optimizer: OptimizerConfig) -> None:
        """Raise UserError for a method that the state's format and place are not made for.

        They are made for AdamW; Muon has its momentum in few bits too. A mean of the weights is float32, beside them.
        """
        name = optimizer.name
        if optimizer.average_decay and (self.state_on_host or self.weights != "fp32"):
            asked = "state_on_host" if self.state_on_host else f"weights={self.weights!r}"
            raise UserError(f"average_decay keeps a float32 mean on the GPU, beside float32 weights: leave {asked} off")
        plain = self.optimizer_state == "fp32" and not self.state_on_host
        muon_in_few_bits = name == "muon" and not self.state_on_host and self.weights == "fp32"
        if not (plain or name == "adamw" or muon_in_few_bits):
            few_bits = f"optimizer_state={self.optimizer_state!r} with weights={self.weights!r}"
            asked = "state_on_host" if self.state_on_host else few_bits
            raise UserError(f"{asked} goes with AdamW: set the optimizer's name to 'adamw', not {name!r}")

    @property
    def offloads_weights(self) -> bool:
        """Whether in Predict the GPU has only bf16 weights."""
        return self.mixed_precision is not None and self.mixed_precision.predict == "bf16_weights"

    @property
    def lowers_weights(self) -> bool:
        """Whether passes compute with weights that are bf16 themselves."""
        return self.weights != "fp32"

    @property
    def checkpoints_to_host(self) -> bool:
        """Whether what blocks are computed from waits in host memory."""
        return self.checkpointing is not None and self.checkpointing.inputs == "host"

    def low_bit_in_backward(self, optimizer: OptimizerConfig) -> bool:
        """Whether AdamW with a state in few bits steps inside backward.

        That state is made before the first step, and what changes from step to step is read from tensors.
        """
        low_bit_adamw = self.optimizer_state != "fp32" and optimizer.name == "adamw" and not optimizer.average_decay
        return self.step_in_backward and low_bit_adamw

    def without_cuda_graphs(self, optimizer: OptimizerConfig, *, predicts: bool) -> str | None:
        """Which of these settings a pass that is replayed as a CUDA graph does not allow; None where all go with it.

        predicts: whether steps leave a path that predictors read
        """
        stepping = self.low_bit_in_backward(optimizer) and self.weights != "bf16" and not predicts
        reasons = {
            "checkpointing sends inputs to the host": self.checkpoints_to_host,
            "step_in_backward takes each gradient away": self.step_in_backward and not stepping,
            "state_on_host takes each gradient away": self.state_on_host,
            "predict_aware moves weights": self.predict_aware is not None,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @property
    def of_one_process(self) -> list[str]:
        """Which of these settings several processes that train one model together cannot have."""
        features = {
            "memory.predict_aware": self.predict_aware is not None,
            "memory.step_in_backward": self.step_in_backward,
            "memory.state_on_host": self.state_on_host,
            f"memory.optimizer_state={self.optimizer_state!r}": self.optimizer_state != "fp32",
            f"memory.weights={self.weights!r}": self.weights != "fp32",
        }
        return [name for name, wanted in features.items() if wanted]

    @property
    def micro_batches(self) -> int:
        """Parts that each batch is split into."""
        return self.gradient_accumulation.micro_batches if self.gradient_accumulation else 1

    @property
    def model_settings(self) -> dict[str, int]:
        """What `GPT2Config` takes of these settings, where they ask for something."""
        asked = {"loss_chunk_tokens": self.loss_chunk_tokens, "pad_vocab_to": self.pad_vocab_to}
        return {name: value for name, value in asked.items() if value}


def refuse_conflicts(conflicts: Mapping[str, bool]) -> None:
    """Raise ValueError that says the first of these sentences that is true."""
    for sentence in (sentence for sentence, is_so in conflicts.items() if is_so):
        raise ValueError(sentence)

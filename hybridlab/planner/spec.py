"""What the planner is told: a training, and what a GPU takes beside its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from hybridlab.base.errors import UserError
from hybridlab.base.ranks import SHARDING, check_copies, check_sharing
from hybridlab.base.settings import check_bounds, check_types, fits
from hybridlab.depth import DepthSchedule
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.memory.config import MemoryConfig
from hybridlab.models import GPT2, GPT2Config
from hybridlab.optim import OptimizerConfig
from hybridlab.planner.architectures import CausalLM, language_model_loss
from hybridlab.weights.gram import PathNeeds
from hybridlab.weights.path import PathStorage

BatchShape = tuple[int, int]
"""Windows, and tokens in each."""

Model = str | GPT2Config | CausalLM | Callable[[], nn.Module]
"""The name of a GPT-2 size, its settings, a configuration of transformers, or what builds any module."""

Loss = Callable[[nn.Module, BatchShape], Tensor]


@dataclass(frozen=True)
class GpuOverhead:
    """What a GPU takes beside the tensors; rounded from what 18 runs took of an H200, and those of ranks from 9 more.

    workspace_bytes: that cuBLAS takes from torch's allocator for each thread that computes, of forward and of backward
    context_bytes: CUDA's context and the kernels that it loads, outside torch's allocator
    nccl_bytes: that NCCL takes besides, where ranks share a model or add gradients up; of one rank alone, too
    channel_bytes: and for its channels to other ranks
    """

    workspace_bytes: int = 32 * 2**20
    context_bytes: int = 850_000_000
    nccl_bytes: int = 530_000_000
    channel_bytes: int = 300_000_000

    def __post_init__(self) -> None:
        check_types(self)
        check_bounds(self, *(field.name for field in fields(self)), least=0)

    def of(self, *, ranks: int, sharded: bool) -> GpuOverhead:
        """The same with what NCCL takes in the context of ranks."""
        others = ranks > 1
        besides = (sharded or others) * self.nccl_bytes + others * self.channel_bytes
        return replace(self, context_bytes=self.context_bytes + besides)


def next_token_loss(module: nn.Module, batch: BatchShape) -> Tensor:
    """The loss of a language model that takes tokens and targets."""
    tokens = torch.zeros(batch, dtype=torch.long)
    return module(tokens, tokens)


@dataclass(frozen=True)
class TrainingSpec:
    """A training whose memory is to be planned.

    model: the name of a GPT-2 size, its settings, `causal_lm(...)`, or a function that builds any module
    batch: (windows, tokens); with gradient accumulation, one part of it is computed at a time
    memory, optimizer: their settings
    path, path_storage: what a predictor remembers and where (`predictor.needs(full_steps)`); None never predicts
    loss: makes the inputs and the loss of a module and a batch; None takes the model's own
    depth: its last stage is planned, with the snapshot of the stage before where there is one; blocks that take no
        part hold weights alone. None trains all from the start
    averages: whether the weights of the last steps are averaged (`hybridlab.weights.tail_average`)
    compiled: by torch.compile, which is planned block by block
    ranks: how many processes share the batch and the model; it is planned for the one with the most. 0 trains in one
        process, without any of what follows
    wrap, gather, copies, blocks_per_group, keep_gathered: as `RanksConfig` has them
    cuda_graphs: whether the passes of a compiled training are replayed as CUDA graphs, where `memory` allows it; models
        of transformers cannot be captured
    weight_cache: autocast's, which hybridlab never uses: for comparison with plain torch
    overhead: what the GPU takes beside tensors
    """

    model: Model
    batch: BatchShape
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    path: PathNeeds | None = None
    path_storage: PathStorage = field(default_factory=PathStorage)
    loss: Loss | None = None
    depth: DepthSchedule | None = None
    averages: bool = False
    compiled: bool = False
    cuda_graphs: bool = False
    weight_cache: bool = False
    ranks: int = 0
    wrap: str = "fsdp"
    gather: str = "fp32"
    copies: int = 1
    blocks_per_group: int = 1
    keep_gathered: bool = False
    overhead: GpuOverhead = field(default_factory=GpuOverhead)

    def changed(self, **settings: Any) -> TrainingSpec:
        """The same with other memory settings."""
        return replace(self, memory=replace(self.memory, **settings))

    def check(self) -> None:
        """Raise TypeError, ValueError or UserError for what makes no training; the message says what would."""
        self._check_kinds()
        memory, (windows, tokens) = self.memory, self.batch
        if min(self.batch) < 1:
            raise ValueError(f"batch={self.batch} is empty: give windows and tokens, such as (8, 512)")
        if (longest := self.longest) is not None and tokens > longest:
            name = "block_size" if isinstance(self._model, GPT2Config) else "max_position_embeddings"
            raise ValueError(
                f"a window of {tokens} tokens is longer than {name}={longest}: cut it to {longest}, as in "
                f"batch=({windows}, {longest}), on the command line --batch {windows}x{longest}"
            )
        if windows % self.parts:
            among = f" on each of {self.ranks} ranks" if self.ranks else ""
            raise ValueError(f"{windows} windows do not split into {memory.micro_batches} equal micro_batches{among}")
        memory.refuse_optimizer(self.optimizer)
        self._check_trainer()
        self._check_ranks()

    def _check_kinds(self) -> None:
        """Raise TypeError for a field that is of another type than it says."""
        if not fits(self.batch, BatchShape):
            raise TypeError(f"batch is {self.batch!r}: give windows and tokens, such as (8, 512)")
        if not (isinstance(self.model, str | GPT2Config | CausalLM) or callable(self.model)):
            raise TypeError(f"model is {self.model!r}: give a GPT-2 size, its settings, or what builds a module")
        kinds = get_type_hints(TrainingSpec)
        for name in kinds.keys() - {"batch", "model", "loss"}:
            if not fits(value := getattr(self, name), kind := kinds[name]):
                raise TypeError(f"{name} is {value!r}: {getattr(kind, '__name__', kind)} is wanted")

    def _check_trainer(self) -> None:
        """Raise what the trainer does for settings that it cannot have together."""
        checked = HybridTrainerConfig if self.path else HybridTrainerConfig.plain
        path_device = "host" if self.path_storage.on_host else "same"
        checked(memory=self.memory, depth=self.depth, path_device=path_device)

    def _check_ranks(self) -> None:
        check_bounds(self, "ranks", least=0)
        check_sharing(self)
        if not self.ranks:
            settings = {"wrap": "fsdp"} | SHARDING
            if any(getattr(self, name) != value for name, value in settings.items()):
                raise UserError(f"{', '.join(settings)} say how ranks share a model: give their number as ranks too")
            return
        check_copies(self.ranks, self.copies)
        numbers = self.memory.mixed_precision
        if self.gather == "bf16" and (numbers is None or numbers.training != "bf16"):
            raise UserError("gather='bf16' computes in bfloat16: set mixed_precision to it, too")
        features = self.memory.of_one_process
        if not self.is_sharded and self.depth:
            features.append("a depth schedule with wrap='ddp'")
        if features:
            raise UserError(f"on ranks these do not work yet: {', '.join(features)}. Leave them off")

    def build(self) -> nn.Module:
        """The module, a GPT-2 with what `memory` asks of it."""
        if not isinstance(model := self._model, GPT2Config):
            return model()
        return GPT2(replace(model, **self.memory.model_settings))

    def part_loss(self, module: nn.Module) -> Tensor:
        """The loss of one micro batch."""
        windows, tokens = self.batch
        own = language_model_loss if isinstance(self.model, CausalLM) else next_token_loss
        return (self.loss or own)(module, (windows // self.parts, tokens))

    @property
    def parts(self) -> int:
        """That a batch is split into, among the ranks and by each of them."""
        return self.memory.micro_batches * max(self.ranks, 1)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the model."""
        return self.ranks > 0 and self.wrap == "fsdp"

    @property
    def longest(self) -> int | None:
        """Tokens per window that the model takes; None where it sets no limit, or it is unknown."""
        if isinstance(self._model, GPT2Config):
            return self._model.block_size
        return self._model.longest if isinstance(self._model, CausalLM) else None

    @property
    def stages(self) -> dict[int, TrainingSpec]:
        """Blocks that take part in each stage of its depth -> the same, as it is from there on."""
        if self.depth is None:
            return {}
        ends = range(1, len(self.depth.stages) + 1)
        begun = [replace(self.depth, stages=self.depth.stages[:end], shallow=True) for end in ends]
        return {depth.depths[-1]: replace(self, depth=depth) for depth in begun}

    @property
    def judges_mean(self) -> bool:
        """Whether evaluations put a mean in the place of the weights, which wait beside it."""
        return self.averages or self.optimizer.average_decay > 0

    @property
    def replays_graphs(self) -> bool:
        """Whether its passes are CUDA graphs."""
        against = self.memory.without_cuda_graphs(self.optimizer, predicts=self.path is not None)
        whole = not self.ranks or self.wrap == "ddp"
        can_be = whole and against is None and not isinstance(self.model, CausalLM)  # see docs/experiments.md
        return self.compiled and self.cuda_graphs and can_be

    @property
    def is_gpt2(self) -> bool:
        """Whether the model is ours, so that its loss can be chunked and its vocabulary padded."""
        return isinstance(self._model, GPT2Config)

    def resized(self, batch: BatchShape) -> TrainingSpec:
        """The same with another batch."""
        return replace(self, batch=batch)

    @property
    def _model(self) -> GPT2Config | CausalLM | Callable[[], nn.Module]:
        return GPT2Config.named(self.model) if isinstance(self.model, str) else self.model

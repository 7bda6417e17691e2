"""Everything that one run depends on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from hybridlab.base.device import device_name, find_device
from hybridlab.base.settings import check_bounds, check_choice, check_types
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.engine.trainer import CLOCKS
from hybridlab.memory.config import MemoryConfig
from hybridlab.memory.precision import PRECISIONS
from hybridlab.optim import OptimizerConfig, Schedule
from hybridlab.study.tasks import TaskConfig
from hybridlab.vram import exceeds

MOST_THREADS = 1024
"""With very many, starting them ends the process."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on.

    name: of the arm; two runs of one study differ in name or seed
    steps: nominal steps; evaluate_every: nominal steps between two evaluations
    precision: "fp32", "tf32" or "bf16" (autocast over float32 weights); compiled: through torch.compile
    cuda_graphs: on a GPU, replay a compiled run's passes as CUDA graphs, where nothing stands against it
        (`without_cuda_graphs`)
    schedule: of the learning rate; None is `Schedule()` fitted to `steps`
    device: "auto" (CUDA where there is one), "cuda" or "cpu"
    clock: which steps drive the schedule: "nominal", "gradient" or "worth" (`HybridTrainer.steps_by`)
    card_gb: take no more memory than a GPU of so many decimal gigabytes would give; 0 takes what there is
    tail_average: share of the run, at its end, over whose gradient steps the weights are averaged too: evaluations then
        say what the mean is worth beside the weights themselves; 0 averages nothing. It takes 4 bytes per weight
    tail_decay: of an exponential mean; 0 is the uniform one
    cpu_threads: that torch may use; 0 leaves the choice to it. Small models run best on one
    checkpoint_every: nominal steps between two checkpoints; 0 writes none. No figure depends on it
    keep_weights: leave the trained weights beside the record, as `weights.pt` for `torch.load`. No figure depends on it

    Raises TypeError and ValueError that name the setting and its remedy; a learning rate that would have decayed to its
    end before the run ends is one.
    """

    name: str
    task: TaskConfig
    steps: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig.tuned)
    schedule: Schedule | None = None
    hybrid: HybridTrainerConfig = field(default_factory=HybridTrainerConfig.plain)
    precision: str = "fp32"
    compiled: bool = False
    cuda_graphs: bool = True
    evaluate_every: int = 50
    seed: int = 0
    device: str = "auto"
    clock: str = "nominal"
    card_gb: int = 0
    cpu_threads: int = 0
    checkpoint_every: int = 0
    keep_weights: bool = False
    tail_average: float = 0.0
    tail_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        check_types(self)
        check_bounds(self, "tail_average", "tail_decay", least=0, below=1)
        check_bounds(self, "steps", "evaluate_every", least=1)
        check_bounds(self, "seed", "card_gb", "checkpoint_every", least=0)
        check_bounds(self, "cpu_threads", least=0, most=MOST_THREADS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("clock", self.clock, CLOCKS)
        if self.lr_schedule.name != "constant" and self.lr_schedule.total_steps < self.steps:
            ends = f"the schedule ends at step {self.lr_schedule.total_steps} of {self.steps}"
            raise ValueError(f"{ends}: use schedule.fitted_to({self.steps})")
        if self.memory.mixed_precision and self.precision != "fp32":
            raise ValueError(
                f"precision={self.precision!r} and mixed_precision both name a format: leave one of them off"
            )
        if self.task.batch_size % self.memory.micro_batches:
            parts = self.memory.micro_batches
            raise ValueError(f"a batch of {self.task.batch_size} does not split into {parts} equal micro_batches")
        self.memory.refuse_optimizer(self.optimizer)
        if self.tail_average and self.optimizer.average_decay:
            raise ValueError("tail_average averages weights that average_decay averages already: leave one of them off")
        _ = self.trainer  # refuses a depth schedule that does not fit the run

    @cached_property
    def memory(self) -> MemoryConfig:
        """The memory features of the run."""
        return self.hybrid.memory or MemoryConfig()

    @cached_property
    def lr_schedule(self) -> Schedule:
        """The learning rate's; made for `steps` where none is given."""
        return self.schedule or Schedule().fitted_to(self.steps)

    @property
    def trainer(self) -> HybridTrainerConfig:
        """The trainer's settings, a depth schedule in shares of the run as steps."""
        return self.hybrid.fitted_to(self.steps)

    @property
    def training_precision(self) -> str:
        """The number format in which the run trains and is judged."""
        return self.memory.mixed_precision.training if self.memory.mixed_precision else self.precision

    @property
    def without_cuda_graphs(self) -> str | None:
        """Why the run's passes are not replayed as CUDA graphs; None where they are."""
        depth, drops = self.hybrid.depth, getattr(self.task, "dropout", 0.0) > 0
        reasons = {
            "cuda_graphs is off": not self.cuda_graphs,
            "compiled is off": not self.compiled,
            "they need a GPU": find_device(self.device).type != "cuda",
            "the depth schedule skips other blocks in each step": depth is not None and depth.skip_share > 0,
            "checkpointing draws the random numbers of dropout again": drops and self.memory.checkpointing is not None,
        }
        of_memory = self.memory.without_cuda_graphs(self.optimizer, predicts=self.hybrid.path_needs is not None)
        return next((reason for reason, holds in reasons.items() if holds), of_memory)

    def as_vanilla(self) -> RunConfig:
        """The plan's own setting for the same task and length: FP32, Adam at 6e-4, constant, no clipping."""
        return replace(
            self,
            name="vanilla",
            optimizer=OptimizerConfig.vanilla(),
            schedule=Schedule("constant", warmup_steps=0, total_steps=self.steps),
            hybrid=replace(self.hybrid, clip_norm=None, memory=None),
            precision="fp32",
        )

    def record(self) -> dict[str, Any]:
        """As JSON: the settings that figures depend on, and where the data come from. Equal records, equal runs."""
        settings = asdict(self) | {"data": self.task.data_record(), "device": device_name(find_device(self.device))}
        settings |= {"schedule": asdict(self.lr_schedule), "emulates_card": self.emulates_card()}
        settings["optimizer"]["weight_decay"] = self.optimizer.decay
        del settings["checkpoint_every"], settings["keep_weights"]
        return json.loads(json.dumps(settings, default=str))

    def describe_device(self) -> str:
        """The name of the GPU, with what it emulates, or of the processor."""
        emulated = f" as an emulated {self.card_gb} GB GPU" if self.emulates_card() else ""
        return device_name(find_device(self.device)) + emulated

    def emulates_card(self) -> bool:
        """Whether a larger GPU stands for the one of `card_gb`."""
        return self.card_gb > 0 and exceeds(find_device(self.device), self.gpu_bytes)

    @property
    def gpu_bytes(self) -> int:
        """The size of the GPU that is emulated, in bytes."""
        return self.card_gb * 10**9

"""What a run trains: its task, model, optimizer and trainer, and what is computed with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab.base.device import give_back_cached, gpus
from hybridlab.base.errors import UserError
from hybridlab.base.ranks import rank
from hybridlab.engine.closures import Closure
from hybridlab.engine.phases import Phase
from hybridlab.engine.result import StepResult
from hybridlab.engine.trainer import HybridTrainer
from hybridlab.memory.apply import no_step, optimizer_for, prepare_model_
from hybridlab.memory.precision import autocast
from hybridlab.optim import set_lr_
from hybridlab.optim.averaging import averaged_weights, method_of
from hybridlab.optim.build import MuonWithAdamW
from hybridlab.optim.in_backward import StepInBackward
from hybridlab.speed import CudaGraphs, buffers_kept, compile_
from hybridlab.study.config import RunConfig
from hybridlab.study.ranks import RanksConfig
from hybridlab.study.tasks import Batch, in_parts, judging, own_part
from hybridlab.weights.tail_average import TailAverage

WARM_UP_PASSES = 3


def sped_up(model: nn.Module, config: RunConfig, ranks: RanksConfig | None = None) -> nn.Module:
    """What to call in the model's place: the model itself, compiled in place where asked, or its CUDA graphs.

    By block: what graphs replay; a model whose depth changes or that several ranks train, so that nothing is compiled
    anew; and one whose blocks are computed again, so that hooks stay out of what is compiled.

    ranks: how several processes will train it; weights that are gathered within passes stay out of graphs
    """
    if not config.compiled:
        return model
    graphs = config.without_cuda_graphs is None and (ranks is None or ranks.wrap == "ddp")
    by_block = graphs or ranks is not None or config.hybrid.depth is not None or config.memory.checkpointing is not None
    compile_(model, by_block=by_block, settings=(config.training_precision, config.memory))
    return CudaGraphs(model) if graphs else model


class Training:
    """Task, model, optimizer and trainer of one run, and the losses of its steps.

    ranks: how several processes train it together; None trains it in this one
    task: what is trained; trainer: takes the steps
    evaluation: the latest validation figures
    """

    def __init__(self, config: RunConfig, device: torch.device, ranks: RanksConfig | None = None) -> None:
        self._config, self._device, self._ranks = config, device, ranks
        self.task = config.task.build(config.seed, device, config.memory)
        prepare_model_(self.task.model, config.memory)
        self._model = sped_up(self.task.model, config, ranks)
        model = self.task.model
        if ranks:
            replayed = isinstance(self._model, CudaGraphs)
            model = ranks.wrapped(self.task.model, replayed=replayed)
            self._model = self._model if replayed else model
            torch.manual_seed(config.seed + (rank() << 32))  # noise such as dropout's is each rank's own
        self._optimizer = optimizer_for(self.task.model, config.optimizer, config.memory)
        self._method = method_of(self._optimizer)
        if isinstance(self._model, CudaGraphs) and isinstance(self._optimizer, StepInBackward):
            self._model.replay_steps_of(self._optimizer)
        if isinstance(self._method, MuonWithAdamW):
            self._method.use_cuda_graphs(isinstance(self._model, CudaGraphs))
        self.trainer = HybridTrainer(model, self._optimizer, config.trainer)
        self.evaluation: dict[str, float] = {}
        trained = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._average = TailAverage(trained, config.tail_decay)

    @property
    def cuda_graphs(self) -> str:
        """Whether passes are replayed: "in use", or why they are not."""
        if isinstance(self._model, CudaGraphs):
            return self._model.fails or "in use"
        return self._config.without_cuda_graphs or "weights that ranks gather stay out of graphs"

    def warm_up_(self) -> None:
        """Compile forward, backward, the forward without gradients and the steps, at each depth; nothing is trained."""
        kept = buffers_kept(self.task.model.modules())
        with torch.random.fork_rng(gpus(self._device)), no_step(self._optimizer), kept:
            with torch.compiler.set_stance("force_eager"), autocast(self._config.training_precision, self._device):
                self.trainer.weigh_blocks_(self._losses(0, self.task.model)[0])
            for _ in self.trainer.stages_():
                self._warm_up_passes()
                if isinstance(self._method, MuonWithAdamW) and not self._config.memory.step_in_backward:
                    self._method.warm_up_()
            if isinstance(self._optimizer, StepInBackward):
                self._optimizer.compile_steps_()
        self.task.model.zero_grad(set_to_none=True)

    def make_state_(self) -> None:
        """Make the optimizer's state, where steps inside backward would make it among what a pass takes."""
        if isinstance(self._optimizer, StepInBackward):
            give_back_cached()
            self._optimizer.make_state_()

    def _warm_up_passes(self) -> None:
        closure = self._losses(0, self._model)[0]

        def loss() -> Tensor:
            with autocast(self._config.training_precision, self._device):
                return closure()

        for _ in range(WARM_UP_PASSES):
            self.task.model.zero_grad(set_to_none=True)
            loss().backward()  # type: ignore[no-untyped-call]
            self._refuse_without_gradient()
        with torch.no_grad():
            loss()
        self.evaluate()

    def _refuse_without_gradient(self) -> None:
        """Raise UserError for weights that replicas would wait for."""
        if self._ranks is None or self._ranks.wrap != "ddp":
            return
        lacking = [name for name, p in self.task.model.named_parameters() if p.requires_grad and p.grad is None]
        if lacking:
            raise UserError(
                f"with wrap: ddp every weight needs a gradient, and {lacking[0]} has none ({len(lacking)} in all): set "
                "requires_grad to False where it takes no part, or take wrap: fsdp"
            )

    def step(self, number: int) -> StepResult:
        """Take the nominal step of a number, counted from 0."""
        set_lr_(self._optimizer, self._config.lr_schedule(self.trainer.steps_by(self._config.clock)))
        result = self.trainer.step(self._losses(number, self._model))
        if result.rolled_back or result.grown:
            self._average.begin_anew()
        from_step = round((1 - self._config.tail_average) * self._config.steps, 6)  # 10 times 0.3 is a little above 3
        if number >= from_step and result.phase is not Phase.PREDICT:
            self._average.add_()
        return result

    def evaluate(self) -> dict[str, float]:
        """Validation figures of the model, or of the mean that its optimizer keeps; "validation_loss", in nats, is one.

        Gradients are dropped first. Once the weights are averaged, figures of the mean are there too, as
        "averaged_validation_loss", with its bytes.
        """
        self._optimizer.zero_grad(set_to_none=True)  # their memory is what the logits take
        self.trainer.materialize_()
        self.evaluation = self._figures()
        if self._average.count:
            self.trainer.materialize_()
            with self._average.in_place():
                averaged = self._figures()
            self.evaluation |= {f"averaged_{name}": value for name, value in averaged.items()}
            self.evaluation["averaged_bytes"] = self._average.nbytes
        return self.evaluation

    @contextmanager
    def weights(self) -> Iterator[dict[str, Any]]:
        """Inside, the weights that evaluations judge, as a `state_dict` in host memory; of ranks, the first has it."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        self.trainer.materialize_()
        with averaged_weights(self._optimizer):
            yield get_model_state_dict(
                self.task.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )

    def _figures(self) -> dict[str, float]:
        precision = autocast(self._config.training_precision, self._device)
        with averaged_weights(self._optimizer), judging(self._model), precision:
            figures = self.task.evaluate(self._model)
        if "validation_loss" not in figures:
            raise UserError(f'evaluate() of the task gave no "validation_loss", but {sorted(figures)}: add it, in nats')
        return {name: float(value) for name, value in figures.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the training depends on, random streams aside."""
        self.trainer.materialize_()
        return {name: part.state_dict() for name, part in self._parts.items()} | {"evaluation": self.evaluation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; further keys are left alone."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.evaluation = state["evaluation"]

    @property
    def _parts(self) -> dict[str, Any]:
        """What has a state of its own, in the order in which it is loaded."""
        parts = {"model": self.task.model, "optimizer": self._optimizer, "trainer": self.trainer}
        return parts | ({"average": self._average} if self._config.tail_average else {})

    def _losses(self, number: int, model: nn.Module) -> list[Closure]:
        """The losses of a step's batch, part by part; the batch is made once, when one of them is asked for."""
        count = self._config.memory.micro_batches
        parts = cache(lambda: in_parts(own_part(self.task.batch(number)), count))
        return [partial(self._loss, model, parts, part) for part in range(count)]

    def _loss(self, model: nn.Module, parts: Callable[[], list[Batch]], part: int) -> Tensor:
        with autocast(self._config.precision, self._device):
            return self.task.loss(model, parts()[part])

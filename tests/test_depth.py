"""Predicted depth: schedules, growth rules, and a trainer that grows a model while it trains."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybridlab import DepthSchedule, HybridTrainer, HybridTrainerConfig, Phase
from hybridlab.base.errors import UserError
from hybridlab.base.operations import operations_of
from hybridlab.charts.display import Chart
from hybridlab.depth.growth import grow_, positions, sources
from hybridlab.depth.stack import BlockStack
from hybridlab.memory import CheckpointingConfig, MemoryConfig, optimizer_for, prepare_model_
from hybridlab.models import GPT2, GPT2Config
from hybridlab.notebook import (
    budget_chart,
    by_seed,
    claims_table,
    depth_arms,
    depth_claims,
    depth_figures,
    depth_table,
    pays_claim,
    rate_rows,
    shallow_claim,
)
from hybridlab.optim import OptimizerConfig, Schedule, build_optimizer, set_lr_
from hybridlab.study import RunConfig, Study, StudyResult, TextTaskConfig, compare, statistics
from hybridlab.study.rates import RateTrials
from hybridlab.study.statistics import Base
from tests.conftest import vector

BLOCKS, GROWS_AT = 6, 8
GROWING = DepthSchedule(((0, 2), (GROWS_AT, BLOCKS)))


def gpt2(n_embd: int = 16, **changes: Any) -> GPT2:
    torch.manual_seed(0)
    return GPT2(GPT2Config(vocab_size=32, block_size=16, n_layer=BLOCKS, n_head=2, n_embd=n_embd, **changes))


def batch(step: int) -> Tensor:
    return torch.randint(0, 32, (4, 17), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = batch(step)
    return model(tokens[:, :-1], tokens[:, 1:])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trainer_of(
    model: nn.Module,
    depth: DepthSchedule | None = GROWING,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    **settings: Any,
) -> HybridTrainer:
    settings = {"warmup_steps": 2, "full_steps": 4, "clip_norm": 1.0} | settings
    return HybridTrainer(model, optimizer(model), HybridTrainerConfig.plain(depth=depth, **settings))


def run(trainer: HybridTrainer, steps: range) -> list[Any]:
    return [trainer.step(partial(loss_of, trainer.model, step)) for step in steps]


# --- schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DepthSchedule(()), "first at 0"),
        (lambda: DepthSchedule(((5, 2), (9, 4))), "first at 0"),
        (lambda: DepthSchedule(((0, 4), (9, 2))), "must rise"),
        (lambda: DepthSchedule(((0, 2), (0, 4))), "must rise"),
        (lambda: DepthSchedule(((0, 2), (9, 2.5))), "is wanted"),
        (lambda: DepthSchedule(((0, 2), (0.7, 6))), "whole numbers"),
        (lambda: DepthSchedule(((0, -1), (9, 2))), "is none"),
        (lambda: DepthSchedule(((0, 0), (9, 6))), "rule='fresh'"),
        (lambda: DepthSchedule(((0, 2), (9, 6)), rule="copy"), "unknown"),
        (lambda: DepthSchedule.shares(((0.0, 2), (1.5, 6))), "below 1"),
        (lambda: DepthSchedule(((0, 2), (9, 6)), skip_share=1.0), "below 1"),
        (lambda: DepthSchedule(((0, 2), (9, 6)), skip_share=0.5), "no block is skipped; set skip_until"),
        (lambda: DepthSchedule(((0, 2), (9, 6)), rewarm_steps=-1), "at least 0"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        make()


def test_shares_of_a_run_become_steps_and_lists_of_a_parameter_file_tuples() -> None:
    shares = DepthSchedule.shares([[0.0, 3], [0.7, 12]], skip_share=0.2, skip_until=0.5)  # type: ignore[arg-type]
    assert shares.fitted_to(1000) == DepthSchedule(((0, 3), (700, 12)), skip_share=0.2, skip_until=500)
    with pytest.raises(UserError, match="fitted_to"):
        trainer_of(gpt2(), shares)


@pytest.mark.parametrize("depth", [DepthSchedule(((0, 1), (20, 2))), DepthSchedule.shares(((0.0, 1), (0.99, 2)))])
def test_a_stage_that_begins_after_the_run_is_refused(depth: DepthSchedule) -> None:
    with pytest.raises(ValueError, match=r"begins at step 20 and the run has 20: .* begin earlier"):
        RunConfig("grown", TextTaskConfig("nano"), 20, hybrid=HybridTrainerConfig.plain(depth=depth))


@pytest.mark.parametrize(
    ("rule", "depths", "stages"),
    [
        ("interleave", (3, 12), [(0, 4, 8), tuple(range(12))]),
        ("interleave", (2, 7), [(0, 4), tuple(range(7))]),
        ("interleave", (3, 6, 12), [(0, 4, 8), (0, 2, 4, 6, 8, 10), tuple(range(12))]),
        ("stack", (2, 6), [(0, 1), tuple(range(6))]),
        ("fresh", (0, 6), [(), tuple(range(6))]),
    ],
)
def test_stages_are_spread_and_each_keeps_the_blocks_of_the_one_before(
    rule: str, depths: tuple[int, ...], stages: list[tuple[int, ...]]
) -> None:
    assert positions(rule, depths, depths[-1]) == stages


@pytest.mark.parametrize("depths", [(3, 7, 12), (5, 7, 11), (1, 2, 3, 48)])
def test_stages_that_do_not_divide_each_other_still_nest(depths: tuple[int, ...]) -> None:
    stages = [set(active) for active in positions("interleave", depths, depths[-1])]
    assert [len(active) for active in stages] == list(depths)
    assert all(inner <= outer and 0 in inner for inner, outer in itertools.pairwise(stages))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("interleave", [[(0, 1)], [(0, 1)], [(3, 1)], [(3, 1)]]),
        ("linear", [[(0, 2 / 3), (3, 1 / 3)], [(0, 1 / 3), (3, 2 / 3)], [(3, 1)], [(3, 1)]]),
    ],
)
def test_new_blocks_come_from_their_neighbours(rule: str, expected: list[list[tuple[int, float]]]) -> None:
    for position, shares in zip((1, 2, 4, 5), expected, strict=True):
        found = sources(rule, position, (0, 3))
        assert [source for source, _ in found] == [source for source, _ in shares]
        assert [share for _, share in found] == pytest.approx([share for _, share in shares])


# --- bypassing --------------------------------------------------------------------------------------------


def test_a_bypassed_model_computes_what_a_model_of_its_active_blocks_does() -> None:
    model = gpt2()
    stack, shallow = BlockStack(model), gpt2()
    stack.activate_((0, 3))
    shallow.h = nn.ModuleList([shallow.h[0], shallow.h[3]])
    assert torch.equal(loss_of(model, 0), loss_of(shallow, 0))
    loss_of(model, 0).backward()
    assert {i for i, block in enumerate(model.h) if block.ln_1.weight.grad is not None} == {0, 3}
    assert list(model.state_dict()) == list(gpt2().state_dict())
    stack.activate_(range(BLOCKS))
    assert torch.equal(loss_of(model, 0), loss_of(gpt2(), 0))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("own", [False, True])
def test_a_stage_that_comes_again_calls_the_same_functions(own: bool) -> None:
    """A captured CUDA graph is found by them. own: where the block has a function of its own, as a compiled one has."""
    model = gpt2()
    if own:
        model.h[1].forward = partial(type(model.h[1]).forward, model.h[1])
    stack, before = BlockStack(model), model.h[1].forward
    called = []
    for _ in range(2):
        stack.activate_((0,))
        called.append(model.h[1].forward)
        stack.activate_(range(BLOCKS))
        assert model.h[1].forward == before
    assert called[0] is called[1]


def test_weights_that_were_frozen_stay_frozen() -> None:
    model = gpt2()
    model.h[1].ln_1.weight.requires_grad_(False)
    stack = BlockStack(model)
    stack.activate_((0,))
    stack.activate_(range(BLOCKS))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["h.1.ln_1.weight"]


def test_the_next_trainer_finds_the_model_whole() -> None:
    model = gpt2()
    run(trainer_of(model, DepthSchedule.constant(1)), range(2))
    trained = {name: p.clone() for name, p in model.state_dict().items()}
    whole = gpt2()
    assert not torch.equal(loss_of(model, 9), loss_of(whole, 9))
    HybridTrainer(model, adamw(model))
    whole.load_state_dict(trained)
    assert torch.equal(loss_of(model, 9), loss_of(whole, 9))
    assert all(p.requires_grad for p in model.parameters())


class TwoStacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.decoder = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.encoder, *self.decoder]:
            x = block(x)
        return x.square().mean()


def test_a_model_without_one_stack_is_refused_and_a_name_settles_it() -> None:
    linear, two = nn.Linear(2, 2), TwoStacks()
    with pytest.raises(UserError, match=r"no stack of equal blocks.*blocks='model.layers'"):
        trainer_of(linear)
    with pytest.raises(UserError, match=r"several stacks of blocks, encoder, decoder"):
        trainer_of(two, DepthSchedule(((0, 1), (2, 3))))
    with pytest.raises(UserError, match=r"no list of blocks named 'layers': it has encoder, decoder"):
        trainer_of(two, DepthSchedule(((0, 1), (2, 3)), blocks="layers"))
    trainer = trainer_of(two, DepthSchedule(((0, 1), (2, 3)), blocks="encoder"))
    depths = [trainer.step(lambda: two(torch.ones(1, 4))).depth for _ in range(4)]
    assert depths == [1, 1, 3, 3]


@pytest.mark.parametrize("last", [BLOCKS - 1, BLOCKS + 1])
def test_the_last_stage_is_the_models_full_depth(last: int) -> None:
    with pytest.raises(UserError, match=f"ends at {last} blocks and the model has {BLOCKS}"):
        trainer_of(gpt2(), DepthSchedule(((0, 2), (5, last))))


# --- growing ----------------------------------------------------------------------------------------------


def test_one_stage_of_all_blocks_is_the_plain_loop_bit_for_bit() -> None:
    plain, staged = gpt2(), gpt2()
    run(trainer_of(plain, None), range(6))
    results = run(trainer_of(staged, DepthSchedule(((0, BLOCKS),))), range(6))
    assert torch.equal(vector(plain), vector(staged))
    assert {result.depth for result in results} == {BLOCKS}


@pytest.mark.parametrize("rule", ["interleave", "stack", "linear", "fresh"])
def test_a_model_grows_at_its_step_and_says_so(rule: str) -> None:
    trainer = trainer_of(gpt2(), DepthSchedule(((0, 2), (4, 3), (GROWS_AT, BLOCKS)), rule=rule))
    results = run(trainer, range(12))
    assert [result.depth for result in results] == [2] * 4 + [3] * 4 + [BLOCKS] * 4
    events = {result.nominal_step: result.event for result in results if result.grown}
    assert events == {5: f"grown: 2 -> 3 blocks ({rule})", 9: f"grown: 3 -> 6 blocks ({rule})"}
    assert trainer.statistics().growths == 2


def test_inactive_blocks_have_no_gradient_and_no_state_and_new_ones_that_of_their_source() -> None:
    trainer = trainer_of(model := gpt2())
    run(trainer, range(GROWS_AT))
    state, first, second = trainer.optimizer.state, model.h[0].ln_1.weight, model.h[1].ln_1.weight
    assert second.grad is None
    assert second not in state
    before = {name: value.clone() for name, value in state[first].items()}
    source = first.detach().clone()
    seen: dict[str, Any] = {}

    def look() -> Tensor:
        if not seen:
            seen.update(weight=second.detach().clone(), **{k: v.clone() for k, v in state[second].items()})
        return loss_of(model, GROWS_AT)

    trainer.step(look)
    assert torch.equal(seen.pop("weight"), source)
    assert seen.keys() == before.keys()
    assert all(torch.equal(seen[name], before[name]) for name in before)


def test_fresh_blocks_leave_the_loss_unchanged_when_they_join() -> None:
    trainer = trainer_of(model := gpt2(), DepthSchedule(((0, 2), (GROWS_AT, BLOCKS)), rule="fresh"))
    run(trainer, range(GROWS_AT))
    before = loss_of(model, GROWS_AT).item()
    assert trainer.step(lambda: loss_of(model, GROWS_AT)).loss == pytest.approx(before, abs=1e-6)


def test_zero_blocks_grow_fresh() -> None:
    trainer = trainer_of(model := gpt2(), DepthSchedule(((0, 0), (3, BLOCKS)), rule="fresh"))
    assert [result.depth for result in run(trainer, range(6))] == [0] * 3 + [BLOCKS] * 3
    assert any(block.attn.c_proj.weight.any() for block in model.h)


def test_output_projections_of_other_names_are_asked_for() -> None:
    for rule in ("fresh", "best"):
        with pytest.raises(UserError, match=r"no layer named .*outputs="):
            trainer_of(TwoStacks(), DepthSchedule(((0, 1), (1, 3)), rule=rule, blocks="encoder"))


@pytest.mark.parametrize("depths", [(2, 6), (3, 6)])
def test_a_stack_repeats_the_trained_sequence_wherever_its_blocks_lie(depths: tuple[int, int]) -> None:
    first, last = depths
    trainer = trainer_of(model := gpt2(), DepthSchedule(((0, first), (GROWS_AT, last))))
    run(trainer, range(GROWS_AT))
    stack = trainer._depth._stack
    trained = [model.h[position].ln_1.weight.detach().clone() for position in stack.active]
    momenta = [trainer.optimizer.state[model.h[position].ln_1.weight]["exp_avg"].clone() for position in stack.active]
    grow_(stack, trainer.optimizer, range(last), "stack")
    for position, block in enumerate(model.h):
        assert torch.equal(block.ln_1.weight, trained[position % first])
        assert torch.equal(trainer.optimizer.state[block.ln_1.weight]["exp_avg"], momenta[position % first])


def trying(stages: tuple[tuple[int, int], ...] = ((0, 2), (GROWS_AT, BLOCKS))) -> DepthSchedule:
    return DepthSchedule(stages, rule="best")


def test_the_gate_tries_every_rule_and_grows_by_the_best() -> None:
    """Trying moves nothing: the run is that of the same rule at the step at which the trial was over."""
    trainer = trainer_of(gpt2(), trying(), gate_batches=3)
    trainer.weigh_blocks_(lambda: loss_of(trainer.model, 0))
    results = run(trainer, range(16))
    passes = {result.nominal_step: result.forward_only_passes for result in results if result.forward_only_passes}
    assert passes == dict.fromkeys((9, 10, 11), 5)
    assert [results[step].cost - results[7].cost for step in (8, 9)] == pytest.approx([5 / 3] * 2)
    (grown,) = (result for result in results if result.grown)
    assert grown.nominal_step == 11
    found = re.fullmatch(r"grown: 2 -> 6 blocks \((\w+), the best of (.*) nats\)", grown.event)
    assert found
    changes = {name: float(change) for name, change in (part.split() for part in found[2].split(", "))}
    assert changes.keys() == {"interleave", "stack", "linear", "fresh"}
    assert changes[found[1]] == min(changes.values())
    assert changes["fresh"] == 0
    named = trainer_of(gpt2(), DepthSchedule(((0, 2), (10, BLOCKS)), rule=found[1]))
    run(named, range(16))
    assert torch.equal(vector(trainer.model), vector(named.model))


def test_each_stage_is_tried_by_itself() -> None:
    results = run(trainer_of(gpt2(), trying(((0, 1), (4, 2), (6, BLOCKS))), gate_batches=3), range(14))
    assert [result.depth for result in results] == [1] * 6 + [2] * 3 + [BLOCKS] * 5
    assert [result.forward_only_passes for result in results] == [0] * 4 + [5] * 6 + [0] * 4


def test_a_growth_that_only_harms_waits_and_costs_no_more_than_the_gates_budget() -> None:
    model, harm = gpt2(), 1.0
    trainer = trainer_of(model, trying(), gate_batches=2, gate_budget=0.2, full_steps=4)

    def closure(step: int) -> Tensor:
        return loss_of(model, step) + harm * (len(trained_blocks(model)) == BLOCKS)

    results = [trainer.step(partial(closure, step)) for step in range(30)]
    events = {result.nominal_step: result.event for result in results if result.event}
    assert [step for step in events if events[step].startswith("not grown yet: interleave +")] == [10, 19]
    assert sum(result.forward_only_passes for result in results) == 20
    assert {result.depth for result in results} == {2}
    harm = 0.0
    later = [trainer.step(partial(closure, step)) for step in range(30, 40)]
    assert any(result.grown for result in later)


def test_a_trial_of_the_rules_is_resumed_bit_for_bit() -> None:
    whole, first = trainer_of(gpt2(), trying()), trainer_of(gpt2(), trying())
    run(whole, range(GROWS_AT + 6))
    run(first, range(GROWS_AT + 2))
    second = trainer_of(model := gpt2(), trying())
    model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    results = run(second, range(GROWS_AT + 2, GROWS_AT + 6))
    assert [result.grown for result in results] == [False, True, False, False]
    assert torch.equal(vector(whole.model), vector(model))


def test_trying_the_rules_needs_the_gate() -> None:
    with pytest.raises(ValueError, match="rule='best' does not go with gate=False"):
        HybridTrainerConfig.plain(depth=trying(), gate=False)


def test_the_rate_rises_anew_after_growth_where_asked() -> None:
    rates: list[float] = []
    optimizers: list[torch.optim.Optimizer] = []

    def watched(model: nn.Module) -> torch.optim.Optimizer:
        optimizers.append(adamw(model))
        optimizers[0].register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizers[0]

    run(trainer_of(gpt2(), DepthSchedule(((0, 2), (3, BLOCKS)), rewarm_steps=4), watched), range(8))
    assert rates == pytest.approx([3e-3] * 3 + [3e-3 * k / 4 for k in (1, 2, 3, 4)] + [3e-3])
    assert optimizers[0].param_groups[0]["lr"] == 3e-3


def test_layer_dropout_skips_blocks_at_random_and_not_in_the_decay() -> None:
    model = gpt2()
    trainer = trainer_of(model, DepthSchedule(((0, BLOCKS),), skip_share=0.5, skip_until=4))
    skipped = []
    for step in range(6):
        trainer.step(lambda step=step: loss_of(model, step))
        skipped.append(tuple(i for i, block in enumerate(model.h) if block.ln_1.weight.grad is None))
    assert [len(blocks) for blocks in skipped] == [3] * 4 + [0] * 2
    assert len(set(skipped[:4])) > 1
    assert torch.equal(loss_of(model, 9), loss_of(model, 9))


# --- rollback, checkpoints, other features ------------------------------------------------------------------


def test_a_growth_that_diverges_is_rolled_back_and_tried_again() -> None:
    trainer = trainer_of(model := gpt2())
    run(trainer, range(GROWS_AT))
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = trainer.optimizer.state[model.wte.weight]["exp_avg"].clone()

    def spoilt() -> Tensor:
        return loss_of(model, 0) * (float("nan") if len(trained_blocks(model)) == BLOCKS else 1.0)

    results = [trainer.step(spoilt) for _ in range(2)]
    assert results[0].grown
    assert results[1].rolled_back
    assert results[1].diverged
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(trainer.optimizer.state[model.wte.weight]["exp_avg"], state)
    assert model.h[1].ln_1.weight not in trainer.optimizer.state
    later = run(trainer, range(10, 18))
    assert [result.depth for result in later] == [2] * 4 + [BLOCKS] * 4
    assert trainer.statistics().growths == 2
    assert trainer.statistics().rollbacks == 1


def trained_blocks(model: GPT2) -> list[nn.Module]:
    return [block for block in model.h if block.ln_1.weight.requires_grad]


@pytest.mark.parametrize("at", [GROWS_AT - 1, GROWS_AT, GROWS_AT + 1, GROWS_AT + 3])
@pytest.mark.parametrize("jumps", [0, 6])
def test_training_resumes_bit_for_bit_before_at_and_after_growth(at: int, jumps: int) -> None:
    settings = {"max_predict_steps": jumps, "confidence_threshold": 0.0, "gate": False, "correct_steps": 1}
    whole, second, results = interrupted(lambda: trainer_of(gpt2(), **settings), at)
    counts = [trainer.statistics() for trainer in (whole, second)]
    assert counts[0].growths == counts[1].growths == 1
    assert counts[0].predicted_steps == counts[1].predicted_steps
    assert not jumps or any(result.phase is Phase.PREDICT for result in results)


def interrupted(make: Callable[[], HybridTrainer], at: int) -> tuple[HybridTrainer, HybridTrainer, list[Any]]:
    """A trainer that ran whole, and one that went on from what another had saved, with what its steps gave."""
    steps = GROWS_AT + 12
    run(whole := make(), range(steps))
    run(first := make(), range(at))
    saved = [part.state_dict() for part in (first.model, first.optimizer, first)]
    for part, state in zip(((second := make()).model, second.optimizer, second), saved, strict=True):
        part.load_state_dict(state)
    results = run(second, range(at, steps))
    assert torch.equal(vector(whole.model), vector(second.model))
    return whole, second, results


@pytest.mark.parametrize("name", ["adamw", "adam", "muon", "sgd"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_every_optimizer_grows(name: str, in_backward: bool) -> None:
    memory = MemoryConfig(step_in_backward=in_backward, clip_in_backward=1.0 if in_backward else None)
    config = OptimizerConfig(name, lr=3e-3)
    model = gpt2()
    trainer = trainer_of(
        model,
        optimizer=lambda m: optimizer_for(m, config, memory),
        memory=memory,
        clip_norm=None if in_backward else 1.0,
    )
    results = run(trainer, range(GROWS_AT + 4))
    assert results[-1].depth == BLOCKS
    state = trainer.optimizer.state
    assert {tuple(state[p]) for p in model.h[0].parameters()} == {tuple(state[p]) for p in model.h[1].parameters()}
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("state", ["int8", "int4"])
@pytest.mark.parametrize("at", [GROWS_AT - 1, GROWS_AT + 1])
def test_the_16gb_preset_grows_and_resumes_bit_for_bit(state: str, at: int) -> None:
    *_, results = interrupted(lambda: in_few_bits(state), at)
    assert results[-1].depth == BLOCKS


def in_few_bits(state: str) -> HybridTrainer:
    """Weights of 24 bits, in a model whose matrices are large enough for a state in few."""
    pytest.importorskip("torchao.optim")
    memory = MemoryConfig.fit_16gb(optimizer_state=state)
    model = gpt2(n_embd=64, **memory.model_settings)
    prepare_model_(model, memory)
    make = partial(optimizer_for, config=OptimizerConfig(), memory=memory)
    return trainer_of(model, optimizer=make, memory=memory, clip_norm=None)


@pytest.mark.parametrize("state", ["int8", "int4"])
def test_a_new_block_has_its_sources_weights_in_all_24_bits(state: str) -> None:
    trainer = in_few_bits(state)
    model, states = trainer.model, trainer.optimizer.state
    run(trainer, range(GROWS_AT))
    set_lr_(trainer.optimizer, 0.0)
    assert run(trainer, [GROWS_AT])[0].depth == BLOCKS
    assert torch.equal(vector(model.h[1]), vector(model.h[0]))
    rests, copied = ([states[p]["rest"] for p in block.parameters()] for block in (model.h[0], model.h[1]))
    assert any(rest.any() for rest in rests)
    assert all(map(torch.equal, rests, copied))


@pytest.mark.parametrize(
    "memory", [MemoryConfig(checkpointing=CheckpointingConfig()), MemoryConfig(loss_chunk_tokens=8)]
)
def test_checkpointed_blocks_and_chunked_losses_change_no_result(memory: MemoryConfig) -> None:
    plain, saving = gpt2(), gpt2(loss_chunk_tokens=memory.loss_chunk_tokens)
    prepare_model_(saving, memory)
    run(trainer_of(plain, optimizer=sgd), range(GROWS_AT + 2))
    run(trainer_of(saving, optimizer=sgd, memory=memory), range(GROWS_AT + 2))
    assert torch.allclose(vector(plain), vector(saving), atol=1e-6)


def test_an_optimizer_that_was_built_while_blocks_were_bypassed_is_refused_and_a_new_one_trains_them() -> None:
    model, plain = gpt2(), HybridTrainerConfig.plain()
    run(trainer_of(model, DepthSchedule.constant(2)), range(2))
    lacking = build_optimizer(model, OptimizerConfig())
    with pytest.raises(UserError, match="built while blocks were bypassed"):
        HybridTrainer(model, lacking, plain)
    before = [p.detach().clone() for p in model.parameters()]
    run(HybridTrainer(model, build_optimizer(model, OptimizerConfig()), plain), range(2))
    assert not any(map(torch.equal, before, model.parameters()))


def test_a_loss_that_fails_leaves_the_stage_and_the_growth_is_still_told() -> None:
    def fails() -> Tensor:
        raise RuntimeError("out of memory")

    trainer = trainer_of(gpt2())
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.weigh_blocks_(fails)
    for _ in trainer.stages_():
        break
    run(trainer, range(GROWS_AT))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step(fails)
    results = run(trainer, range(GROWS_AT, GROWS_AT + 2))
    assert [(result.depth, result.grown) for result in results] == [(BLOCKS, True), (BLOCKS, False)]
    assert trainer.statistics().growths == 1
    unbroken = trainer_of(gpt2())
    run(unbroken, range(GROWS_AT + 2))
    assert torch.equal(vector(trainer.model), vector(unbroken.model))


class Noisy(nn.Module):
    """A residual block that draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.c_proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.c_proj(x))


class Counting(nn.Module):
    """Passes are counted in a buffer; the stream is given by position, or by name."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h, self.name = nn.ModuleList(Noisy() for _ in range(4)), name
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        for block in self.h:
            x = block(**{self.name: x}) if self.name else block(x)
        return x.square().mean()


def counted(model: nn.Module, steps: int, rule: str = "interleave", saved: Any = None) -> tuple[Any, list[float]]:
    """Train for so many steps, from what an earlier training saved; what is saved then, and the losses."""
    trainer = trainer_of(model, DepthSchedule(((0, 1), (5, 4)), rule=rule))
    parts = (model, trainer.optimizer, trainer)
    for part, state in zip(parts, saved or (), strict=False):
        part.load_state_dict(state)
    losses = [trainer.step(lambda: model(torch.ones(2, 8))).loss for _ in range(steps)]
    return deepcopy([part.state_dict() for part in parts]), losses


def test_what_a_bypassed_block_returns_is_seen_without_drawing_a_random_number() -> None:
    """A training that is gone on with has to see it again."""
    first, second, whole = Counting(), Counting(), Counting()
    torch.manual_seed(1)
    _, unbroken = counted(whole, 6)
    torch.manual_seed(1)
    saved, _ = counted(first, 3)
    _, losses = counted(second, 3, saved=saved)
    assert losses == unbroken[3:]


def test_trying_the_rules_leaves_every_buffer_as_it_was() -> None:
    model = Counting()
    saved, _ = counted(model, 12, rule="best")
    assert saved[2]["statistics"]["forward_only_passes"] > 0
    assert model.passes == 12


def test_blocks_that_are_called_by_a_name_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match=r"called with x by name, .* by position"):
        counted(Counting("x"), 1)


def test_state_on_the_host_is_refused_when_the_settings_are_made() -> None:
    with pytest.raises(ValueError, match="state_on_host"):
        HybridTrainerConfig.plain(depth=GROWING, memory=MemoryConfig(state_on_host=True))


# --- costs and controls -----------------------------------------------------------------------------------


def test_a_step_says_what_it_cost() -> None:
    model = gpt2()
    trainer = trainer_of(model, DepthSchedule(((0, 2), (3, BLOCKS)), skip_share=0.5, skip_until=5))
    tokens = batch(0)
    trainer.weigh_blocks_(lambda: model(tokens[:, :-1], tokens[:, 1:]))
    results = run(trainer, range(6))
    assert [result.depth for result in results] == [1, 1, 1, 3, 3, BLOCKS]
    attention = 2 * (tokens.shape[1] - 1) * 16
    block, head = 12 * 16**2 + attention, 64 * 16  # multiplications per token, of a vocabulary padded to 64
    expected = [(result.depth * block + head) / (BLOCKS * block + head) for result in results]
    assert [result.cost for result in results] == pytest.approx(expected, rel=0.02)
    assert trainer.statistics().cost_in_full_steps == pytest.approx(sum(result.cost for result in results))


@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(checkpointing=CheckpointingConfig())], ids=str)
def test_a_shallow_step_costs_what_its_operations_are(memory: MemoryConfig) -> None:
    """What checkpointing computes again among them. No gradient is left, and nothing has stepped."""
    model = gpt2()
    prepare_model_(model, memory)
    trainer = trainer_of(model, DepthSchedule(((0, 2), (3, BLOCKS))))
    before, calls = vector(model), []
    trainer.weigh_blocks_(lambda: (calls.append(None), loss_of(model, 0))[1])
    assert torch.equal(vector(model), before)
    assert len(calls) == 3
    assert all(p.grad is None for p in model.parameters())
    counted = {}
    for _ in trainer.stages_():
        counted[len(trained_blocks(model))] = operations_of(lambda: loss_of(model, 0).backward())
        model.zero_grad()
    results = run(trainer, range(4))
    assert results[0].cost == pytest.approx(counted[2] / counted[BLOCKS], rel=1e-6)
    assert results[3].cost == 1.0


def test_what_a_shallow_step_costs_is_not_known_before_blocks_are_weighed() -> None:
    results = run(trainer_of(gpt2(), DepthSchedule(((0, 2), (3, BLOCKS)))), range(4))
    assert [math.isnan(result.cost) for result in results] == [True, True, True, False]


def test_a_step_without_a_schedule_costs_one_and_a_predicted_one_nothing() -> None:
    settings = {"max_predict_steps": 6, "confidence_threshold": 0.0, "gate": False, "correct_steps": 1}
    results = run(trainer_of(gpt2(), None, **settings), range(14))
    assert {result.cost for result in results if result.phase is Phase.PREDICT} == {0.0}
    assert {result.cost for result in results if result.phase is not Phase.PREDICT} == {1.0}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    """Few blocks first, at a length at which depth does not pay yet; the shallow control beside it."""
    task = TextTaskConfig("micro", "markov", vocab_size=64, block_size=16, batch_size=4, validation_batches=4)
    plain = HybridTrainerConfig.plain(clip_norm=1.0)
    base = RunConfig("baseline", task, 40, OptimizerConfig(lr=3e-3), Schedule("wsd", 10, 40), plain, device="cpu")
    arms = {
        "grown": replace(plain, depth=DepthSchedule.shares(((0.0, 1), (0.6, 6)))),
        "shallow": replace(plain, depth=DepthSchedule.constant(1)),
    }
    study = Study(replace(base, cpu_threads=1, evaluate_every=40), arms, seeds=3, control_fractions=(0.75, 1.25))
    return study.run(tmp_path_factory.mktemp("depth"))


def test_a_grown_arm_is_held_against_a_plain_run_of_as_much_computation(study: StudyResult) -> None:
    grown = compare(study, "grown")
    for seed in study.seeds:
        steps = study.gradient_steps(study.control_of("grown", seed), seed)
        assert steps == round(study.cost("grown", seed)) < 40
    assert grown.grown
    assert grown.tested == 1
    assert "grown to full depth" in grown.sentence
    assert study.control_of("shallow", 0) == "baseline"
    assert study.cost("shallow", 0) < study.cost("grown", 0)


CONTROL = "control of grown, shallow"


def test_the_shallow_model_is_trained_again_for_as_much_computation(study: StudyResult) -> None:
    assert study.controls(["grown", "shallow"]) == ["control of grown", CONTROL]
    for seed in study.seeds:
        step = study.cost("shallow", seed) / 40
        assert study.cost(CONTROL, seed) == pytest.approx(study.cost("grown", seed), abs=step)
        assert study.runs[CONTROL, seed].config["optimizer"] == study.runs["shallow", seed].config["optimizer"]
        assert study.runs[CONTROL, seed].steps["depth"].unique().tolist() == [1]


@pytest.mark.parametrize(
    ("depth", "shallow"),
    [
        (DepthSchedule.shares(((0.0, 1), (0.6, 6))), "shallow"),
        (DepthSchedule(((0, 1), (10, 3), (20, 6))), "shallow"),
        (DepthSchedule.shares(((0.0, 2), (0.6, 6))), None),
        (DepthSchedule.constant(1), None),
        (None, None),
    ],
)
def test_a_growing_arm_knows_the_shallow_model_that_it_began_as(depth: DepthSchedule, shallow: str) -> None:
    plain = HybridTrainerConfig.plain()
    arms = {"arm": replace(plain, depth=depth), "shallow": replace(plain, depth=DepthSchedule.constant(1))}
    arms["another rule"] = replace(plain, depth=depth and replace(depth, rule="stack"))
    study = Study(RunConfig("baseline", TextTaskConfig("micro"), 40), arms)
    assert study.shallow_of("arm") == shallow
    assert [arm for arm in study.arms() if arm.endswith(", shallow")] == ["control of arm, shallow"] * bool(shallow)


@pytest.mark.parametrize(
    ("shallow", "control", "verdict"),
    [(2.1, 2.1, "holds"), (2.1, 1.9, "fails"), (2.1, None, "open"), (1.9, None, "fails"), (2.1, 2.0, "open")],
)
def test_depth_pays_where_the_grown_model_beats_a_shallow_one_of_as_much_computation(
    study: StudyResult, monkeypatch: pytest.MonkeyPatch, shallow: float, control: float | None, verdict: str
) -> None:
    """One of as many steps has had less: it can refute, and not show."""
    monkeypatch.setattr(statistics, "LEAST", Base(steps=1, seeds=1, tokens=1, fall_nats=-math.inf))
    losses = {"grown": 2.0, "shallow": shallow, CONTROL: control}
    runs = {
        (arm, seed): replace(run, summary=run.closing_figures | {"validation_loss": loss + 0.01 * (seed == 1)})
        for (arm, seed), run in study.runs.items()
        if (loss := losses.get(arm, 3.0)) is not None
    }
    runs["grown", 2] = replace(runs["grown", 2], summary=runs["grown", 2].closing_figures | {"validation_loss": 2.001})
    claim = shallow_claim(replace(study, runs=runs), "grown", "shallow")
    assert claim.verdict == verdict
    assert ("no shallow run had as much computation" in claim.text) == (verdict == "open" and control is None)
    assert claim.value("loss_to_shallow") == pytest.approx(2.0 - shallow, abs=0.001)


def test_a_shallow_run_that_diverged_shows_no_use_of_depth(study: StudyResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends above every loss: a mean of infinity would refute the shallow model by one seed."""
    monkeypatch.setattr(statistics, "LEAST", Base(steps=1, seeds=1, tokens=1, fall_nats=-math.inf))
    run = study.runs[CONTROL, 1]
    spoilt = replace(run, summary=run.closing_figures | {"validation_loss": math.inf, "diverged": "the loss is nan"})
    claim = shallow_claim(replace(study, runs=study.runs | {(CONTROL, 1): spoilt}), "grown", "shallow")
    assert claim.verdict == "open"
    assert claim.text.endswith("(a shallow run diverged)")


def test_an_average_that_is_no_number_costs_no_comparison(study: StudyResult) -> None:
    """The record of a run that diverged in its tail has the figure, and no number."""
    averaged = dict.fromkeys(study.runs, 3.0) | {("grown", 1): None}
    runs = {
        key: replace(run, summary=run.closing_figures | {"averaged_validation_loss": averaged[key]})
        for key, run in study.runs.items()
    }
    result = StudyResult(runs)
    assert compare(result, "grown").averaged_loss is None
    assert compare(result, "shallow").averaged_loss.values == (3.0, 3.0, 3.0)


def test_growing_beats_as_much_computation_where_the_budget_is_small(study: StudyResult) -> None:
    grown = compare(study, "grown")
    assert grown.to_control.high < 0
    assert grown.compute_to_loss is not None
    assert grown.compute_to_loss.value is None or grown.compute_to_loss.low > 1


def test_a_grown_arms_claim_holds_the_numbers_that_decide(study: StudyResult) -> None:
    claim = pays_claim(compare(study, "grown"))
    names = {quantity.name for quantity in claim.quantities}
    assert {"loss_to_control", "p_value", "cost_in_full_steps", "compute_to_loss", "time_to_loss"} <= names
    assert "growing beats a plain run of as much computation" in claim.text


def test_the_sweep_shows_each_arm_beside_the_plain_run_and_the_shallow_control(study: StudyResult) -> None:
    rows = depth_table({1.5: study}, ["grown", "shallow"]).rows
    assert {row["arm"]: (row["blocks"], row["answer"] == "a control") for row in rows} == {
        "grown": ("1 -> 6", False),
        "shallow": ("1", True),
        CONTROL: ("1", True),
    }
    chart = budget_chart({1.5: study}, ["grown", "shallow"])
    assert isinstance(chart, Chart)
    drawn = dict(zip(chart.names, chart.series[0].x, strict=True))
    assert drawn["shallow"] == pytest.approx(compare(study, "shallow").to_baseline.mean)
    several = budget_chart({1.5: study, 3.0: study}, ["grown", "shallow"])
    assert isinstance(several, Chart)
    assert [(series.name, list(series.x)) for series in several.series] == [
        ("grown", [1.5, 3.0]),
        ("shallow", [1.5, 3.0]),
    ]
    claim = shallow_claim(study, "grown", "shallow", "40 steps")
    assert claim.id == "grown-40-steps-depth-pays"
    assert claim.verdict == "open"
    assert "40 of 200 steps" in claim.text


def test_a_grown_arm_and_its_shallow_control_are_made_and_judged_together(study: StudyResult) -> None:
    plain = HybridTrainerConfig.plain(clip_norm=1.0)
    arms = depth_arms(plain, 1, 6, 0.6)
    assert arms == {
        "grown": replace(plain, depth=DepthSchedule.shares(((0.0, 1), (0.6, 6)))),
        "shallow": replace(plain, depth=DepthSchedule.constant(1)),
    }
    claims = depth_claims(study)
    assert [claim.id for claim in claims] == ["grown-pays", "grown-depth-pays", "grown-speed", "grown-stable"]
    assert "below the shallow model of as much computation" in claims[1].text
    assert claims[1].deciding.name == "loss_to_shallow_control"
    numbers = str(claims_table(claims))
    assert "loss against a plain run of as much computation" in numbers
    assert "as many gradient steps" not in numbers
    assert depth_arms(plain, 0, 6, 0.6) == {}
    assert depth_claims(StudyResult()) == []
    assert "no arm predicts depth" in str(depth_table({}, []))


def test_a_sweep_whose_arm_diverged_is_told_and_not_drawn(study: StudyResult) -> None:
    run = study.runs["shallow", 1]
    spoilt = replace(run, summary=run.closing_figures | {"validation_loss": math.inf, "diverged": "the loss is nan"})
    chart = budget_chart({1.5: StudyResult(study.runs | {("shallow", 1): spoilt})}, ["grown", "shallow"])
    assert isinstance(chart, Chart)
    assert list(chart.names) == ["grown"]
    without = StudyResult(study.runs | {("baseline", 1): spoilt})
    assert budget_chart({1.5: without}, ["grown", "shallow"]) == "at every budget an arm or its baseline diverged"


def test_an_arm_that_diverged_before_it_grew_is_judged_as_a_grown_one(study: StudyResult) -> None:
    ended = {"validation_loss": math.inf, "diverged": "the loss is nan", "growths": 0, "seconds": 0.0}
    runs = {k: replace(r, summary=r.closing_figures | ended) if k[0] == "grown" else r for k, r in study.runs.items()}
    arm = compare(StudyResult(runs), "grown")
    assert (arm.grown, arm.time_ratio.mean, compare(StudyResult(runs), "shallow").grown) == (True, 0.0, False)
    assert by_seed(StudyResult(runs), [arm]) == "no arm predicted anything (diverged: grown)"


def test_a_baseline_that_took_no_time_leaves_the_ratio_open(study: StudyResult) -> None:
    runs = {k: replace(r, summary=r.closing_figures | {"seconds": 0.0}) for k, r in study.runs.items()}
    assert math.isnan(compare(StudyResult(runs), "grown").time_ratio.mean)


def test_a_ratio_of_times_is_named_for_the_results(study: StudyResult) -> None:
    grown = compare(study, "grown")
    assert grown.time_to_loss is not None
    figure = {"value": grown.time_to_loss.value, "low": grown.time_to_loss.low, "high": grown.time_to_loss.high}
    figure |= {"seeds": 3, "per_seed": grown.time_to_loss.per_seed}
    assert depth_figures("toy", grown) == {"depth_time_ratio_toy": figure}
    assert depth_figures("", grown) == depth_figures("toy", compare(study, "shallow")) == {}


EDGE = "the best rate of {} is the highest tried, 0.006: bracket it"


@pytest.mark.parametrize(
    ("at_edge", "open_kinds", "open_figure"),
    [
        ("", [], False),
        ("grown", ["pays", "depth-pays", "speed"], True),
        ("control of grown", ["pays", "speed"], True),
        (CONTROL, ["depth-pays"], False),
        ("control, 125% of the steps", [], True),
    ],
)
def test_what_rests_on_a_rate_at_an_edge_is_open_and_names_the_arm(
    study: StudyResult, at_edge: str, open_kinds: list[str], open_figure: bool
) -> None:
    tried = {arm: EDGE.format(arm) if arm == at_edge else "" for arm, _ in study.runs}
    result = replace(study, tried=tried)
    claims = depth_claims(result)
    assert [claim.kind for claim in claims if EDGE.format(at_edge) in claim.text] == open_kinds
    assert all(claim.verdict == "open" for claim in claims if claim.kind in open_kinds)
    grown = compare(result, "grown")
    (figure,) = depth_figures("toy", grown).values()
    assert (figure["bracketed"], figure["unbracketed"]) == (not open_figure, (EDGE.format(at_edge),) * open_figure)
    (plain,) = depth_figures("toy", compare(study, "grown")).values()
    assert figure["value"] == plain["value"]
    assert figure["high"] == (math.inf if open_figure else plain["high"])
    assert "bracketed" not in plain, "no rates were tried"


def test_trials_are_kept_as_a_table_that_gives_the_same_edges_again() -> None:
    trial = RateTrials({0.003: 2.2, 0.0015: 2.3, 0.006: math.inf})
    rows = rate_rows({"grown": trial})
    assert rows == [{"arm": "grown", "rate": rate, "loss": loss} for rate, loss in trial.losses.items()]
    again = RateTrials({row["rate"]: row["loss"] for row in rows})
    assert (again.unbracketed("grown"), again.best) == ("", 0.003)


def test_a_run_records_its_depth(study: StudyResult) -> None:
    table = study.runs["grown", 0].steps
    assert table["depth"].tolist() == [1] * 24 + [6] * 16
    assert study.runs["baseline", 0].steps["depth"].isna().all()
    assert study.runs["grown", 0].config["hybrid"]["depth"]["rule"] == "interleave"


def test_a_control_of_the_baselines_own_length_is_refused() -> None:
    base = RunConfig("baseline", TextTaskConfig("nano"), 10)
    with pytest.raises(ValueError, match="the baseline's own length"):
        Study(base, {}, control_fractions=(0.5, 1.0))


# --- other people's models --------------------------------------------------------------------------------

LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
HUGGING_FACE = {
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": BLOCKS, "n_positions": 16},
    "llama": LLAMA | {"num_hidden_layers": BLOCKS},
    "qwen2": LLAMA | {"num_hidden_layers": BLOCKS},
    "qwen3": LLAMA | {"num_hidden_layers": BLOCKS, "head_dim": 8},
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
@pytest.mark.parametrize("rule", ["interleave", "fresh"])
def test_a_hugging_face_model_grows_in_place(kind: str, rule: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, vocab_size=32, **HUGGING_FACE[kind])
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = list(model.state_dict())
    trainer = trainer_of(model, DepthSchedule(((0, 2), (4, BLOCKS)), rule=rule))
    results = []
    for step in range(8):
        tokens = batch(step)[:, :16]
        results.append(trainer.step(lambda tokens=tokens: model(input_ids=tokens, labels=tokens).loss))
    assert [result.depth for result in results] == [2] * 4 + [BLOCKS] * 4
    assert results[-1].loss < results[0].loss
    assert list(model.state_dict()) == names
    blocks = BlockStack(model).blocks
    assert all(p.grad is not None for block in blocks for p in block.parameters())

"""The library's loop beside what else one could run: tokens per second, in turns on one device.

python -m hybridlab.benchmarks.against_others [--model small] [--batch 8x512] [--device auto] [--quick] [--out FILE]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from itertools import count, islice
from pathlib import Path
from statistics import median
from threading import Semaphore, Thread
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from hybridlab.base.device import device_name, find_device, wait_for
from hybridlab.benchmarks import one_line
from hybridlab.benchmarks.interleaved import Ratio, seconds_in_turns
from hybridlab.benchmarks.step_profile import GpuWork
from hybridlab.engine.config import HybridTrainerConfig
from hybridlab.memory.precision import autocast, matmul_precision
from hybridlab.models import GPT2Config
from hybridlab.optim import OptimizerConfig, Schedule, build_optimizer
from hybridlab.optim.build import decay_groups, hidden_matrices
from hybridlab.planner.text_report import read_batch
from hybridlab.study.config import RunConfig
from hybridlab.study.tasks import TextTaskConfig
from hybridlab.study.training import Training

Loop = Generator[None]
"""Its first item comes when model and optimizer are there, each further one after a step."""

NANOGPT, ADAMW, MUON, TORCH_MUON, TRAINER = (
    "nanoGPT's loop",
    "hybridlab, AdamW",
    "hybridlab, Muon",
    "torch.optim.Muon, per matrix",
    "Hugging Face Trainer",
)
LOOK_EVERY = 10
"""Steps after which a loop reads its loss, nanoGPT's log_interval."""

SETTLING_STEPS, PROFILED_STEPS, ENDLESS = 12, 10, 10**6


class NanoGPT(nn.Module):
    """The model of nanoGPT: GPT-2 without biases, whose logits are made whole.

    Source: https://github.com/karpathy/nanoGPT, model.py.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        width = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.embedding_rows, width), nn.Embedding(config.block_size, width)
        self.h = nn.ModuleList(NanoBlock(width, config.n_head) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(width, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and their mean cross-entropy in nats."""
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class NanoBlock(nn.Module):
    """A block of nanoGPT's model."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attention and MLP, each added to the stream."""
        parts = self.c_attn(self.ln_1(x)).chunk(3, 2)
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x))))


def nanogpt(config: RunConfig, device: torch.device, folder: Path) -> Loop:
    """The training loop of nanoGPT, from its published settings: compiled, bf16, fused AdamW, pinned windows."""
    task: Any = config.task
    (path := folder / "train.bin").write_bytes(np.asarray(task.load_text().train).tobytes())
    with device:
        model = NanoGPT(task.model_config)
    compiled: Any = torch.compile(model) if config.compiled else model
    groups, on_gpu = decay_groups(model.parameters(), 0.1), device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True if on_gpu else None)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    schedule = Schedule("cosine", warmup_steps=2000, total_steps=600_000, final_fraction=0.1)
    precision = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()

    def get_batch() -> list[Tensor]:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - task.block_size, (task.batch_size,)).tolist()
        windows = [[tokens[i + shift : i + shift + task.block_size] for i in starts] for shift in (0, 1)]
        pair = [torch.stack([torch.from_numpy(row.astype(np.int64)) for row in rows]) for rows in windows]
        return [t.pin_memory().to(device, non_blocking=True) if on_gpu else t for t in pair]

    yield
    batch = get_batch()
    for step in count():
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * schedule(step)
        with precision:
            _, loss = compiled(*batch)
        batch = get_batch()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        _look(step, loss)
        yield


def library(config: RunConfig, device: torch.device) -> Loop:
    """The library's loop, as its runs take it."""
    training = Training(config, device)
    yield
    training.warm_up_()
    for step in count():
        _look(step, training.step(step))
        yield


def torch_muon(config: RunConfig, device: torch.device) -> Loop:
    """A bare loop over the library's model, with torch's own Muon for the hidden matrices, one after the other."""
    task = config.task.build(config.seed, device)
    model: Any = torch.compile(task.model) if config.compiled else task.model
    hidden = hidden_matrices(task.model)
    muon = torch.optim.Muon(hidden, lr=config.optimizer.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for matrix in hidden:
        matrix.requires_grad_(False)
    rest = build_optimizer(task.model, replace(config.optimizer, name="adamw"))
    for matrix in hidden:
        matrix.requires_grad_(True)
    yield
    for step in count():
        with autocast(config.precision, device):
            loss = task.loss(model, task.batch(step))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        for optimizer in (muon, rest):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _look(step, loss)
        yield


def hugging_face(config: RunConfig, device: torch.device, folder: Path) -> Loop:
    """Hugging Face's Trainer with bf16 and torch_compile on its own GPT-2; it trains in a thread that waits for turns.

    Raises ImportError where transformers or accelerate are missing.
    """
    transformers: Any = import_module("transformers")
    import_module("accelerate")  # which Trainer asks for late
    task: Any = config.task
    sizes = {name: getattr(task.model_config, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"))
    settings = transformers.GPT2Config(**sizes, **dropout, **ends, n_positions=task.block_size, use_cache=False)
    model = transformers.GPT2LMHeadModel(settings)
    model.loss_type = "ForCausalLM"  # as it is: where it is guessed, a log breaks the compiled graph
    tokens = np.asarray(task.load_text().train)
    windows = tokens[: len(tokens) // task.block_size * task.block_size].reshape(-1, task.block_size).astype(np.int64)
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=ENDLESS,
        per_device_train_batch_size=task.batch_size,
        learning_rate=6e-4,
        weight_decay=0.1,
        bf16=config.precision == "bf16",
        torch_compile=config.compiled,
        optim="adamw_torch_fused" if device.type == "cuda" else "adamw_torch",
        use_cpu=device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    turns = _Turns()
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
        callbacks=[type("InTurns", (transformers.TrainerCallback,), turns.hooks())()],
    )
    yield
    yield from turns.steps(trainer.train)


class _Turns:
    """A training loop of another's in a thread of its own, which takes one step whenever one is asked for."""

    def __init__(self) -> None:
        self._asked, self._done = Semaphore(0), Semaphore(0)
        self._ends = False
        self._error: BaseException | None = None

    def hooks(self) -> dict[str, Any]:
        """The methods of a callback: before and after a step."""

        def on_step_begin(callback: object, args: object, state: object, control: Any, **_: object) -> None:
            self._asked.acquire()

        def on_step_end(callback: object, args: object, state: object, control: Any, **_: object) -> None:
            control.should_training_stop = self._ends
            self._done.release()

        return {"on_step_begin": on_step_begin, "on_step_end": on_step_end}

    def steps(self, train: Any) -> Generator[None]:
        """Step by step; closing takes one more and ends the loop. An error of the loop is raised here."""
        thread = Thread(target=self._run, args=(train,), daemon=True)
        thread.start()
        try:
            while True:
                self._asked.release()
                self._done.acquire()
                if self._error:
                    raise self._error
                yield
        finally:
            self._ends = True
            self._asked.release()
            thread.join()

    def _run(self, train: Any) -> None:
        try:
            train()
        except BaseException as error:  # raised again where the step was asked for
            self._error = error
        self._done.release()


def _look(step: int, result: Any) -> None:
    """Read the loss now and then."""
    if step % LOOK_EVERY == 0:
        float(result.detach() if isinstance(result, Tensor) else result.measured_loss)


def loops_of(config: RunConfig, device: torch.device, folder: Path) -> dict[str, Loop]:
    """Every loop. The library's come first: what it compiles anew drops what was compiled before."""
    muon = replace(config, optimizer=OptimizerConfig.tuned("muon"))
    return {
        ADAMW: library(config, device),
        MUON: library(muon, device),
        NANOGPT: nanogpt(config, device, folder),
        TORCH_MUON: torch_muon(muon, device),
        TRAINER: hugging_face(config, device, folder),
    }


def settled(loops: dict[str, Loop], device: torch.device) -> dict[str, int]:
    """Build every model, then take the first steps of every loop; bytes that each allocated at most, 0 without a GPU.

    A loop of another's that cannot run here is left out, told in one line.
    """
    built = _of_each(loops, partial(_peak_bytes, 1, device))
    taken = _of_each(loops, partial(_peak_bytes, SETTLING_STEPS, device))
    return {name: built[name] + count for name, count in taken.items()}


def _of_each(loops: dict[str, Loop], measured: Callable[[Loop], int]) -> dict[str, int]:
    found = {}
    for name, loop in list(loops.items()):
        try:
            found[name] = measured(loop)
        except Exception as error:  # whatever another's loop raises where it does not fit this machine
            if name in (ADAMW, MUON):
                raise
            del loops[name]
            print(f"{name} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
    return found


def _peak_bytes(steps: int, device: torch.device, loop: Loop) -> int:
    """What some steps allocate beyond all that was there."""
    if device.type != "cuda":
        _take(loop, steps)
        return 0
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _take(loop, steps)
    wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before


def measure(config: RunConfig, *, rounds: int, turns: int, steps: int, quick: bool = False) -> dict[str, Any]:
    """Every loop's step time, tokens per second, share of busy time and peak memory, and the two ratios.

    rounds, turns: as `seconds_in_turns` takes them; steps: per turn; quick: the loops of the two ratios alone
    """
    device = find_device(config.device)
    task: Any = config.task
    with matmul_precision(config.precision), ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        found = loops_of(config, device, folder)
        wanted = (ADAMW, MUON, NANOGPT) if quick else tuple(found)
        loops = {name: opened.enter_context(closing(found[name])) for name in wanted}
        peaks = settled(loops, device)
        turn = {name: partial(_take, loop, steps) for name, loop in loops.items()}
        seconds = seconds_in_turns(turn, device, rounds, turns)
        works = {name: GpuWork.of(partial(_take, loop, PROFILED_STEPS), device) for name, loop in loops.items()}
    rows = []
    for name, spent in seconds.items():
        step_ms, work = 1e3 * median(spent) / (turns * steps), works[name]
        rows.append(
            {
                "loop": name,
                "step_ms": step_ms,
                "tokens_per_second": 1e3 * task.batch_size * task.block_size / step_ms,
                "gpu_busy_share": min(1.0, work.busy_ms / PROFILED_STEPS / step_ms) if work else None,
                "launches_per_step": work.launches / PROFILED_STEPS if work else None,
                "peak_memory_bytes": peaks[name] if work else None,
            }
        )
    rests_on = {
        "device": device_name(device),
        "torch": str(torch.__version__),
        "rounds": rounds,
        "steps_per_round": turns * steps,
        "settings": asdict(task) | {"precision": config.precision, "compiled": config.compiled},
    }
    return {"loops": rows, "figures": figures_of(seconds, rests_on)}


def figures_of(seconds: Mapping[str, Sequence[float]], rests_on: Mapping[str, Any]) -> dict[str, Any]:
    """The library's step over nanoGPT's, and Muon's over AdamW's: medians of paired rounds with their intervals."""
    pairs = {"library_over_nanogpt_step": (ADAMW, NANOGPT), "muon_over_adamw_step": (MUON, ADAMW)}
    figures = {}
    for name, (mine, other) in pairs.items():
        if other not in seconds:
            continue
        ratio = Ratio.of(seconds[mine], seconds[other])
        ends, loops = ratio.record(), {"loop": mine, "beside": other}
        value = {"value": ends.pop("median"), **ends, "per_round": ratio.rounds}
        figures[name] = value | {"rests_on": {**loops, **rests_on}}
    return figures


def _take(loop: Loop, steps: int) -> None:
    for _ in islice(loop, steps):
        pass


def configured(model: str, batch: str, vocab_size: int, data: str, device: str) -> RunConfig:
    """The library's run: compiled, in bf16 on a GPU; as it is, in fp32, without one."""
    windows, block_size = read_batch(batch)
    on_gpu = find_device(device).type == "cuda"
    return RunConfig(
        name="adamw",
        task=TextTaskConfig(model, data, vocab_size, block_size, windows, max_bytes=0 if on_gpu else 4_000_000),
        steps=ENDLESS,
        optimizer=OptimizerConfig.tuned(),
        schedule=Schedule("constant", warmup_steps=0, total_steps=ENDLESS),
        hybrid=HybridTrainerConfig.plain(clip_norm=1.0),
        precision="bf16" if on_gpu else "fp32",
        compiled=on_gpu,
        device=device,
    )


Count = Annotated[int, typer.Option(min=1)]


def main(
    model: str = "small",
    batch: str = "8x512",
    vocab_size: int = 50257,
    data: str = "python",
    device: str = "auto",
    rounds: Count = 8,
    turns: Count = 2,
    steps: Count = 20,
    quick: Annotated[bool, typer.Option(help="The library's loops and nanoGPT's alone.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where the figures go, as JSON.")] = None,
) -> None:
    """Time every loop in turns: compiled, in bf16 on a GPU; as it is, in fp32, without one."""
    with one_line("against_others", out) as write:
        config = configured(model, batch, vocab_size, data, device)
        measured = measure(config, rounds=rounds, turns=turns, steps=steps, quick=quick)
        for row in measured["loops"]:
            print(json.dumps(row))
        for name, figure in measured["figures"].items():
            print(f"{name}: {figure['value']:.3f} [{figure['low']}, {figure['high']}]")
        write(measured)


if __name__ == "__main__":
    typer.run(main)

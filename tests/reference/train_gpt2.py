"""Hybrid predictive training of a small GPT-2, in one file. Read it from top to bottom.

While a model trains, its weights follow a path. Where that path is nearly straight, the weights can be moved along it
without computing a gradient. Such a move is called a jump. It replaces several steps.

    Warmup    gradient steps
    Full      gradient steps; the path of the weights is recorded
    Predict   the weights move along the path: no backward pass, but now and then a forward pass checks the loss
    Correct   a few gradient steps; they show how long the jump should have been; the weights move there; Full again

What is a jump worth? Compare its loss with the truncated control: a plain run of as many gradient steps as it took.

    python tests/reference/train_gpt2.py    # a plain run, a run with jumps and its truncated control, on a CPU

tests/test_reference.py shows that hybridlab computes the same, bit for bit. It has more: other predictors, guards (a
confidence threshold, a gate that tries a jump first, rollback), less memory. Here every proposed jump is taken.
"""

import math
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Settings:
    steps: int = 500  # nominal steps: gradient steps and predicted steps together
    warmup_steps: int = 60  # gradient steps of the Warmup phase, at least 1
    full_steps: int = 20  # gradient steps of a Full phase, a multiple of 4
    max_predict_steps: int = 10  # steps that a jump may replace; 0 is plain training
    correction_interval: int = 5  # inside a jump, the loss is checked after so many steps
    correct_steps: int = 5  # gradient steps of a Correct phase, at least 1
    lr: float = 2e-3
    lr_warmup_steps: int = 50
    lr_decay_share: float = 0.3  # the learning rate falls to 0 over this share of the run, at its end
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def truncated(self, steps):  # a plain run, with the learning-rate schedule fitted to its length
        return replace(self, steps=steps, lr_warmup_steps=min(self.lr_warmup_steps, steps // 3), max_predict_steps=0)


# --- the model: GPT-2, with B windows per batch, T tokens per window, width C, H heads, V tokens in the vocabulary ---
class Block(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.attn_in, self.attn_out = nn.LayerNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.ln_2, self.mlp_in, self.mlp_out = nn.LayerNorm(C), nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.attn_in(self.ln_1(x)).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, T, C / H], as q, k and v
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.ln_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """The default shape has 137,024 parameters. The output layer shares its weights with the token embedding."""

    def __init__(self, vocab_size=512, block_size=64, layers=2, heads=4, width=64):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, width), nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:  # what is added to the residual stream starts smaller: 2 * layers terms are summed
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if "_out" in name else 0.02)

    def forward(self, tokens, targets):  # both [B, T]; returns the mean cross-entropy in nats
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.ln_f(x).flatten(0, 1), self.wte.weight)  # [B * T, V]
        return F.cross_entropy(logits, targets.flatten())


# --- the data: a random walk -----------------------------------------------------------------------------
def markov_text(length, vocab_size=512, successors=16):
    """After each token come 16 possible ones; the r-th has a probability proportional to 1 / r. Returns [length]."""
    rng = np.random.default_rng(0)
    following = rng.integers(vocab_size, size=(vocab_size, successors)).tolist()
    odds = 1 / np.arange(1, successors + 1)
    text = [0]
    for rank in rng.choice(successors, size=length - 1, p=odds / odds.sum()):
        text.append(following[text[-1]][rank])
    return torch.tensor(text)


def batch_at(text, step, batch_size=8, block_size=64):
    """Random windows [B, T], and as targets the tokens one place later. The same step gives the same batch."""
    starts = torch.randint(len(text) - block_size, (batch_size, 1), generator=torch.Generator().manual_seed(step))
    places = starts + torch.arange(block_size)
    return text[places], text[places + 1]


# --- the path of the weights -----------------------------------------------------------------------------
# After each quarter of a Full phase, k steps, a row is kept per parameter group: row[i] = theta[t + k] - theta[t]
def flat(groups):
    return [torch.cat([p.detach().flatten() for p in group]) for group in groups]


def dots(a, b):
    """Inner product by parameter group: summed in float32, a Python number from there on."""
    return [torch.dot(x, y).item() for x, y in zip(a, b, strict=True)]


@torch.no_grad()
def move_(groups, row, lengths):
    """theta <- theta + length * row, with one length per parameter group."""
    for group, part, length in zip(groups, row, lengths, strict=True):
        for p, change in zip(group, part.split([p.numel() for p in group]), strict=True):
            p.add_(change.view_as(p), alpha=length)


def slope_along(groups, row, pace, norm, s):
    """Derivative of the loss along pace * row: <gradient, pace * row>, with clipping undone. float64 [group]."""
    gradient = [torch.cat([p.grad.flatten() for p in group]) for group in groups]
    return torch.tensor([pace * d for d in dots(gradient, row)], dtype=torch.float64) * max(1.0, norm / s.clip_norm)


class LossTrend:
    """What the loss did lately: its mean and its variance.

    mean     <- mean + a (loss - mean)                      a = 0.05
    variance <- (1 - a) (variance + a (loss - mean)^2)      with the mean as it was before
    """

    count, mean, variance = 0, 0.0, 0.0

    def learn(self, loss):
        self.mean = self.mean if self.count else loss
        error = loss - self.mean
        self.count, self.mean = self.count + 1, self.mean + 0.05 * error
        self.variance = (1 - 0.05) * (self.variance + 0.05 * error * error)


# --- a jump: propose, move, check, correct ---------------------------------------------------------------
@dataclass
class Jump:
    """Goes on along the newest row at the same speed, the `linear` predictor: theta[t + n] = theta[t] + (n / k) row."""

    row: list  # one flat tensor per parameter group
    pace: float  # pace * row is the jump of `horizon` steps
    scale: float  # of what the predictor proposed
    horizon: float
    steps: int  # nominal steps that it replaces
    confidence: float
    loss_before: float
    loss_change: float  # forecast, over all its steps
    slope_before: torch.Tensor  # of the loss along pace * row, [group]
    taken: int = 0  # nominal steps so far
    share: float = 1.0  # of what is left of the jump, the share that will be moved
    moved: float = 0.0  # so far, in units of pace * row

    def advance_(self, groups, interval):
        """One step of the jump. The weights move once per interval, for all its steps. Returns the predicted loss."""
        if self.taken % interval == 0:
            length = self.share * min(interval, self.steps - self.taken) / self.horizon
            move_(groups, self.row, [self.pace * length] * len(groups))
            self.moved += length
        self.taken += 1
        return self.loss_before + self.loss_change * self.taken / self.steps

    def check(self, loss, predicted, trend):
        """A loss that is 1 standard deviation too high halves what is left of the jump. 2 end it."""
        deviations = (loss - predicted) / max(math.sqrt(trend.variance), 1e-12) if trend.count >= 20 else 0.0
        if deviations > 2:
            self.steps = self.taken
            return "left Predict"
        trend.learn(loss)
        self.share *= 0.5 if deviations > 1 else 1.0
        return "shortened" if deviations > 1 else None


def propose(groups, path, norm, recent, trend, past, s):
    """The jump at the end of a Full phase. Its length follows what jumps of a similar confidence should have been.

    The confidence is how straight the path is: the cosine between its oldest row and the jump, not below 0. With fewer
    than 10 steps between the two, AdamW's momentum alone would make them alike: then it is 0.
    """
    k, longest = s.full_steps // 4, s.max_predict_steps
    oldest, newest = ([b - a for a, b in zip(path[i], path[i + 1], strict=True)] for i in (0, 3))
    pace = longest / k
    lengths = math.sqrt(sum(pace * d * pace for d in dots(newest, newest)) * sum(dots(oldest, oldest)))
    cosine = sum(pace * d for d in dots(newest, oldest)) / lengths
    confidence = min(1.0, max(0.0, cosine)) if 2 * k >= 10 else 0.0
    scale = expected_length(past, confidence)
    pace, horizon = scale * pace, max(1.0, scale * longest)
    steps = max(1, min(longest, round(horizon)))
    time, recent = np.arange(len(recent)) - (len(recent) - 1) / 2, np.array(recent)
    pace_of_loss = float(time @ recent / (time @ time))  # slope of the least-squares line, in nats per step
    change = scale * (pace_of_loss * longest) * min(1.0, steps / horizon)
    slope = slope_along(groups, newest, pace, norm, s)
    return Jump(newest, pace, scale, horizon, steps, confidence, trend.mean, change, slope)


def expected_length(past, confidence):
    """Mean wanted length of the 8 past jumps that are nearest in confidence, in units of the proposal."""
    nearest = sorted(past, key=lambda case: abs(case[0] - confidence))[:8]
    return min(1.5, max(0.05, float(np.mean([wanted for _, wanted in nearest])) if nearest else 1.0))


def wanted_length(before, after):
    """Where the slope of the loss along the jump is zero, in units of the jump: a secant step, held in [0, 1.5]."""
    length = 1.5 if after <= before else before / (before - after)
    return min(1.5, max(0.0, length)) if before < 0 else 0.0  # 0: the loss rose from the start of the jump


def correct_(groups, jump, slopes_after, past):
    """Move each parameter group to its wanted length; half of that comes from what similar jumps wanted."""
    before, after = jump.slope_before * jump.moved, torch.stack(slopes_after).mean(dim=0) * jump.moved
    taken = jump.scale * jump.moved
    usual = min(1.5, expected_length(past, jump.confidence) / taken)
    lengths = [wanted_length(*slopes) for slopes in zip(before.tolist(), after.tolist(), strict=True)]
    lengths = [0.5 * length + 0.5 * usual for length in lengths] if past else lengths
    past.appendleft((jump.confidence, wanted_length(before.sum().item(), after.sum().item()) * taken))
    move_(groups, jump.row, [jump.pace * (jump.moved * (length - 1.0)) for length in lengths])


# --- the run ---------------------------------------------------------------------------------------------
def train(model, batch_of, s):
    """All steps of a run. Returns (phase, measured loss, predicted loss, event) of each step, and the optimizer."""
    groups = [[p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    decays = zip(groups, (s.weight_decay, 0.0), strict=True)  # matrices decay; biases and norms do not
    optimizer = torch.optim.AdamW([{"params": g, "weight_decay": d} for g, d in decays], betas=(0.9, 0.999), eps=1e-8)
    trend, losses, past, history = LossTrend(), [], deque(maxlen=64), []
    phase, begin, path = "warmup", 0, []
    for step in range(s.steps):
        now, nth, batch = phase, step - begin + 1, batch_of(step)  # the nth step of this phase
        loss = predicted = event = None
        rate = min(1.0, (step + 1) / s.lr_warmup_steps, (s.steps - step) / (s.lr_decay_share * s.steps))
        for group in optimizer.param_groups:  # predicted steps count in the schedule, so that it ends with the run
            group["lr"] = s.lr * rate

        if now != "predict":  # a gradient step
            optimizer.zero_grad()
            mean_loss = model(*batch)
            mean_loss.backward()
            norm = nn.utils.clip_grad_norm_([*groups[0], *groups[1]], s.clip_norm).item()
            optimizer.step()
            loss = mean_loss.item()

        match now:
            case "warmup" if nth == s.warmup_steps:
                phase = "full"
            case "full" if s.max_predict_steps and nth % (s.full_steps // 4) == 0:
                path.append(flat(groups))
                if nth == s.full_steps:
                    jump = propose(groups, path, norm, losses[-21:-1], trend, past, s)
                    phase, event = "predict", "accepted"
            case "predict":
                predicted = jump.advance_(groups, s.correction_interval)
                if jump.taken % s.correction_interval == 0 or jump.taken == jump.steps:
                    with torch.no_grad():
                        loss = model(*batch).item()
                    event = jump.check(loss, predicted, trend)
                if jump.taken == jump.steps:
                    phase, slopes_after = "correct", []
            case "correct":
                slopes_after.append(slope_along(groups, jump.row, jump.pace, norm, s))
                if nth == s.correct_steps:
                    correct_(groups, jump, slopes_after, past)
                    phase = "full"

        if now != "predict":
            losses.append(loss)
            if len(losses) > 1:  # one step late, as in the library, where no step waits until a GPU has its loss
                trend.learn(losses[-2])
        if phase != now:
            begin, path = step + 1, [flat(groups)]
        history.append((now, loss, predicted, event))
    return history, optimizer


def run(name, text, s):
    """Train one model, print its loss on text that it has never seen; returns the gradient steps that it took."""
    torch.manual_seed(0)  # the same first weights and the same batches for all
    model, training, held_out = GPT2(), text[:180_000], text[180_000:]
    history, _ = train(model, lambda step: batch_at(training, step), s)
    with torch.no_grad():
        loss = model(*batch_at(held_out, 0, batch_size=256)).item()
    gradient_steps = sum(phase != "predict" for phase, *_ in history)
    print(f"{name:18}{gradient_steps:5} gradient steps, validation loss {loss:.4f} nats", flush=True)
    return gradient_steps


if __name__ == "__main__":
    torch.set_num_threads(1)  # a model this small trains fastest on one thread
    text, s = markov_text(200_000), Settings()
    run("plain", text, s.truncated(s.steps))
    run("truncated control", text, s.truncated(run("with jumps", text, s)))
    print("Jumps are worth something only if the run with jumps ends below its truncated control, over several seeds.")

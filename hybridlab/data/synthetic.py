"""Tokens made on the spot, with a known floor for the loss: a Markov chain, and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from hybridlab.data.cache import tokens_sha256
from hybridlab.data.token_batches import TextData, Tokens

TRAIN_TOKENS = 2_000_000
BYTES_PER_STORED_TOKEN = 2
MOST_SUCCESSORS = 32


@dataclass(frozen=True, eq=False)
class MarkovChain:
    """A first-order chain: from state i, the successor of rank r follows with a probability like 1/r.

        P(next = successors[i, r]) = weights[r],    weights[r] ∝ 1 / (r + 1)

    successors: [states, ranks], state by rank; a state named twice in a row gets both weights
    weights: [ranks], sum 1; the same for every state (Zipf's law)
    """

    successors: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]

    @classmethod
    def random(cls, states: int, rng: np.random.Generator) -> Self:
        """Draw a chain of at most 32 successors per state that visits every state.

        The last rank walks one cycle through all states, so that all are reached; state 0 may stay where
        it is, so that the chain has no period: together a unique stationary distribution.
        """
        ranks = min(MOST_SUCCESSORS, max(2, states // 4))
        successors = rng.integers(states, size=(states, ranks))
        cycle = rng.permutation(states)
        successors[cycle, -1] = np.roll(cycle, -1)
        successors[0, 0] = 0
        weights = 1 / np.arange(1, ranks + 1)
        return cls(successors, weights / weights.sum())

    def transitions(self) -> csr_array:
        """The transition matrix, row i the distribution of what follows i."""
        states, ranks = self.successors.shape
        rows = np.repeat(np.arange(states), ranks)
        entries = (np.tile(self.weights, states), (rows, self.successors.ravel()))
        return csr_array(entries, shape=(states, states))  # repeated entries are summed

    def stationary(self) -> npt.NDArray[np.float64]:
        """The share of time spent in each state, by power iteration: pi = pi P."""
        transposed = self.transitions().T.tocsr()
        share = np.full(len(self.successors), 1 / len(self.successors))
        for _ in range(100_000):
            previous, share = share, transposed @ share
            if np.abs(share - previous).sum() < 1e-13:
                break
        return share / share.sum()

    def entropy_rate_nats(self) -> float:
        """The entropy of a token given the one before: H = -sum_i pi_i sum_j P_ij ln P_ij.

        A perfect model expects this loss on every target of a window, the first included, since each
        target's predecessor is among the inputs.
        """
        matrix = self.transitions()
        matrix.data = -matrix.data * np.log(matrix.data)
        return float(self.stationary() @ matrix.sum(axis=1))

    def sample(self, count: int, rng: np.random.Generator) -> Tokens:
        """One unbroken walk of `count` tokens from a random state."""
        table = self.successors.tolist()
        ranks = rng.choice(len(self.weights), size=count - 1, p=self.weights).tolist()
        start = int(rng.integers(len(table)))
        walk = accumulate(ranks, lambda state, rank: table[state][rank], initial=start)
        return np.fromiter(walk, dtype=np.uint16, count=count)


def load_markov(*, vocab_size: int, seed: int, max_bytes: int | None) -> TextData:
    """Walk a seeded Markov chain; its entropy rate is the floor of the loss."""
    chain_rng, *rngs = np.random.default_rng(seed).spawn(3)
    chain = MarkovChain.random(vocab_size, chain_rng)
    train, validation = (chain.sample(count, rng) for count, rng in zip(_counts(max_bytes), rngs, strict=True))
    description = "a seeded Markov chain with Zipf-weighted successors: its entropy is known"
    sha256, floor = tokens_sha256(train, validation), chain.entropy_rate_nats()
    return TextData("markov", description, train, validation, vocab_size, sha256, entropy_floor_nats=floor)


def load_uniform(*, vocab_size: int, seed: int, max_bytes: int | None) -> TextData:
    """Draw independent uniform tokens; no model can do better than ln(vocab_size)."""
    rngs = np.random.default_rng(seed).spawn(2)
    train, validation = (
        rng.integers(vocab_size, size=count, dtype=np.uint16)
        for count, rng in zip(_counts(max_bytes), rngs, strict=True)
    )
    description = "uniform random tokens: nothing to learn"
    sha256, floor = tokens_sha256(train, validation), math.log(vocab_size)
    return TextData("uniform", description, train, validation, vocab_size, sha256, entropy_floor_nats=floor)


def _counts(max_bytes: int | None) -> tuple[int, int]:
    """Tokens to train on and to validate with."""
    train = min(TRAIN_TOKENS, (max_bytes or math.inf) // BYTES_PER_STORED_TOKEN)
    return max(1, int(train)), max(1, int(train) // 10)

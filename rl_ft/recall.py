"""Instants that were simulated once and are told again later.

To simulate is what costs; to ask is cheap. Where every legal phase of an instant was branched, the
reward of any answer is known, so the policy of a later step can be asked about it anew: its
answers are sampled then, nothing is off-policy but the choice of the instant.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from envs.types import Decision
from rl_ft.worlds import Tried

NUM_WAITING = 256
"""Instants that wait before one is drawn: tellings of an instant must not meet in one batch,
where they would pull in the same direction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instant:
    """A decision, and what each of its legal phases led to."""

    decision: Decision
    tried: Tried


class Recall:
    """Keeps every instant for `times` further tellings, drawn in random order.

    Example:
        recall = Recall(times=3, seed=1)
        recall.add(instant)
        recall.draw(2)   # [] until enough instants wait
    """

    def __init__(self, *, times: int, seed: int, num_waiting: int = NUM_WAITING) -> None:
        self.times = times
        self._num_waiting = num_waiting
        self._rng = random.Random(seed)
        self._waiting: list[Instant] = []

    def add(self, instant: Instant) -> None:
        """To be told `times` more times."""
        self._waiting += [instant] * self.times

    def ready(self) -> int:
        """How many can be drawn."""
        return max(0, len(self._waiting) - self._num_waiting)

    def draw(self, num: int) -> list[Instant]:
        """Up to `num` instants; none of them will be told more often than it was added."""
        drawn = []
        for _ in range(min(num, self.ready())):
            place = self._rng.randrange(len(self._waiting))
            self._waiting[place], last = self._waiting[-1], self._waiting[place]
            self._waiting.pop()
            drawn.append(last)
        return drawn

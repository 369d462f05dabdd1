"""Instants that were simulated once and are told again later.

To simulate is what costs; to ask is cheap. Where every legal phase of an instant was branched, the
reward of any answer is known, so the policy of a later step can be asked about it anew: what it
gives is sampled then, and only the choice of the instant is an earlier policy's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from envs.answers import options
from envs.types import Decision
from rl_ft.worlds import RandomState, Tried


@dataclass(frozen=True, kw_only=True, slots=True)
class Instant:
    """A decision, and what each of its legal answers led to."""

    decision: Decision
    tried: Tried
    times_told: int = 0

    def put_back(self, *, told: bool) -> Instant:
        """The same for later; that the executed branch agreed has been counted."""
        tried = replace(self.tried, agreed=None)
        return replace(self, tried=tried, times_told=self.times_told + told)

    def is_complete(self) -> bool:
        """Everything that may be answered was tried, so any answer has its reward."""
        return set(options(self.decision)) <= self.tried.outcomes.keys()


class Recall:
    """Instants that wait to be told again, drawn in random order once `num_waiting` are left.

    Tellings of an instant should lie apart: close together they pull in the same direction.

    Example:
        recall = Recall(seed=1, num_waiting=1)
        recall.add(instant)
        recall.draw(2)   # [] until more instants wait
    """

    def __init__(self, *, seed: int, num_waiting: int) -> None:
        self._num_waiting = num_waiting
        self._rng = random.Random(seed)
        self._waiting: list[Instant] = []

    @property
    def waiting(self) -> tuple[Instant, ...]:
        """All that were added and not drawn."""
        return tuple(self._waiting)

    @property
    def random_state(self) -> RandomState:
        """What the next draws depend on."""
        return self._rng.getstate()

    def restore(self, random_state: RandomState, waiting: Sequence[Instant]) -> None:
        """Go on from where another one was."""
        self._rng.setstate(random_state)
        self._waiting = list(waiting)

    def add(self, instant: Instant) -> None:
        """To be told once more."""
        self._waiting.append(instant)

    def ready(self) -> int:
        """How many can be drawn."""
        return max(0, len(self._waiting) - self._num_waiting)

    def draw(self, num: int) -> list[Instant]:
        """Up to `num` instants; each leaves for as often as it was added."""
        drawn = []
        for _ in range(min(num, self.ready())):
            place = self._rng.randrange(len(self._waiting))
            drawn.append(self._waiting[place])
            self._waiting[place] = self._waiting[-1]
            self._waiting.pop()
        return drawn

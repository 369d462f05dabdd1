"""What the loop must know, beside a checkpoint, to go on from it as if nothing had happened.

Where every world stands and which instants wait to be told again: without them a resumed run would
train on as well, but on other traffic. One file per version, which appears whole or not at all and
is there before the checkpoint is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from envs.types import Action, Decision, Outcome
from rl_ft.recall import Instant, RandomState, Recall
from rl_ft.rows import Record
from rl_ft.run_folder import write_atomically
from rl_ft.worlds import Standing, Tried

log = logging.getLogger(__name__)


class Waiting(Record):
    """An instant that waits to be told again."""

    decision: Decision
    actions: tuple[Action, ...]
    outcomes: tuple[Outcome, ...]
    """Of the actions, in their order."""
    times_told: int

    @classmethod
    def of(cls, instant: Instant) -> Self:
        """As a record."""
        tried = instant.tried.outcomes
        return cls(
            decision=instant.decision,
            actions=tuple(tried),
            outcomes=tuple(tried.values()),
            times_told=instant.times_told,
        )

    def instant(self) -> Instant:
        """As it was."""
        outcomes = dict(zip(self.actions, self.outcomes, strict=True))
        return Instant(
            decision=self.decision, tried=Tried(outcomes=outcomes), times_told=self.times_told
        )


class Recalled(Record):
    """A `Recall`: what waits, and what its next draws will be."""

    random_state: RandomState
    waiting: tuple[Waiting, ...]


class Memory(Record):
    """Of one version; a part per world actor."""

    standings: tuple[tuple[Standing, ...], ...]
    recalls: tuple[Recalled, ...]

    @classmethod
    def of(cls, standings: Sequence[Sequence[Standing]], recalls: Sequence[Recall]) -> Self:
        """As a record."""
        return cls(
            standings=tuple(map(tuple, standings)),
            recalls=tuple(
                Recalled(
                    random_state=recall.random_state,
                    waiting=tuple(map(Waiting.of, recall.waiting)),
                )
                for recall in recalls
            ),
        )

    def dealt(self, num_worlds: Sequence[int]) -> Memory | None:
        """The same for other world actors, with so many worlds each; None if that cannot be.

        What was looked up in a part of a dataset is of no use with another part.
        """
        worlds = [standing for part in self.standings for standing in part]
        if len(worlds) != sum(num_worlds) or any(standing.ahead for standing in worlds):
            return None
        waiting = [instant for recall in self.recalls for instant in recall.waiting]
        in_turn = iter(worlds)
        return Memory(
            standings=tuple(tuple(islice(in_turn, num)) for num in num_worlds),
            recalls=tuple(
                Recalled(
                    random_state=self.recalls[i % len(self.recalls)].random_state,
                    waiting=tuple(waiting[i :: len(num_worlds)]),
                )
                for i in range(len(num_worlds))
            ),
        )

    def restore(self, recalls: Sequence[Recall]) -> None:
        """Bring fresh recalls to where these were."""
        for recall, kept in zip(recalls, self.recalls, strict=True):
            recall.restore(kept.random_state, [waiting.instant() for waiting in kept.waiting])


class Memories:
    """Memories in a folder, by version.

    Example:
        memories.add(20, Memory.of(standings, recalls))
        memories.get(20, num_worlds=(12, 12))   # None where there is none that fits
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def add(self, version: int, memory: Memory) -> None:
        """Keep one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(version), memory.model_dump_json())

    def get(self, version: int, *, num_worlds: Sequence[int]) -> Memory | None:
        """That of a version, for actors with so many worlds each; None, with a warning, if it is of
        no use."""
        file = self._file(version)
        if not file.is_file():
            return None
        try:
            memory = Memory.model_validate_json(file.read_bytes())
        except ValidationError as error:
            log.warning("%s is not as it was written, worlds begin anew: %s", file, error)
            return None
        if len(memory.standings) == len(num_worlds):
            return memory
        dealt = memory.dealt(num_worlds)
        if dealt is None:
            log.warning("%s is of %d world actors, worlds begin anew", file, len(memory.standings))
        return dealt

    def keep_only(self, versions: Collection[int]) -> None:
        """Forget all others."""
        for file in self._folder.glob("[0-9]*.json"):
            if int(file.stem) not in versions:
                file.unlink()

    def _file(self, version: int) -> Path:
        return self._folder / f"{version}.json"

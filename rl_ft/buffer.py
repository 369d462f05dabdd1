"""Where the loop and the learner meet: groups one way, weights and metrics the other.

Every group carries the version it was sampled under, and a batch is admitted only for the step
that follows that version: nothing stale is ever trained on. Plain asyncio; `rl_ft.actors` makes
it a Ray actor. Every wait is bounded by the caller, who checks that the other side lives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from rl_ft.types import RolloutGroup, WeightsRef


class StaleGroups(Exception):  # noqa: N818 - a rejected admission, not a fault
    """Groups were offered for a step that they were not sampled for."""


class TrainingEnded(Exception):  # noqa: N818 - a wish, not a fault
    """The loop wants no further optimiser step."""


class GroupBuffer:
    """One step's groups at a time, and the latest weights and metrics."""

    def __init__(self, *, max_staleness: int = 0) -> None:
        self._max_staleness = max_staleness
        self._batches: dict[int, tuple[RolloutGroup, ...]] = {}
        self._weights: WeightsRef | None = None
        self._sequence = 0
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._recorded: int | None = None
        self._mismatch: tuple[int, float] | None = None
        self._ended = False
        self._changed = asyncio.Condition()

    async def put_groups(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Admit the groups that optimiser step `step` (counted from 0) trains on.

        Raises:
            StaleGroups: a group's weights are older than the step allows.
        """
        oldest = min((group.weights_version for group in groups), default=step)
        if step - oldest > self._max_staleness:
            raise StaleGroups(
                f"step {step} may train on weights {step - self._max_staleness} or newer, "
                f"got {oldest}"
            )
        async with self._changed:
            self._batches = {step: tuple(groups)}
            self._changed.notify_all()

    async def get_groups(self, step: int, timeout_s: float) -> tuple[RolloutGroup, ...] | None:
        """The groups of a step; None if they have not come in time.

        Raises:
            TrainingEnded: they will not come.
        """

        def ready() -> tuple[RolloutGroup, ...] | None:
            if self._ended and step not in self._batches:
                raise TrainingEnded(f"step {step} is not wanted")
            return self._batches.get(step)

        return await self._wait(ready, timeout_s)

    async def end(self) -> None:
        """No step is wanted beyond those whose groups are here."""
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    async def publish(self, weights: WeightsRef) -> None:
        """A new version is ready for the sampler; also after a restart of the learner."""
        async with self._changed:
            self._weights = weights
            self._sequence += 1
            self._changed.notify_all()

    async def next_weights(self, after: int, timeout_s: float) -> tuple[int, WeightsRef] | None:
        """The latest publication and its running number, once that is above `after`."""
        return await self._wait(
            lambda: (
                (self._sequence, self._weights)
                if self._weights and self._sequence > after
                else None
            ),
            timeout_s,
        )

    async def report(self, step: int, values: dict[str, float]) -> None:
        """The learner's metrics of a step."""
        async with self._changed:
            self._metrics.append((step, values))
            self._recorded = None
            self._changed.notify_all()

    async def refuse(self, step: int, mismatch: float) -> None:
        """The learner will not update: trainer and sampler are `mismatch` nats apart."""
        self._mismatch = (step, mismatch)

    async def refused(self) -> tuple[int, float] | None:
        """The step and mismatch of a refused update, if there was one."""
        return self._mismatch

    async def take_metrics(self) -> list[tuple[int, dict[str, float]]]:
        """The learner's metrics since the last call."""
        taken, self._metrics = self._metrics, []
        return taken

    async def confirm(self, step: int) -> None:
        """The metrics of `step` are on disk."""
        async with self._changed:
            self._recorded = step
            self._changed.notify_all()

    async def recorded(self, step: int, timeout_s: float) -> bool:
        """Whether `step` is the latest one on disk, once it is or the time is up."""
        found = await self._wait(lambda: self._recorded == step or None, timeout_s)
        return found is not None

    async def _wait(self, ready: object, timeout_s: float) -> object:
        async def until() -> object:
            async with self._changed:
                await self._changed.wait_for(lambda: ready() is not None)
                return ready()

        try:
            return await asyncio.wait_for(until(), timeout_s)
        except TimeoutError:
            return None

"""Where the loop and the learner meet: groups one way, weights and metrics the other.

Every group carries the version it was sampled under, and what is older than `rl_ft.admission`
allows is never handed on. Groups are submitted, then in flight, and end as trained on, when the
learner reports their step, or as dropped, when it begins again before that; every group is counted
in exactly one of these. Plain asyncio; `rl_ft.actors` makes it a Ray actor. Every wait is bounded
by the caller, who checks that the other side lives.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from rl_ft.admission import Admission
from rl_ft.types import Publication, RolloutGroup, WeightsRef


class StaleGroups(Exception):  # noqa: N818 - a rejected admission, not a fault
    """Groups were offered for a step that may not train on them."""


class TrainingEnded(Exception):  # noqa: N818 - a wish, not a fault
    """The loop wants no further optimiser step."""


class GroupBuffer:
    """The groups of the steps to come, the weights not yet seen, and the latest metrics."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._batches: dict[int, tuple[RolloutGroup, ...]] = {}
        self._num_submitted = self._num_trained = self._num_dropped = 0
        self._publications: deque[Publication] = deque()
        self._newest: Publication | None = None
        self._began = 0
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._recorded: int | None = None
        self._refused: tuple[int, str] | None = None
        self._ended = False
        self._changed = asyncio.Condition()

    async def put_groups(self, step: int, groups: Sequence[RolloutGroup], *, under: int) -> None:
        """Admit the groups that optimiser step `step` (counted from 0) trains on.

        They are dropped if the learner has begun again since publication number `under`, which
        they were sampled under: it will make that version anew, and maybe otherwise.

        Raises:
            StaleGroups: a group's weights are older than the step allows.
        """
        async with self._changed:
            if under < self._began:
                self._num_submitted += len(groups)
                self._num_dropped += len(groups)
                return
            for group in groups:
                if not self._admission.admits(step, group.weights_version):
                    raise StaleGroups(
                        f"step {step} may train on weights "
                        f"{self._admission.oldest_version(step)} to {step}, "
                        f"got {group.weights_version}"
                    )
            assert step not in self._batches, f"step {step} has its groups already"
            self._num_submitted += len(groups)
            self._batches[step] = tuple(groups)
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

    async def has_ended(self) -> bool:
        """Whether no step is wanted beyond those whose groups are here."""
        return self._ended

    async def publish(self, weights: WeightsRef) -> None:
        """A new version is ready for the sampler; or the learner begins, or begins again.

        A version that is not above the last one means the latter: what is in flight is dropped.
        """
        async with self._changed:
            last = self._newest
            begins = last is None or weights.version <= last.weights.version
            number = 1 if last is None else last.number + 1
            self._newest = Publication(number=number, weights=weights, begins=begins)
            if begins:
                self._began = number
                self._publications.clear()
                self._num_dropped += self._num_in_flight()
                self._batches.clear()
            self._publications.append(self._newest)
            self._changed.notify_all()

    async def next_weights(self, after: int, timeout_s: float) -> Publication | None:
        """The publication that follows number `after`; None if it has not come in time.

        One after the other, so that which version samples what depends on nobody's speed. Those of
        a learner that is gone are left out.
        """

        def following() -> Publication | None:
            while self._publications and self._publications[0].number <= after:
                self._publications.popleft()
            return self._publications[0] if self._publications else None

        return await self._wait(following, timeout_s)

    async def counts(self) -> dict[str, float]:
        """Groups since the loop began; submitted = trained + dropped + in flight."""
        return {
            "buffer/submitted_groups": float(self._num_submitted),
            "buffer/trained_groups": float(self._num_trained),
            "buffer/dropped_groups": float(self._num_dropped),
            "buffer/in_flight_groups": float(self._num_in_flight()),
        }

    def _num_in_flight(self) -> int:
        return sum(map(len, self._batches.values()))

    async def report(self, step: int, values: dict[str, float]) -> None:
        """The learner's metrics after `step` updates: it has trained on the groups of the last."""
        async with self._changed:
            self._num_trained += len(self._batches.pop(step - 1, ()))
            self._metrics.append((step, values))
            self._recorded = None
            self._changed.notify_all()

    async def refuse(self, step: int, why: str) -> None:
        """The learner will not make the update of `step`: trainer and sampler disagree."""
        self._refused = (step, why)

    async def refused(self) -> tuple[int, str] | None:
        """The step of a refused update and why, if there was one."""
        return self._refused

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

"""The actors of a run as its loop sees them: one that dies or no longer answers is replaced.

A world actor's successor begins new episodes, and what was asked of the dead one counts as failed;
a generator's successor is given the weights that the others hold, and what was asked is asked
again. Every call has a deadline, and every actor may be replaced so many times and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from rl_ft.lineage import Suspects
from rl_ft.parity import UNKNOWN
from rl_ft.types import Completion, WeightsRef
from rl_ft.worlds import Order, Standing, State, Tried

log = logging.getLogger(__name__)

DEAD = "actor_died"
"""Cause of failure of all worlds of an actor that had to be replaced."""

CLOSE_S = 30.0
"""How long the worlds of an actor may take to end by themselves."""


Start = Callable[[int], Any]
"""Starts an actor; told how many it follows in its place."""


class ActorError(Exception):
    """An actor of the run died or stopped answering more often than `ray.max_failures`."""


class Replaced(Exception):  # noqa: N818 - what was asked is lost, the run is not
    """The actor that was asked is gone; another one stands in its place."""


class Post:
    """A place that an actor holds; who takes it over is told what `brief` names.

    Example:
        post = Post("world actor 0", start, max_failures=3)
        await post.ask("states", timeout_s=60)
    """

    def __init__(
        self,
        name: str,
        start: Start,
        *,
        max_failures: int,
        brief: Callable[[], tuple[str, tuple[object, ...]] | None] = lambda: None,
    ) -> None:
        self.name = name
        self.actor = start(0)
        self._start, self._brief = start, brief
        self._max_failures, self._num_failures = max_failures, 0
        self._ready: Any = None

    async def ask(self, method: str, *args: object, timeout_s: float, **settings: Any) -> Any:
        """Call the actor and wait for the answer.

        Raises:
            Replaced: it died, or took longer; the next one may be asked.
            ActorError: that has happened too often.
        """
        actor = self.actor
        try:
            if self._ready is not None:
                await asyncio.wait_for(self._ready, timeout_s)
            answer = getattr(actor, method).remote(*args, **settings)
            return await asyncio.wait_for(answer, timeout_s)
        except (RayActorError, ObjectLostError) as death:
            if getattr(death, "actor_init_failed", False):
                # What it could not begin with, the next one cannot either.
                raise
            cause, why = f"it died ({_last_line(death)})", death
        except (TimeoutError, GetTimeoutError) as late:
            cause, why = f"{method} took longer than {timeout_s:g} s", late
        # Of several calls that one death ends, the first replaces.
        if self.actor is actor:
            self._replace(cause, why)
        raise Replaced(f"{self.name} was replaced: {cause}") from why

    async def insist(self, method: str, *args: object, timeout_s: float) -> Any:
        """Ask until there is an answer, whoever gives it; ActorError as in `ask`."""
        while True:
            try:
                return await self.ask(method, *args, timeout_s=timeout_s)
            except Replaced:
                continue

    def _replace(self, cause: str, why: BaseException) -> None:
        self._num_failures += 1
        ray.kill(self.actor)
        if self._num_failures > self._max_failures:
            raise ActorError(
                f"{self.name} failed {self._num_failures} times, ray.max_failures is "
                f"{self._max_failures}; the last time, {cause}"
            ) from why
        log.warning("%s is replaced: %s", self.name, cause)
        self.actor = self._start(self._num_failures)
        told = self._brief()
        self._ready = None if told is None else getattr(self.actor, told[0]).remote(*told[1])


class RemoteWorlds:
    """`rl_ft.rollout.Worlds` over a world actor."""

    def __init__(
        self,
        post: Post,
        *,
        num_worlds: int,
        call_timeout_s: float,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.post, self._release = post, release
        self.num_worlds = num_worlds
        # Of each of its worlds something is asked, one after the other.
        self._timeout_s = call_timeout_s * (num_worlds + 1)

    async def states(self) -> list[State]:
        """See `WorldPool.states`."""
        try:
            return await self.post.ask("states", timeout_s=self._timeout_s)
        except Replaced:
            return [DEAD] * self.num_worlds

    async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
        """See `WorldPool.settle`."""
        try:
            return await self.post.ask("settle", list(orders), timeout_s=self._timeout_s)
        except Replaced:
            lost = Tried(outcomes={}, failure=DEAD)
            return [None if order is None else lost for order in orders]

    async def standing(self) -> list[Standing]:
        """See `WorldPool.standing`."""
        return await self.post.insist("standing", timeout_s=self._timeout_s)

    async def stand(self, standings: Sequence[Standing]) -> None:
        """See `WorldPool.stand`."""
        await self.post.insist("stand", tuple(standings), timeout_s=self._timeout_s)

    def close(self) -> None:
        """End the worlds and the actor."""
        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(self.post.actor.close.remote(), timeout=CLOSE_S)
        ray.kill(self.post.actor)
        self._release()


class Samplers:
    """The generators of a run as one: all hold the same weights, the least loaded is asked.

    Which one answers changes nothing, as long as `generation.reproducible` is on.
    """

    def __init__(
        self,
        starts: Sequence[Start],
        *,
        max_failures: int,
        call_timeout_s: float,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self._release = release
        self.posts = [
            Post(f"generator {i}", start, max_failures=max_failures, brief=lambda: self._current)
            for i, start in enumerate(starts)
        ]
        self._timeout_s = call_timeout_s
        self._num_waiting = [0] * len(self.posts)
        self._current: tuple[str, tuple[object, ...]] | None = None

    async def generate(
        self, prompts: Sequence[Sequence[int]], **settings: Any
    ) -> list[list[Completion]]:
        """See `Generator.generate`."""
        weight = len(prompts) + len(settings.get("greedy", ()))
        while True:
            chosen = min(range(len(self.posts)), key=self._num_waiting.__getitem__)
            self._num_waiting[chosen] += weight
            try:
                return await self.posts[chosen].ask(
                    "generate", prompts, timeout_s=self._timeout_s, **settings
                )
            except Replaced:
                continue
            finally:
                self._num_waiting[chosen] -= weight

    async def load(self, ref: WeightsRef) -> None:
        """Answer with a published version from now on."""
        self._current = ("load", (ref,))
        were_sent = await self._insist("load", ref)
        if ref.offer is not None and not all(were_sent):
            num = were_sent.count(False)
            log.warning("version %d: %d generators fetched it", ref.version, num)

    async def load_folder(self, model_path: str) -> None:
        """Answer with the weights of a model folder, as version 0."""
        self._current = ("load_folder", (model_path,))
        await self._insist("load_folder", model_path)

    async def check_parity(self, *args: object) -> list[Any]:
        """The gate before training, through every generator: see `GeneratorService`."""
        # It leaves the weights that a generator starts with.
        self._current = None
        return await self._insist("check_parity", *args)

    async def diagnose(self, model_path: str, suspects: Suspects, bound: float) -> str:
        """The first cause that a generator finds out: see `GeneratorService.diagnose`."""
        new, groups = suspects.claimed, suspects.groups
        for old in suspects.earlier:
            causes = await self._insist("diagnose", model_path, new, old, groups, bound)
            for cause in causes:
                if cause != UNKNOWN:
                    return cause
        return UNKNOWN

    def close(self) -> None:
        """End all of them."""
        for post in self.posts:
            ray.kill(post.actor)
            self._release()

    async def _insist(self, method: str, *args: object) -> list[Any]:
        timeout_s = self._timeout_s
        asked = (post.insist(method, *args, timeout_s=timeout_s) for post in self.posts)
        return await asyncio.gather(*asked)


def _last_line(error: Exception) -> str:
    """Where Ray says what it was; the first lines are the same for every death."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

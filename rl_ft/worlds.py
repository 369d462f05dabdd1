"""A few traffic worlds under one roof: each always waits for the policy.

Plain class without Ray. Worlds are driven by a mixture of the policy and classical controllers,
so that training sees states the policy reaches by itself and states it would not. A world that
dies is replaced and what depended on it is reported as failed, never scored.

Where the policy is the driver (`rollout.behaviour`), it makes every choice of every junction
between two questions: what it must learn to leave again are the states that it drives into. During
the interval after a question the other junctions follow `reward.follow`, as in its branches.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from envs.answers import offered
from envs.errors import UserError, WorldError
from envs.scenario import load_scenario
from envs.types import Action, Decision, JointAction, Outcome
from rl_ft.config import Config
from rl_ft.journal import Journal, JournaledWorld
from rl_ft.sections import BehaviourConfig

log = logging.getLogger(__name__)

MAX_BARREN_EPISODES = 3
"""Episodes in a row with nothing to ask, after which the settings must be wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What to try at a world's current decision: distinct actions, and the one to execute."""

    actions: tuple[Action, ...]
    executed: Action | None
    """The policy's own choice; None if it made none (an invalid answer): the base decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """Outcome by action; or the cause of the world's failure."""

    outcomes: dict[Action, Outcome]
    failure: str | None = None
    agreed: bool | None = None
    """The live world equals the branch of the executed action after one interval; None where
    that action was not branched."""


State = Decision | tuple[Decision, ...] | str
"""Where a world stands: a decision to ask about and to branch; or the decisions that the policy is
to make, all of one instant, because it drives; or the cause why there is none."""

RandomState = tuple[int, tuple[int, ...], float | None]
"""What `random.Random.getstate` gives."""

Order = Trial | JointAction
"""What a world is to do: try and execute, or just execute the policy's choices."""


class _Episode:
    """One world with its scenario, clock and current driver."""

    def __init__(self, world: JournaledWorld, end_s: float) -> None:
        self.world = world
        self.end_s = end_s
        self.driver = "policy"
        self.driver_until_s = -1.0
        self.decision: Decision | None = None
        self.forced: JointAction = {}
        """What the junctions do that have no choice while the policy drives."""
        self.pause = 0
        """Decision intervals that pass before the next question."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """Where one world of a pool stands, and what its next draws will be."""

    random_state: RandomState
    num_barren: int = 0
    journal: Journal | None = None
    """None: its next episode is yet to begin."""
    end_s: float = 0.0
    driver: str = "policy"
    driver_until_s: float = -1.0
    pause: int = 0
    ahead: tuple[int, ...] = ()
    """Of a pool that looks instants up: those that come next, by their places."""


class WorldPool:
    """`num_worlds` simulations, advanced one decision at a time.

    `states()` and `settle()` alternate. The seed decides scenarios, drivers and junctions.
    """

    def __init__(
        self, config: Config, scenarios: Sequence[str], *, seed: int, num_worlds: int
    ) -> None:
        self._config = config
        self._rollout = config.rollout
        self._scenarios = tuple(scenarios)
        self._rngs = [random.Random(f"{seed}/{i}") for i in range(num_worlds)]
        self._episodes: list[_Episode | None] = [None] * num_worlds
        self._num_barren = [0] * num_worlds
        """Episodes that ended since the last question."""

    def pids(self) -> list[int]:
        """Process ids of the worlds that are running."""
        return [episode.world.plain.pid for episode in self._episodes if episode]

    def states(self) -> list[State]:
        """Where every world stands."""
        return [self._state(i) for i in range(len(self._episodes))]

    def _state(self, index: int) -> State:
        try:
            return self._next_state(index)
        except WorldError as error:
            return self._fail(index, error)

    def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
        """Branch what is to be tried, then execute; None for a world that does not wait."""
        return [None if order is None else self._settle(i, order) for i, order in enumerate(orders)]

    def standing(self) -> list[Standing]:
        """Where every world stands, between `settle` and `states`."""
        return [self._standing(i) for i in range(len(self._episodes))]

    def _standing(self, index: int) -> Standing:
        episode = self._episodes[index]
        driven = {}
        if episode:
            driven = {
                "journal": episode.world.journal(),
                "end_s": episode.end_s,
                "driver": episode.driver,
                "driver_until_s": episode.driver_until_s,
                "pause": episode.pause,
            }
        return Standing(
            random_state=self._rngs[index].getstate(),
            num_barren=self._num_barren[index],
            **driven,
        )

    def stand(self, standings: Sequence[Standing]) -> None:
        """Go back to where the worlds of an equal pool stood."""
        for index, standing in enumerate(standings):
            self._end(index)
            self._rngs[index].setstate(standing.random_state)
            self._num_barren[index] = standing.num_barren
            if standing.journal is None:
                continue
            world = JournaledWorld(timeout_s=self._rollout.call_timeout_s)
            try:
                world.replay(standing.journal)
            except WorldError as error:
                log.warning("world %d cannot be brought back, it begins anew: %s", index, error)
                world.plain.close()
                continue
            episode = _Episode(world, standing.end_s)
            episode.driver = standing.driver
            episode.driver_until_s = standing.driver_until_s
            episode.pause = standing.pause
            self._episodes[index] = episode

    def close(self) -> None:
        """End all worlds."""
        for i in range(len(self._episodes)):
            self._end(i)

    def _next_state(self, index: int) -> Decision | tuple[Decision, ...]:
        rng = self._rngs[index]
        while True:
            episode = self._episodes[index] or self._start(index)
            time_s, _ = episode.world.plain.time()
            if time_s >= episode.end_s:
                self._num_barren[index] += 1
                if self._num_barren[index] > MAX_BARREN_EPISODES:
                    raise UserError(self._barren())
                self._start(index, episode.world)
                continue
            asked_as = self._config.decision_format
            decisions = [offered(d, asked_as) for d in episode.world.plain.decisions()]
            worthy = [d for d in decisions if self._matters(d)]
            if worthy and not episode.pause:
                episode.pause = rng.randint(0, self._rollout.max_pause)
                episode.decision = rng.choice(worthy)
                self._num_barren[index] = 0
                return episode.decision
            episode.pause = max(0, episode.pause - 1)
            driver = self._driver(index, episode, time_s)
            choices = tuple(d for d in decisions if len(d.legal) > 1)
            if episode.driver == "policy" and choices:
                forced = (d for d in decisions if len(d.legal) == 1)
                episode.forced = {d.junction.tls_id: Action(phase=d.legal[0]) for d in forced}
                return choices
            episode.world.drive(driver, time_s + 1)

    def _barren(self) -> str:
        rollout = self._rollout
        return (
            f"{MAX_BARREN_EPISODES} episodes in a row had no decision with a choice and "
            f"rollout.min_queue_veh={rollout.min_queue_veh} vehicles within rollout.episode_s="
            f"{rollout.episode_s:g} s; lower the former, or train on busier scenarios"
        )

    def _matters(self, decision: Decision) -> bool:
        return worth_asking(decision, self._rollout.min_queue_veh)

    def _rollout_base(self) -> str:
        return self._config.reward.follow

    def _start(self, index: int, world: JournaledWorld | None = None) -> _Episode:
        rng = self._rngs[index]
        name = rng.choice(self._scenarios)
        scenario = load_scenario(name)
        world = world or JournaledWorld(timeout_s=self._rollout.call_timeout_s)
        length = scenario.end_s - scenario.begin_s
        offset = rng.uniform(0, max(0.0, length - self._rollout.episode_s))
        begin_s = scenario.begin_s + offset + self._rollout.warm_up_s
        episode = _Episode(world, min(scenario.end_s, begin_s + self._rollout.episode_s))
        self._episodes[index] = episode
        world.reset(name, rng.randrange(1, 2**31))
        world.drive(rng.choice(("max_pressure", "max_wave")), begin_s)
        return episode

    def _settle(self, index: int, order: Order) -> Tried:
        episode = self._episodes[index]
        assert episode is not None
        try:
            if isinstance(order, Trial):
                return self._try(index, episode, order)
            episode.world.step({**episode.forced, **order})
        except WorldError as error:
            return Tried(outcomes={}, failure=self._fail(index, error))
        return Tried(outcomes={})

    def _try(self, index: int, episode: _Episode, trial: Trial) -> Tried:
        assert episode.decision is not None
        tls_id = episode.decision.junction.tls_id
        outcomes: dict[Action, Outcome] = {}
        if len(trial.actions) > 1:
            found = episode.world.plain.branch(
                [{tls_id: action} for action in trial.actions],
                self._config.reward.horizon_s,
                self._config.reward.follow,
            )
            if not all(outcome.is_finite for outcome in found):
                raise WorldError("not_finite", f"a branch measured {found}")
            outcomes = dict(zip(trial.actions, found, strict=True))
        agreed = self._execute(index, episode, trial.executed, outcomes)
        return Tried(outcomes=outcomes, agreed=agreed)

    def _execute(
        self,
        index: int,
        episode: _Episode,
        executed: Action | None,
        outcomes: dict[Action, Outcome],
    ) -> bool | None:
        decision = episode.decision
        assert decision is not None
        time_s = decision.observation.time_s
        driver = self._driver(index, episode, time_s)
        if episode.driver != "policy" or executed is None:
            episode.world.drive(driver, time_s + 1)
            return None
        action = {decision.junction.tls_id: executed}
        outcome = episode.world.play(action, self._rollout_base())
        if executed not in outcomes:
            return None
        return outcome.interval_digest == outcomes[executed].interval_digest

    def _driver(self, index: int, episode: _Episode, time_s: float) -> str:
        """The classical controller that drives where the policy does not, drawn when it is time."""
        if time_s >= episode.driver_until_s:
            behaviour = self._rollout.behaviour
            episode.driver = draw_driver(behaviour, self._rngs[index])
            episode.driver_until_s = time_s + behaviour.swap_interval_s
        return self._rollout_base() if episode.driver == "policy" else episode.driver

    def _fail(self, index: int, error: WorldError) -> str:
        log.warning("world %d failed and is replaced: %s", index, error)
        self._end(index)
        return error.cause

    def _end(self, index: int) -> None:
        episode, self._episodes[index] = self._episodes[index], None
        if episode:
            episode.world.plain.close()


def worth_asking(decision: Decision, min_queue_veh: int) -> bool:
    """There is a choice, and enough vehicles queue or approach for it to matter."""
    present = sum(lane.queue_veh + sum(lane.moving_veh) for lane in decision.observation.lanes)
    return len(decision.legal) > 1 and present >= min_queue_veh


def draw_driver(behaviour: BehaviourConfig, rng: random.Random) -> str:
    """One of the behaviours, with its share."""
    shares = behaviour.model_dump(exclude={"swap_interval_s"})
    return rng.choices(list(shares), weights=list(shares.values()))[0]


def shares(total: int, parts: int) -> list[int]:
    """The total in whole parts that differ by one at most, the larger ones first."""
    share, rest = divmod(total, parts)
    return [share + (i < rest) for i in range(parts)]

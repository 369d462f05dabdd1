"""Plays whole episodes: classical controllers by themselves, models through the dialect.

Models answer in batches: episodes of a policy run side by side, one decision interval at a time.
Worlds run in threads of this process, whose work happens in their child processes.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import chain, islice

from envs.answers import Parsed, act, offered, parse
from envs.controllers import CONTROLLERS, PROGRAMS
from envs.scenario import load_scenario
from envs.types import Action, Decision, Scenario, TripStats
from envs.world import World
from rl_ft.config import Config
from rl_ft.cores import usable_cores
from rl_ft.interrupt import handed_out, late_interrupt
from rl_ft.types import Completion

Ask = Callable[[list[Decision]], list[Completion]]
"""The model's answer to each decision."""

OnPlayed = Callable[[float], None]
"""Is told each share of an episode once it is played, from any thread; may raise to end it all."""

WORLD_TIMEOUT_S = 1800.0
"""Lookahead drives `SLICE_S` of a large network in one call."""
SLICE_S = 60.0
"""Simulated time between two reports of a controller's episode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One episode to play."""

    scenario: str
    seed: int
    max_s: float = math.inf
    """Cut the scenario's window to this much traffic."""

    def load(self) -> Scenario:
        """The scenario, cut."""
        scenario = load_scenario(self.scenario)
        return replace(scenario, end_s=min(scenario.end_s, scenario.begin_s + self.max_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """How it went; the counts are 0 for controllers that answer no prompts."""

    policy: str
    job: Job
    trips: TripStats
    decisions: int = 0
    invalid_answers: int = 0
    partial_answers: int = 0
    fallbacks: int = 0


def play_controller(
    name: str, jobs: Sequence[Job], config: Config, *, on_played: OnPlayed
) -> Iterator[Episode]:
    """Episodes of a classical controller, in the order in which they end."""

    stopped = threading.Event()

    def play(job: Job) -> Episode:
        scenario = job.load()
        with World(timeout_s=WORLD_TIMEOUT_S) as world:
            world.reset(scenario, job.seed, program=name if name in PROGRAMS else None)
            time_s = scenario.begin_s
            while time_s < scenario.end_s:
                if stopped.is_set():
                    raise CancelledError
                until_s = min(time_s + SLICE_S, scenario.end_s)
                world.drive(name, until_s, horizon_s=config.lookahead_horizon_s)
                on_played((until_s - time_s) / (scenario.end_s - scenario.begin_s))
                time_s = until_s
            return Episode(policy=name, job=job, trips=world.trips())

    with ThreadPoolExecutor(usable_cores()) as pool:
        with late_interrupt():
            futures = [pool.submit(play, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            # Ctrl-C would wait for whole episodes.
            stopped.set()
            for future in futures:
                future.cancel()
            raise


class _Seat:
    """One episode in progress under a model."""

    def __init__(self, policy: str, job: Job, config: Config) -> None:
        self.job = job
        self._policy, self._config = policy, config
        self._world = World(timeout_s=WORLD_TIMEOUT_S)
        self._scenario = job.load()
        self._counts = {"decisions": 0, "invalid_answers": 0, "partial_answers": 0, "fallbacks": 0}
        self.decisions: tuple[Decision, ...] = ()
        self.episode: Episode | None = None

    def start(self) -> None:
        self._world.reset(self._scenario, self.job.seed)
        self.decisions = self._asked()

    def advance(self, answers: Sequence[str | None]) -> float:
        """Act on the answers to `decisions` (None where there was no choice).

        Returns the share of the episode that this was.
        """
        chosen = [self._action(d, a) for d, a in zip(self.decisions, answers, strict=True)]
        self._world.step(
            {d.junction.tls_id: action for d, action in zip(self.decisions, chosen, strict=True)}
        )
        left_s = self._scenario.end_s - self.decisions[0].observation.time_s
        interval_s = self._scenario.timing.decision_interval_s
        if interval_s >= left_s:
            self.episode = Episode(
                policy=self._policy, job=self.job, trips=self._world.trips(), **self._counts
            )
            self._world.close()
        else:
            self.decisions = self._asked()
        return min(interval_s, left_s) / (self._scenario.end_s - self._scenario.begin_s)

    def _asked(self) -> tuple[Decision, ...]:
        return tuple(offered(d, self._config.decision_format) for d in self._world.decisions())

    def _action(self, decision: Decision, answer: str | None) -> Action:
        if answer is None:
            return Action(phase=decision.legal[0])
        self._counts["decisions"] += 1
        parsed = parse(decision, answer)
        if isinstance(parsed, Parsed):
            self._counts["partial_answers"] += not parsed.strict
            return parsed.action
        self._counts["invalid_answers"] += 1
        self._counts["fallbacks"] += 1
        return act(decision, CONTROLLERS[self._config.evaluate.fallback](decision).phase)

    def close(self) -> None:
        self._world.close()


def play_model(
    policy: str,
    ask: Ask,
    jobs: Iterable[Job],
    config: Config,
    *,
    num_worlds: int,
    on_played: OnPlayed,
) -> Iterator[Episode]:
    """Episodes of a model, in the order in which they end; `num_worlds` at most side by side.

    While the model answers one half of them, the other half drives.
    An invalid answer is counted and replaced by the fallback controller's choice.
    """
    num_halves = min(2, num_worlds)
    in_order = list(jobs)
    waiting = [iter(in_order[i::num_halves]) for i in range(num_halves)]
    seats: list[list[_Seat]] = [[] for _ in range(num_halves)]
    asked: deque[tuple[int, Iterator[list[list[str | None]]]]] = deque()
    with ThreadPoolExecutor(usable_cores()) as pool, ThreadPoolExecutor(1) as asker:

        def go_on(half: int) -> None:
            begun = len(seats[half])
            for job in islice(waiting[half], len(range(half, num_worlds, num_halves)) - begun):
                seats[half].append(_Seat(policy, job, config))
            list(handed_out(pool, _Seat.start, seats[half][begun:]))
            if seats[half]:
                asked.append((half, handed_out(asker, _answers, [seats[half]], [ask])))

        try:
            for half in range(num_halves):
                go_on(half)
            while asked:
                half, answers = asked.popleft()
                on_played(sum(handed_out(pool, _Seat.advance, seats[half], next(answers))))
                yield from (seat.episode for seat in seats[half] if seat.episode)
                seats[half] = [seat for seat in seats[half] if not seat.episode]
                go_on(half)
        finally:
            for seat in chain(*seats):
                seat.close()


def _answers(seats: Sequence[_Seat], ask: Ask) -> list[list[str | None]]:
    questions = [d for seat in seats for d in seat.decisions if len(d.legal) > 1]
    texts = iter([completion.text for completion in ask(questions)])
    return [[next(texts) if len(d.legal) > 1 else None for d in seat.decisions] for seat in seats]

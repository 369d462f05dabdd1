"""Decision states: instants at which the choice matters, with all that it leads to.

Walks the training scenarios under mixed behaviour; at each instant that is kept every legal action
is tried by branching. A state also knows the way to it, so that anyone can go back there and
measure again. Worlds run in parallel, one per core; the states do not depend on how many.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from envs.answers import offered, options
from envs.errors import UserError
from envs.reward import RewardWeights, cost_veh_s
from envs.scenario import expand, load_scenario
from envs.types import Action, Decision, Outcome
from envs.world import World
from rl_ft.config import Config
from rl_ft.cores import usable_cores
from rl_ft.interrupt import handed_out
from rl_ft.progress import track
from rl_ft.worlds import draw_driver, worth_asking

SPARE = 1.25
"""Episodes beyond what is wanted: light traffic gives fewer states that matter than asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """A stretch of an episode that one controller drove, from where the last one ended."""

    driver: str
    until_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionState:
    """One junction at one instant, what each of its legal actions leads to, and the way there.

    Example:
        DecisionState(decision=decision, outcomes={Action(phase=0): best, Action(phase=2): other},
                      way=(Leg(driver="max_wave", until_s=120), Leg(driver="random", until_s=180)))
    """

    decision: Decision
    outcomes: Mapping[Action, Outcome]
    """For everything that may be answered (`envs.answers.options`)."""
    way: tuple[Leg, ...]
    """From the begin of the scenario, under the decision's seed."""

    @property
    def id(self) -> str:
        """See `state_id`."""
        return state_id(self.decision)

    def costs_veh_s(self, weights: RewardWeights) -> dict[Action, float]:
        """What each legal action costs."""
        return {action: cost_veh_s(outcome, weights) for action, outcome in self.outcomes.items()}


def state_id(decision: Decision) -> str:
    """Names the instant: scenario, seed, time, junction."""
    return (
        f"{decision.scenario}/{decision.seed}/{decision.observation.time_s:g}/"
        f"{decision.junction.tls_id}"
    )


def reward_weights(config: Config) -> RewardWeights:
    """The reward section as `envs.reward` takes it."""
    return RewardWeights(**config.reward.model_dump(exclude={"horizon_s", "follow"}))


def collect_states(config: Config) -> list[DecisionState]:
    """All decision states, shuffled by the seed; as many as training and evaluation ask for.

    Raises:
        UserError: the scenarios do not give as many.
    """
    prepare = config.prepare
    wanted = prepare.num_states + prepare.num_eval_states
    scenarios = list(expand(config.scenarios.train))
    random.Random(config.seed).shuffle(scenarios)
    num_episodes = math.ceil(SPARE * wanted / prepare.states_per_episode)
    jobs = [(scenarios[i % len(scenarios)], config.seed * 100_003 + i) for i in range(num_episodes)]
    with ThreadPoolExecutor(usable_cores()) as pool:
        try:
            episodes = handed_out(pool, lambda job: _episode_states(config, *job), jobs)
            shown = track(episodes, "decision states", total=len(jobs), unit="episodes")
            states = [state for part in shown for state in part]
        except BaseException:
            # Ctrl-C while they are handed out would wait for every one of them.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if len(states) < wanted:
        raise UserError(
            f"the training scenarios gave {len(states)} decision states that matter, "
            f"{wanted} are wanted; lower prepare.states_per_episode (more episodes are played "
            "then), prepare.warm_up_s, prepare.min_queue_veh or prepare.num_states"
        )
    random.Random(config.seed).shuffle(states)
    return states[:wanted]


def _episode_states(config: Config, name: str, seed: int) -> list[DecisionState]:
    with World(timeout_s=config.rollout.call_timeout_s) as world:
        return list(_walk(config, world, name, seed))


def _walk(config: Config, world: World, name: str, seed: int) -> Iterator[DecisionState]:
    prepare = config.prepare
    rng = random.Random(f"{name}/{seed}")
    scenario = load_scenario(name)
    world.reset(scenario, seed)
    time_s = scenario.begin_s
    driver, driver_until_s = draw_driver(prepare.behaviour, rng), time_s
    warm_s = time_s + prepare.warm_up_s
    gap_s = (scenario.end_s - warm_s) / (prepare.states_per_episode + 1)
    next_s = warm_s
    found = 0
    way: list[Leg] = []
    while time_s < scenario.end_s and found < prepare.states_per_episode:
        if time_s >= driver_until_s:
            driver = draw_driver(prepare.behaviour, rng)
            driver_until_s = time_s + prepare.behaviour.swap_interval_s
        if time_s >= next_s:
            asked = [offered(d, config.decision_format) for d in world.decisions()]
            worthy = [d for d in asked if worth_asking(d, prepare.min_queue_veh)]
            if worthy:
                decision = rng.choice(worthy)
                outcomes = measure(config, world, decision)
                yield DecisionState(decision=decision, outcomes=outcomes, way=tuple(way))
                found += 1
                next_s = time_s + rng.uniform(0.5, 1.5) * gap_s
        world.drive(driver, time_s + 1)
        time_s, _ = world.time()
        if way and way[-1].driver == driver:
            way.pop()
        way.append(Leg(driver=driver, until_s=time_s))


def measure(config: Config, world: World, decision: Decision) -> dict[Action, Outcome]:
    """What every legal action leads to, from the instant at which the world is."""
    actions = options(decision)
    outcomes = world.branch(
        [{decision.junction.tls_id: action} for action in actions],
        config.reward.horizon_s,
        config.reward.follow,
    )
    return dict(zip(actions, outcomes, strict=True))

"""WorldPool: states are worth asking, runs repeat by seed, a death costs its own group only."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections import Counter
from dataclasses import replace

import pytest
from pydantic import ValidationError

from envs.answers import options
from envs.errors import UserError
from envs.types import Action, Decision
from rl_ft.config import Config
from rl_ft.sections import BehaviourConfig, PrepareConfig
from rl_ft.worlds import Order, State, Trial, Tried, WorldPool, draw_driver, worth_asking

POLICY_ONLY = BehaviourConfig(policy=1, max_pressure=0, max_wave=0, random=0)
BASE_ONLY = BehaviourConfig(policy=0, max_pressure=0, max_wave=1, random=0)


def rolling(config: Config, **rollout: object) -> Config:
    """The configuration with some of its rollout section replaced, horizons short."""
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"warm_up_s": 100.0, **rollout}),
            "reward": config.reward.model_copy(update={"horizon_s": 20.0}),
        }
    )


@pytest.fixture
def make_pool(smoke_config):
    pools = []

    def make(scenarios=("generated:1",), *, seed=1, num_worlds=1, **rollout) -> WorldPool:
        config = rolling(smoke_config, **rollout)
        pools.append(WorldPool(config, scenarios, seed=seed, num_worlds=num_worlds))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def every_phase(state: State, executed: int | None = -1) -> Order:
    """All legal phases; by default the last of them is executed."""
    if isinstance(state, tuple):
        return {d.junction.tls_id: Action(phase=d.legal[-1]) for d in state}
    assert isinstance(state, Decision)
    actions = options(state)
    return Trial(actions=actions, executed=None if executed is None else actions[executed])


def advance(pool: WorldPool, questions: int) -> list[tuple[State, Tried | None]]:
    """Until the pool has put so many questions; what it stood at, and what was tried."""
    walked: list[tuple[State, Tried | None]] = []
    while sum(not isinstance(state, tuple) for state, _ in walked) < questions:
        states = pool.states()
        walked += zip(states, pool.settle([every_phase(s) for s in states]), strict=True)
    return walked


def asked(walked: list[tuple[State, Tried | None]]) -> list[tuple[State, Tried | None]]:
    """Without the instants at which the policy only drove."""
    return [(state, tried) for state, tried in walked if not isinstance(state, tuple)]


def test_same_seed_gives_the_same_decisions_and_outcomes(make_pool):
    scenarios = ("generated:1", "generated:2")
    first, second, other = (advance(make_pool(scenarios, seed=seed), 5) for seed in (5, 5, 6))
    assert first == second
    assert first != other


def test_every_state_is_worth_asking_and_every_phase_is_tried(make_pool):
    for state, tried in asked(advance(make_pool(min_queue_veh=4), 4)):
        assert worth_asking(state, 4)
        assert tuple(tried.outcomes) == options(state)
        assert tried.failure is None


def test_neighbouring_instants_are_left_out(make_pool):
    walked = asked(advance(make_pool(max_pause=8), 12))
    times = [state.observation.time_s for state, _ in walked]
    gaps = [b - a for a, b in itertools.pairwise(times) if b > a]
    assert sum(gaps) / len(gaps) > 20


@pytest.mark.parametrize("scenario", ["generated:1", "generated:6"])
def test_the_live_world_agrees_with_the_branch_of_what_it_executes(make_pool, scenario):
    walked = asked(advance(make_pool((scenario,), behaviour=POLICY_ONLY), 5))
    assert [tried.agreed for _, tried in walked] == [True] * 5


def test_between_questions_the_policy_makes_every_choice(make_pool):
    pool = make_pool(("generated:6",), behaviour=POLICY_ONLY, max_pause=8)
    followed = num_forced = 0
    for _ in range(60):
        (state,) = pool.states()
        here = pool._episodes[0].world.plain.decisions()
        forced = {d.junction.tls_id: d.legal[0] for d in here if len(d.legal) == 1}
        order = every_phase(state)
        assert pool.settle([order]) == [Tried(outcomes={})] or isinstance(order, Trial)
        if not isinstance(order, Trial):
            now = pool._episodes[0].world.plain.decisions()
            current = {d.junction.tls_id: d.observation.current for d in now}
            assert current.items() >= {t: action.phase for t, action in order.items()}.items()
            assert current.items() >= forced.items()
            followed += len(order)
            before = {d.junction.tls_id: d.observation.current for d in here}
            num_forced += sum(before[tls_id] != phase for tls_id, phase in forced.items())
    assert followed > 4
    assert num_forced > 0


def test_a_world_killed_while_the_policy_drives_is_replaced(make_pool):
    pool = make_pool(behaviour=POLICY_ONLY, max_pause=8)
    while not isinstance((state := pool.states()[0]), tuple):
        pool.settle([every_phase(state)])
    os.kill(pool.pids()[0], signal.SIGKILL)
    assert pool.settle([every_phase(state)]) == [Tried(outcomes={}, failure="died")]
    assert not isinstance(pool.states()[0], str)


def misled(make_pool, **said) -> tuple[WorldPool, State]:
    """A pool whose branches say something else than they measured, and where it stands."""
    pool = make_pool(behaviour=POLICY_ONLY)
    (state,) = pool.states()
    world = pool._episodes[0].world.plain
    branch = world.branch
    world.branch = lambda *arguments: [replace(outcome, **said) for outcome in branch(*arguments)]
    return pool, state


def test_a_world_that_measures_no_number_has_failed(make_pool):
    pool, state = misled(make_pool, pending_veh_s=float("nan"))
    assert pool.settle([every_phase(state)]) == [Tried(outcomes={}, failure="not_finite")]


def test_a_world_that_hangs_has_failed_in_time(make_pool):
    pool = make_pool(call_timeout_s=5.0)
    (state,) = pool.states()
    os.kill(pool.pids()[0], signal.SIGSTOP)
    assert pool.settle([every_phase(state)]) == [Tried(outcomes={}, failure="timeout")]
    assert not isinstance(pool.states()[0], str)


def test_a_branch_that_is_not_what_happens_disagrees(make_pool):
    pool, state = misled(make_pool, interval_digest="another world")
    (tried,) = pool.settle([every_phase(state)])
    assert tried.agreed is False


@pytest.mark.parametrize(
    ("behaviour", "executed"), [(BASE_ONLY, -1), (POLICY_ONLY, None)], ids=["driver", "no answer"]
)
def test_nothing_can_agree_where_the_base_decides(make_pool, behaviour, executed):
    pool = make_pool(behaviour=behaviour)
    (state,) = pool.states()
    (tried,) = pool.settle([every_phase(state, executed)])
    assert tried.agreed is None
    assert len(tried.outcomes) == len(state.legal)
    [(after, _)] = advance(pool, 1)[-1:]
    assert after.observation.time_s > state.observation.time_s


def test_one_distinct_phase_is_executed_but_not_simulated(make_pool):
    pool = make_pool(behaviour=POLICY_ONLY)
    (state,) = pool.states()
    action = Action(phase=state.legal[-1])
    (tried,) = pool.settle([Trial(actions=(action,), executed=action)])
    assert tried == Tried(outcomes={})


def test_a_world_killed_between_rounds_is_reported_and_replaced(make_pool):
    pool = make_pool(num_worlds=2)
    pool.states()
    killed, untouched = pool.pids()
    os.kill(killed, signal.SIGKILL)
    cause, state = pool.states()
    assert cause == "died"
    assert not isinstance(state, str)
    assert pool.settle([None, every_phase(state)])[0] is None
    assert not any(isinstance(state, str) for state in pool.states())
    replaced, kept = pool.pids()
    assert kept == untouched
    assert replaced != killed


def test_a_world_killed_in_a_round_fails_its_own_trial_only(make_pool):
    pool = make_pool(num_worlds=2)
    states = pool.states()
    os.kill(pool.pids()[0], signal.SIGKILL)
    failed, fine = pool.settle([every_phase(state) for state in states])
    assert failed == Tried(outcomes={}, failure="died")
    assert fine.outcomes
    assert not any(isinstance(state, str) for state in pool.states())


def test_episodes_follow_one_another(make_pool):
    walked = asked(advance(make_pool(("generated:1", "generated:2"), episode_s=40.0), 10))
    assert len({state.seed for state, _ in walked}) > 2
    assert {state.scenario for state, _ in walked} == {"generated:1", "generated:2"}


def test_settings_under_which_nothing_is_worth_asking_are_the_users_mistake(make_pool):
    with pytest.raises(UserError, match="min_queue_veh=9999"):
        advance(make_pool(min_queue_veh=9999, episode_s=60.0), 1)


def test_closing_ends_every_world(make_pool):
    pool = make_pool(num_worlds=2)
    pool.states()
    assert len(pool.pids()) == 2
    pool.close()
    assert pool.pids() == []


def test_drivers_are_drawn_by_their_shares():
    behaviour = BehaviourConfig(policy=3, max_pressure=1, max_wave=0, random=0)
    rng = random.Random(1)
    drawn = Counter(draw_driver(behaviour, rng) for _ in range(4000))
    assert drawn.keys() == {"policy", "max_pressure"}
    assert 0.72 < drawn["policy"] / 4000 < 0.78


def test_somebody_must_drive_and_before_training_that_is_not_the_policy():
    with pytest.raises(ValidationError, match="at least one share"):
        BehaviourConfig(policy=0, max_pressure=0, max_wave=0, random=0)
    with pytest.raises(ValidationError, match="no policy yet"):
        PrepareConfig(behaviour=POLICY_ONLY)

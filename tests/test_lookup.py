"""Lookup: what a dataset says of an instant is what the simulation says."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from rollout_case import Letters, Pool, Sampler, extremes, first, rollout_config, told

from envs.answers import options
from envs.scenario import load_scenario
from envs.world import World
from rl_ft.lookup import LookupPool
from rl_ft.recall import Recall
from rl_ft.rollout import collect_groups
from rl_ft.states import state_id
from rl_ft.worlds import Trial, Tried


class Standing:
    """Simulations that stand at the instants of some states."""

    def __init__(self, states, config):
        self._config, self._worlds, self._decisions = config, [], []
        for state in states:
            world = World()
            world.reset(load_scenario(state.decision.scenario), state.decision.seed)
            for leg in state.way:
                world.drive(leg.driver, leg.until_s)
            tls_id = state.decision.junction.tls_id
            [here] = [d for d in world.decisions() if d.junction.tls_id == tls_id]
            self._worlds.append(world)
            self._decisions.append(here)

    def states(self):
        return self._decisions

    def settle(self, orders):
        return [
            self._try(*each) for each in zip(self._worlds, self._decisions, orders, strict=True)
        ]

    def _try(self, world, decision, trial):
        if len(trial.actions) < 2:
            return Tried(outcomes={})
        outcomes = world.branch(
            [{decision.junction.tls_id: action} for action in trial.actions],
            self._config.reward.horizon_s,
            self._config.reward.follow,
        )
        return Tried(outcomes=dict(zip(trial.actions, outcomes, strict=True)))

    def close(self):
        for world in self._worlds:
            world.close()


@pytest.fixture(scope="module")
def config(smoke_config, data_config):
    config = rollout_config(smoke_config).model_copy(update={"reward": data_config.reward})
    answers = {"num_generations": 4}
    once = {"max_refills": 0}
    return config.model_copy(
        update={
            "grpo": config.grpo.model_copy(update=answers),
            "rollout": config.rollout.model_copy(update=once),
        }
    )


def groups_of(pool, config, num):
    worlds = Pool(pool)
    sampler = Sampler(worlds, [*extremes(), first, "nothing"])
    return asyncio.run(
        collect_groups(
            worlds,
            sampler,
            Letters(),
            config,
            quota=num,
            seed=3,
            recall=Recall(seed=1, num_waiting=0),
        )
    ).groups


@pytest.mark.parametrize("tellings", [1, 4])
def test_groups_are_those_of_the_simulations_at_the_same_instants(states, config, tellings):
    by_id = {state.id: state for state in states}
    num = len(states)
    config = told(config, tellings)
    order = LookupPool(states, seed=5, num_worlds=num).states()
    standing = Standing([by_id[state_id(decision)] for decision in order], config)
    online = groups_of(standing, config, num)
    standing.close()
    offline = groups_of(LookupPool(states, seed=5, num_worlds=num), config, num)
    assert online == offline
    assert any(max(group.rewards) > min(group.rewards[:-1]) for group in offline)


def test_the_order_of_the_rows_does_not_matter(states):
    one = LookupPool(states, seed=5, num_worlds=3)
    other = LookupPool(states[::-1], seed=5, num_worlds=3)
    for _ in range(5):
        assert one.states() == other.states()


@pytest.mark.parametrize("num_worlds", [1, 3, 11])
def test_every_instant_comes_before_any_comes_again(states, num_worlds):
    pool = LookupPool(states, seed=5, num_worlds=num_worlds)
    ids = [state_id(seen) for _ in range(2 * len(states)) for seen in pool.states()]
    every, num = {state.id for state in states}, len(states)
    assert set(ids[:num]) == set(ids[num : 2 * num]) == every
    assert ids[:num] != ids[num : 2 * num]


def test_outcomes_belong_to_the_instant_that_was_asked_about(states):
    # Were rows matched by position, the others' outcomes would come back.
    marked = [
        replace(
            state,
            outcomes={
                phase: replace(outcome, arrived_veh=1000 + i)
                for phase, outcome in state.outcomes.items()
            },
        )
        for i, state in enumerate(states)
    ]
    by_id = {state.id: 1000 + i for i, state in enumerate(marked)}
    pool = LookupPool(marked[::-1], seed=2, num_worlds=len(marked))
    asked = pool.states()
    tried = pool.settle([Trial(actions=options(d), executed=None) for d in asked])
    for decision, answer in zip(asked, tried, strict=True):
        expected = by_id[state_id(decision)]
        assert {o.arrived_veh for o in answer.outcomes.values()} == {expected}

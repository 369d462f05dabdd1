"""Decision states: as many as asked for, each with a choice, its outcomes and the way back."""

from __future__ import annotations

import math
import os
from dataclasses import astuple

import pytest

from envs.answers import options
from envs.errors import UserError
from envs.scenario import load_scenario
from envs.world import World
from rl_ft.states import collect_states, reward_weights


def test_there_are_as_many_states_as_were_asked_for(states, data_config):
    prepare = data_config.prepare
    assert len(states) == prepare.num_states + prepare.num_eval_states
    assert len({state.id for state in states}) == len(states)


def test_every_legal_phase_was_measured_and_there_is_a_choice(states):
    for state in states:
        assert tuple(state.outcomes) == options(state.decision)
        assert len(state.outcomes) > 1


def test_costs_are_finite(states, data_config):
    for state in states:
        costs = state.costs_veh_s(reward_weights(data_config)).values()
        assert all(math.isfinite(cost) and cost >= 0 for cost in costs)


def test_who_drives_on_the_way_changes(states):
    assert any(len(state.way) > 1 for state in states)
    for state in states:
        ends = [leg.until_s for leg in state.way]
        assert ends == sorted(set(ends))
        assert ends[-1] == state.decision.observation.time_s


def test_the_way_leads_back_to_the_same_instant_and_the_same_outcomes(states, data_config):
    state = states[0]
    decision = state.decision
    with World() as world:
        world.reset(load_scenario(decision.scenario), decision.seed)
        for leg in state.way:
            world.drive(leg.driver, leg.until_s)
        tls_id = decision.junction.tls_id
        assert decision in world.decisions()
        outcomes = world.branch(
            [{tls_id: action} for action in options(decision)],
            data_config.reward.horizon_s,
            data_config.reward.follow,
        )
    assert [astuple(o) for o in outcomes] == [astuple(o) for o in state.outcomes.values()]


def test_same_seed_gives_the_same_states_however_many_work(states, data_config, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert collect_states(data_config) == states


def test_another_seed_gives_other_states(states, data_config):
    other = collect_states(data_config.model_copy(update={"seed": data_config.seed + 1}))
    assert not {state.id for state in states} & {state.id for state in other}


def test_scenarios_that_are_too_quiet_are_the_users_mistake(data_config):
    quiet = data_config.prepare.model_copy(update={"min_queue_veh": 500})
    with pytest.raises(UserError, match="gave 0 decision states"):
        collect_states(data_config.model_copy(update={"prepare": quiet}))

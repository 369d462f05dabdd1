"""Rollout: instants that were simulated once are told again in later steps."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Sequence

import pytest
from rollout_case import NUM_WORLDS, Pool, collect, extremes, first, rollout_config, told

from envs.answers import options
from envs.errors import WorldError
from rl_ft.advantage import is_zero_variance
from rl_ft.config import Config
from rl_ft.recall import Recall
from rl_ft.rollout import metrics
from rl_ft.states import state_id
from rl_ft.worlds import Order, State, Tried


@pytest.fixture(scope="module")
def config(smoke_config: Config) -> Config:
    return rollout_config(smoke_config)


def test_an_instant_is_told_in_several_steps_and_tried_once(worlds, config):
    recall = Recall(seed=1, num_waiting=2)
    by_state = defaultdict(list)
    for step in range(12):
        collected, _ = collect(
            worlds, told(config, 3), extremes(), quota=5, seed=100 * step, recall=recall
        )
        teaching = [g for g in collected.groups if not is_zero_variance(g.rewards, g.valid)]
        assert len({group.group_id for group in teaching}) == len(teaching)
        for group in teaching:
            by_state[group.group_id].append(group)
    again = [groups for groups in by_state.values() if len(groups) > 1]
    assert len(again) > 5
    assert max(map(len, again)) == 3
    assert len({state_id(own) for own, _ in worlds.trials}) == len(worlds.trials)
    assert any(len({group.prompt_ids for group in groups}) > 1 for groups in again)
    for groups in again:
        assert len({group.rewards for group in groups}) == 1


def filled(worlds, config) -> Recall:
    """With some instants ready to be told again."""
    recall = Recall(seed=1, num_waiting=0)
    while recall.ready() < 12:
        collect(worlds, told(config, 10), extremes(), quota=8, recall=recall)
    return recall


def test_what_is_missing_is_asked_about_earlier_instants_without_simulating(worlds, config):
    recall = filled(worlds, config)
    rounds = worlds.num_rounds
    collected, _ = collect(worlds, told(config, 10), extremes(), quota=8, recall=recall)
    assert worlds.num_rounds == rounds + 1
    assert collected.tally.counts["new"] == NUM_WORLDS < collected.tally.counts["groups"]


def test_instants_told_again_do_not_water_down_the_share_of_failures(worlds, config):
    recall = filled(worlds, config)
    worlds.before_settle = lambda: os.kill(worlds.pool.pids()[0], signal.SIGKILL)
    collected, _ = collect(worlds, told(config, 10), extremes(), quota=8, recall=recall)
    counts = collected.tally.counts
    assert counts["failed"] > 0
    assert counts["groups"] > counts["new"]
    share = metrics(collected.tally)["health/failed_share"]
    assert share == counts["failed"] / (counts["failed"] + counts["new"] + counts["driven"])


def test_worlds_that_all_fail_are_found_out_although_instants_are_told_again(worlds, config):
    class Dead(Pool):
        async def states(self) -> list[State]:
            return ["timeout"] * NUM_WORLDS

        async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
            return [None] * len(orders)

    recall = filled(worlds, config)
    dead = Dead(worlds.pool)
    dead.decisions = worlds.decisions
    with pytest.raises(WorldError, match="every world failed"):
        collect(dead, told(config, 2), extremes(), quota=1000, recall=recall)


def test_where_an_instant_is_told_again_every_legal_phase_is_tried(worlds, config):
    collect(worlds, told(config, 2), extremes())
    assert worlds.trials
    for own, trial in worlds.trials:
        assert trial.actions == options(own)


def test_an_instant_on_which_all_agree_is_not_told_again(worlds, config):
    recall = Recall(seed=1, num_waiting=0)
    collect(worlds, told(config, 9), [first, first], recall=recall)
    assert recall.ready() == 0


def test_only_instants_that_were_tried_in_full_are_told_again(worlds, config):
    recall = Recall(seed=1, num_waiting=0)
    collected, _ = collect(worlds, told(config, 9), [first, "nothing"], quota=8, recall=recall)
    taught = [g for g in collected.groups if not is_zero_variance(g.rewards, g.valid)]
    kept = recall.draw(100)
    assert all(instant.is_complete() for instant in kept)
    assert len(kept) < len(taught)

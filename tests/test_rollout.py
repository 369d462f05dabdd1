"""Rollout: real worlds, a sampler that answers from a list, groups that say what was measured."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence

import pytest
from rollout_case import (
    NUM_WORLDS,
    Letters,
    collect,
    extremes,
    first,
    greens,
    last,
    partial_last,
    reference,
    rollout_config,
    told,
)

from envs.answers import options
from envs.errors import WorldError
from envs.reward import Reward
from envs.types import Action, Decision
from rl_ft.advantage import is_zero_variance
from rl_ft.config import Config
from rl_ft.recall import Recall
from rl_ft.rollout import MAX_EMPTY_ROUNDS, Tally, collect_groups, metrics
from rl_ft.states import state_id
from rl_ft.worlds import Order


@pytest.fixture(scope="module")
def config(smoke_config: Config) -> Config:
    return rollout_config(smoke_config)


def test_rewards_have_the_order_of_the_measured_costs(worlds, config):
    collected, _ = collect(worlds, config, [first, last, first, "nothing"])
    examples = {e["id"]: e for e in collected.examples}
    compared = 0
    for group in collected.groups:
        if group.group_id not in examples:
            continue
        costs = examples[group.group_id]["cost_veh_s"]
        *valid, invalid = group.completions
        paid = [costs[c.text[11]] for c in valid]
        for a, b in ((0, 1), (1, 2), (0, 2)):
            assert (paid[a] < paid[b]) == (group.rewards[a] > group.rewards[b])
            compared += paid[a] != paid[b]
        assert group.rewards[-1] < min(group.rewards[:-1])
        assert invalid.text == "nothing"
    assert compared


def test_what_is_tried_and_executed_is_what_the_answers_mean(worlds, config):
    collect(worlds, told(config, 1), extremes())
    assert worlds.trials
    for own, trial in worlds.trials:
        assert trial.executed == Action(phase=greens(own)[0])
        tried = {action.phase for action in trial.actions}
        assert tried == {greens(own)[0], greens(own)[-1], reference(own)}


def test_a_group_carries_its_prompt_its_version_and_centred_advantages(worlds, config):
    collected, _ = collect(worlds, config, [first, last])
    for group in collected.groups:
        told = worlds.decision("".join(map(chr, group.prompt_ids)))
        assert group.group_id == state_id(told)
        assert group.weights_version == 3
        assert group.valid == (True, True)
        assert sum(group.advantages) == pytest.approx(0.0, abs=1e-9)


def both(decision):
    return " or ".join(phase.name for phase in decision.junction.phases)


def test_strict_partial_and_invalid_answers_are_counted(worlds, config):
    sampler = [first, both, '{"phase": "Q"}', first]
    collected, _ = collect(worlds, config, sampler, quota=2)
    values = metrics(collected.tally)
    assert values["format/strict_share"] == 0.5
    assert values["format/partial_share"] == 0.0
    assert values["format/invalid_share"] == 0.5


def test_a_partial_answer_counts_as_one_and_acts_like_a_strict_one(worlds, config):
    collected, _ = collect(worlds, config, [partial_last, last], quota=2)
    assert metrics(collected.tally)["format/partial_share"] == 0.5
    for group in collected.groups:
        assert group.rewards[1] - group.rewards[0] == pytest.approx(0.5)


def test_groups_that_teach_nothing_are_refilled_a_bounded_number_of_times(worlds, config):
    collected, sampler = collect(worlds, config, [last, last], quota=2)
    # One round of two worlds fills the quota; `max_refills` bounds what is tried beyond.
    assert worlds.num_rounds == 1 + config.rollout.max_refills
    assert len(collected.groups) == 2
    assert all(is_zero_variance(g.rewards, g.valid) for g in collected.groups)
    assert all(g.advantages == (0.0, 0.0) for g in collected.groups)
    assert metrics(collected.tally)["health/zero_variance_share"] == 1.0
    assert sampler.seeds == [10, 11]


def test_groups_that_teach_come_first(worlds, config):
    collected, _ = collect(worlds, config, [first, last], quota=3)
    flat = [is_zero_variance(g.rewards, g.valid) for g in collected.groups]
    assert flat == sorted(flat)
    assert len(flat) == 3


def test_a_failed_world_is_counted_and_never_scored(worlds, config):
    def kill_once() -> None:
        os.kill(worlds.pool.pids()[0], signal.SIGKILL)
        worlds.before_settle = lambda: None

    worlds.before_settle = kill_once
    collected, _ = collect(worlds, config, [first, last], quota=2)
    counts = collected.tally.counts
    assert counts["failed"] == counts["failed/died"] == 1
    assert counts["groups"] == len(worlds.trials) - 1
    assert metrics(collected.tally)["health/failed_share"] == 1 / (NUM_WORLDS * worlds.num_rounds)
    assert len(collected.groups) == 2


def test_worlds_that_all_fail_end_the_collection(config):
    class Dead:
        num_rounds = 0

        async def states(self) -> list[str]:
            self.num_rounds += 1
            return ["died"] * 2

        async def settle(self, orders: Sequence[Order | None]) -> list[None]:
            assert list(orders) == [None, None]
            return [None, None]

    async def nobody_asks(*_: object, **__: object) -> None:
        raise AssertionError

    dead = Dead()
    asking = collect_groups(
        dead,
        nobody_asks,
        Letters(),
        config,
        quota=2,
        seed=0,
        recall=Recall(seed=1, num_waiting=0),
    )
    with pytest.raises(WorldError, match="failed/died") as caught:
        asyncio.run(asking)
    assert caught.value.cause == "no_groups"
    assert dead.num_rounds == MAX_EMPTY_ROUNDS


def test_a_few_worlds_may_take_many_rounds(worlds, config):
    rollout = config.rollout.model_copy(update={"max_refills": 0})
    patient = config.model_copy(update={"rollout": rollout})
    quota = NUM_WORLDS * (MAX_EMPTY_ROUNDS + 2)
    collected, _ = collect(worlds, patient, [reference, reference], quota=quota)
    assert len(collected.groups) == quota


def test_another_score_replaces_the_measured_one(worlds, config):
    def first_is_right(asked, kinds, tried) -> list[Reward]:
        right = options(asked.telling.decision)[0]
        assert len(kinds) == 2
        return [
            Reward(traffic=float(action == right), format=0.0, cost_veh_s=None)
            for action in asked.chosen()
        ]

    collected, _ = collect(worlds, config, [first, last], quota=2, score=first_is_right)
    assert [group.rewards for group in collected.groups] == [(1.0, 0.0)] * 2


def test_answering_as_max_pressure_gains_nothing_over_it(worlds, config):
    def as_max_pressure(told: Decision) -> int:
        standing = [s if isinstance(s, tuple) else (s,) for s in worlds.states_now]
        [own] = [d for s in standing for d in s if state_id(d) == state_id(told)]
        green = own.junction.phases[reference(own)].state
        return [phase.state for phase in told.junction.phases].index(green)

    collected, _ = collect(worlds, config, [as_max_pressure, as_max_pressure], quota=4)
    values = metrics(collected.tally)
    assert values["reward/gain_over_max_pressure_veh_s"] == 0.0
    assert values["reward/regret_veh_s"] == 0.0
    assert values["health/distinct_actions"] == 1.0


def test_gain_and_regret_are_differences_of_measured_costs(worlds, config):
    rollout = config.rollout.model_copy(update={"max_refills": 0})
    config = config.model_copy(update={"rollout": rollout})
    collected, _ = collect(worlds, config, [last, last], quota=2)
    gains, regrets = [], []
    for example in collected.examples:
        costs = example["cost_veh_s"]
        chosen = costs.get(example["chosen"], 0.0)
        gains.append(costs.get(example["teacher"], 0.0) - chosen)
        regrets.append(chosen - min(costs.values(), default=0.0))
    values = metrics(collected.tally)
    num = len(collected.examples)
    assert values["rollout/groups"] == num >= 2
    assert values["reward/gain_over_max_pressure_veh_s"] == pytest.approx(sum(gains) / num)
    assert values["reward/regret_veh_s"] == pytest.approx(sum(regrets) / num)
    assert any(gains)


def test_executed_branches_agree(worlds, config):
    collected, _ = collect(worlds, config, [first, last])
    assert collected.tally.counts["agreed"] > 0
    assert metrics(collected.tally)["health/branch_disagreements"] == 0.0


def test_metrics_have_these_names(worlds, config):
    collected, _ = collect(worlds, config, [first, last], quota=1)
    values = metrics(collected.tally)
    assert values.keys() == {
        "reward/mean",
        "avg_final_reward",
        "avg_format_reward",
        "avg_tsc_reward",
        "format_accuracy",
        "format/strict",
        "format/partial",
        "format/invalid",
        "reward/gain_over_max_pressure_veh_s",
        "reward/regret_veh_s",
        "format/strict_share",
        "format/partial_share",
        "format/invalid_share",
        "health/failed_share",
        "health/zero_variance_share",
        "health/distinct_actions",
        "health/branch_disagreements",
        "rollout/groups",
        "rollout/new_instants",
        "rollout/sampled_tokens",
        "rollout/branches",
        "rollout/counterfactual_share",
        "time/observe_s",
        "time/generate_s",
        "time/branch_s",
    }
    assert values["time/branch_s"] > 0


def test_tallies_of_several_workers_add_up():
    one, other = Tally(), Tally()
    one.counts.update(groups=2, strict=3)
    other.counts.update(groups=1, failed=1)
    one.sums.update(reward=-1.5)
    other.sums.update(reward=0.5)
    one.add(other)
    assert one.counts == {"groups": 3, "strict": 3, "failed": 1}
    assert metrics(one)["reward/mean"] == pytest.approx(-1 / 3)


def test_metrics_of_nothing_are_zero():
    assert set(metrics(Tally()).values()) == {0.0}

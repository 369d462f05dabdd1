"""Rollout: real worlds, a sampler that answers from a list, groups that say what was measured."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import permutations

import pytest

from envs import dialect
from envs.controllers import max_pressure
from envs.errors import WorldError
from envs.naming import renamed
from envs.reward import Reward
from envs.types import Action, Decision, JointAction
from rl_ft.advantage import is_zero_variance
from rl_ft.config import Config
from rl_ft.dataset import state_id
from rl_ft.recall import Recall
from rl_ft.rollout import MAX_EMPTY_ROUNDS, Collected, Tally, collect_groups, metrics
from rl_ft.types import Completion
from rl_ft.worlds import Order, State, Trial, Tried, WorldPool

NUM_WORLDS = 2

Answer = str | Callable[[Decision], int | str]


class Letters:
    """Every character is a token."""

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return tuple(ord(c) for m in messages for c in m["content"])


class Pool:
    """The worlds behind the protocol, remembering what may be told and what was tried."""

    def __init__(self, pool: WorldPool) -> None:
        self.pool = pool
        self.decisions: dict[str, Decision] = {}
        self.num_rounds = 0
        self.states_now: list[State] = []
        self.trials: list[tuple[Decision, Trial]] = []
        self.driven: list[tuple[tuple[Decision, ...], JointAction]] = []
        self.before_settle: Callable[[], None] = lambda: None

    async def states(self) -> list[State]:
        self.num_rounds += 1
        self.states_now = states = self.pool.states()
        for state in states:
            self._remember((state,) if isinstance(state, Decision) else state)
        return states

    def _remember(self, decisions: tuple[Decision, ...] | str) -> None:
        for decision in decisions:
            for order in permutations(range(len(decision.junction.phases))):
                told = renamed(decision, order)
                self.decisions[dialect.observation_text(told)] = told

    async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
        self.before_settle()
        pairs = list(zip(self.states_now, orders, strict=True))
        self.trials += [(s, o) for s, o in pairs if isinstance(o, Trial)]
        self.driven += [(s, o) for s, o in pairs if isinstance(s, tuple)]
        return self.pool.settle(orders)


class Sampler:
    """Answers each prompt from a list; what is callable there is asked for the phase or text."""

    def __init__(self, worlds: Pool, answers: Sequence[Answer]) -> None:
        self.worlds, self.answers = worlds, answers
        self.seeds: list[int] = []

    async def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        seed: int,
        greedy: Sequence[Sequence[int]] = (),
    ) -> list[list[Completion]]:
        assert num_samples == len(self.answers)
        self.seeds.append(seed)
        sampled = [self._completions(ids, self.answers) for ids in prompts]
        return sampled + [self._completions(ids, self.answers[:1]) for ids in greedy]

    def _completions(self, ids: Sequence[int], answers: Sequence[Answer]) -> list[Completion]:
        decision = self.worlds.decisions["".join(map(chr, ids))]
        return [self._completion(decision, answer) for answer in answers]

    @staticmethod
    def _completion(decision: Decision, answer: Answer) -> Completion:
        if not isinstance(answer, str):
            answer = answer(decision)
        if not isinstance(answer, str):
            answer = dialect.answer_text(decision, Action(phase=answer))
        return Completion(
            token_ids=tuple(map(ord, answer)),
            logprobs=(0.0,) * len(answer),
            text=answer,
            finish_reason="stop",
            weights_version=3,
        )


def first(decision: Decision) -> int:
    return decision.legal[0]


def last(decision: Decision) -> int:
    return decision.legal[-1]


def reference(decision: Decision) -> int:
    return max_pressure(decision).phase


def partial_last(decision: Decision) -> str:
    return f"I take {decision.junction.phases[decision.legal[-1]].name}."


@pytest.fixture(scope="module")
def config(smoke_config: Config) -> Config:
    rollout = {
        "warm_up_s": 200.0,
        "max_refills": 1,
        "max_pause": 0,
        "min_queue_veh": 6,
        "behaviour": smoke_config.rollout.behaviour.model_copy(
            update={"policy": 1.0, "max_pressure": 0.0, "max_wave": 0.0, "random": 0.0}
        ),
    }
    return smoke_config.model_copy(
        update={
            "rollout": smoke_config.rollout.model_copy(update=rollout),
            "reward": smoke_config.reward.model_copy(update={"horizon_s": 30.0}),
            "model": smoke_config.model.model_copy(update={"instructions": False}),
        }
    )


@pytest.fixture(scope="module")
def pool(config):
    pool = WorldPool(config, ("generated:1",), seed=2, num_worlds=NUM_WORLDS)
    yield pool
    pool.close()


@pytest.fixture
def worlds(pool) -> Pool:
    return Pool(pool)


def collect(
    worlds, config, answers, *, quota=4, seed=10, score=None, recall=None
) -> tuple[Collected, Sampler]:
    sampler = Sampler(worlds, answers)
    grpo = config.grpo.model_copy(update={"num_generations": len(answers)})
    config = config.model_copy(update={"grpo": grpo})
    collected = asyncio.run(
        collect_groups(
            worlds,
            sampler,
            Letters(),
            config,
            quota=quota,
            seed=seed,
            score=score,
            recall=recall or Recall(seed=1, num_waiting=0),
        )
    )
    return collected, sampler


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


def told(config: Config, times: int) -> Config:
    """The configuration under which an instant is told so many times."""
    return config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"tellings": times})}
    )


def greens(decision: Decision) -> list[int]:
    """The legal phases in an order that does not depend on how they are told."""
    return sorted(decision.legal, key=lambda i: decision.junction.phases[i].state)


def extremes() -> list[Answer]:
    """Two answers that mean the same greens however they are told."""
    return [lambda d: greens(d)[0], lambda d: greens(d)[-1]]


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
        assert trial.phases == own.legal


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


def test_what_is_tried_and_executed_is_what_the_answers_mean(worlds, config):
    collect(worlds, told(config, 1), extremes())
    assert worlds.trials
    for own, trial in worlds.trials:
        assert trial.executed == greens(own)[0]
        assert set(trial.phases) == {greens(own)[0], greens(own)[-1], reference(own)}


def pausing(config: Config) -> Config:
    """The configuration under which worlds are driven for a while between two questions."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_pause": 6})})


@pytest.fixture(scope="module")
def driven(config):
    """Worlds that the policy drives between questions."""
    pool = WorldPool(pausing(config), ("generated:1", "generated:6"), seed=3, num_worlds=3)
    yield Pool(pool)
    pool.close()


def test_between_questions_the_policy_drives_by_what_its_answers_mean(driven, config):
    collect(driven, pausing(config), extremes(), quota=12)
    assert len(driven.driven) > 5
    for standing, order in driven.driven:
        assert order == {d.junction.tls_id: greens(d)[0] for d in standing}


def test_where_the_driving_policy_has_no_answer_max_pressure_decides(driven, config):
    driven.driven.clear()
    collect(driven, pausing(config), ["nothing", first], quota=6)
    assert driven.driven
    for standing, order in driven.driven:
        assert order == {d.junction.tls_id: reference(d) for d in standing}


def test_a_world_that_dies_while_the_policy_drives_is_counted(driven, config):
    def kill_a_driven_one() -> None:
        for pid, state in zip(driven.pool.pids(), driven.states_now, strict=True):
            if isinstance(state, tuple):
                os.kill(pid, signal.SIGKILL)
                driven.before_settle = lambda: None
                return

    driven.before_settle = kill_a_driven_one
    collected, _ = collect(driven, pausing(config), [first, last], quota=12)
    counts = collected.tally.counts
    assert counts["failed"] == counts["failed/died"] == 1
    assert counts["driven"] > 0


def test_questions_that_all_fail_are_found_out_although_driving_works(driven, config):
    class CannotFork(Pool):
        async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
            kept = [None if isinstance(order, Trial) else order for order in orders]
            failed = Tried(outcomes={}, failure="timeout")
            tried = self.pool.settle(kept)
            return [
                failed if isinstance(order, Trial) else done
                for order, done in zip(orders, tried, strict=True)
            ]

    with pytest.raises(WorldError, match="failed/timeout"):
        collect(CannotFork(driven.pool), pausing(config), extremes(), quota=2)


def test_a_group_carries_its_prompt_its_version_and_centred_advantages(worlds, config):
    collected, _ = collect(worlds, config, [first, last])
    for group in collected.groups:
        told = worlds.decisions["".join(map(chr, group.prompt_ids))]
        assert group.group_id == state_id(told)
        assert group.weights_version == 3
        assert group.valid == (True, True)
        assert sum(group.advantages) == pytest.approx(0.0, abs=1e-9)


def test_strict_partial_and_invalid_answers_are_counted(worlds, config):
    sampler = [first, "A or B", '{"phase": "Q"}', first]
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
    assert counts["groups"] == NUM_WORLDS * worlds.num_rounds - 1
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
    def first_is_right(decision, phases, kinds, tried) -> list[Reward]:
        assert len(phases) == len(kinds) == 2
        return [
            Reward(traffic=float(p == decision.legal[0]), format=0.0, cost_veh_s=None)
            for p in phases
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
    collected, _ = collect(worlds, config, [last, last], quota=4)
    gains, regrets = [], []
    for example in collected.examples:
        costs = example["cost_veh_s"]
        chosen = costs.get(example["chosen"], 0.0)
        gains.append(costs.get(example["teacher"], 0.0) - chosen)
        regrets.append(chosen - min(costs.values(), default=0.0))
    values = metrics(collected.tally)
    assert values["rollout/groups"] == len(collected.examples) == 4
    assert values["reward/gain_over_max_pressure_veh_s"] == pytest.approx(sum(gains) / 4)
    assert values["reward/regret_veh_s"] == pytest.approx(sum(regrets) / 4)
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

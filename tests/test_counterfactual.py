"""Legal answers that the policy did not give take the places of repeated ones."""

from __future__ import annotations

import asyncio
import random

import pytest
from decision_case import decision, observation
from rollout_case import NUM_WORLDS, Letters, collect, first, last, rollout_config, told

from envs.answers import answer_text, options
from envs.reward import Reward
from envs.types import Action, Decision
from rl_ft.advantage import is_zero_variance
from rl_ft.asking import Asked, ask, tell
from rl_ft.config import Config
from rl_ft.counterfactual import with_counterfactuals
from rl_ft.recall import Recall
from rl_ft.rollout import metrics
from rl_ft.states import state_id
from rl_ft.types import Completion


@pytest.fixture(scope="module")
def config(smoke_config: Config) -> Config:
    config = rollout_config(smoke_config)
    rollout = config.rollout.model_copy(update={"counterfactuals": True})
    return config.model_copy(update={"rollout": rollout})


def asked(*texts: str, legal: tuple[int, ...] = (0, 1, 2)) -> Asked:
    """A question about phases A, B and C that was answered so."""

    async def generate(prompts, *, num_samples, seed, greedy=()):
        return [
            [
                Completion(
                    token_ids=Letters().answer_ids(text),
                    logprobs=(-0.5,) * (len(text) + 1),
                    text=text,
                    finish_reason="stop",
                    weights_version=3,
                )
                for text in texts
            ]
            for _ in prompts
        ]

    telling = tell(decision(observation(), legal), random.Random(1))
    [question], _ = asyncio.run(ask([telling], [], generate, Letters(), Config(), seed=1))
    return question


def say(question: Asked, place: int) -> str:
    return answer_text(question.telling.decision, Action(phase=place))


def says(*places: int) -> Asked:
    return asked(*(say(asked(), place) for place in places))


def places(question: Asked) -> list[int | None]:
    """The phases that its answers choose."""
    return [None if action is None else action.phase for action in question.chosen()]


def completed(question: Asked, seed: int = 1) -> Asked:
    return with_counterfactuals(question, random.Random(seed))


def test_repeats_make_way_for_what_was_not_said():
    group = completed(says(1, 1, 1, 1))
    assert sorted(places(group)) == [0, 1, 1, 2]
    assert [c.text for c in group.completions] == [say(group, place) for place in places(group)]


def test_the_first_answer_stays_the_first():
    group = completed(says(2, 2, 2))
    assert group.completions[0] == says(2).completions[0]


def test_only_what_joined_has_no_log_probs():
    before, after = says(0, 0, 2, 0), completed(says(0, 0, 2, 0))
    joined = [c for c in after.completions if c not in before.completions]
    assert [c.text for c in joined] == [say(before, 1)]
    assert [c for c in after.completions if c.logprobs is None] == joined


def test_an_answer_that_joins_is_made_of_the_tokens_that_a_model_would_give():
    joined = completed(says(0, 0)).completions[1]
    assert joined.token_ids == Letters().answer_ids(joined.text)


def test_answers_that_differ_all_stay():
    question = asked(say(asked(), 0), "nothing", "something")
    assert completed(question) == question


def test_a_repeated_invalid_answer_stays_once():
    group = completed(asked("nothing", "nothing", "nothing", "nothing"))
    assert group.completions[0].text == "nothing"
    assert sorted(places(group)[1:]) == [0, 1, 2]


def test_a_misspelt_answer_does_not_count_as_given():
    name = asked().telling.decision.junction.phases[1].name
    group = completed(asked(f"I take {name}.", *[say(asked(), 0)] * 4))
    assert say(group, 1) in [c.text for c in group.completions]


def test_what_is_not_legal_never_joins():
    question = asked("nothing", "nothing", "nothing", "nothing", legal=(0, 2))
    legal = set(question.telling.decision.legal)
    assert set(places(completed(question))) - {None} == legal


def test_where_places_are_few_the_seed_draws_who_joins():
    drawn = {places(completed(says(0, 0), seed))[1] for seed in range(20)}
    assert drawn == {1, 2}
    assert completed(says(0, 0), 7) == completed(says(0, 0), 7)


def test_another_spelling_of_the_json_does_not_count_as_given():
    question = asked(*[say(asked(), 1).replace(" ", "")] * 3)
    group = completed(question)
    assert all(answer.strict for answer in question.parsed)
    assert question.canonical() == (False,) * 3
    assert group.completions[0] == question.completions[0]
    assert group.canonical() == (False, True, True)


def test_what_the_policy_gave_is_remembered_as_often_as_it_gave_it():
    group = completed(says(0, 0, 1, 0))
    assert places(group)[0] == 0
    times = dict(zip(places(group), group.times_given, strict=True))
    assert times[2] == 0
    assert sum(group.times_given) == 4
    of_first = [n for phase, n in zip(places(group), group.times_given, strict=True) if phase == 0]
    assert sum(of_first) == 3
    assert times[1] == 1


def test_a_policy_that_always_says_the_same_still_learns_what_the_others_cost(worlds, config):
    collected, _ = collect(worlds, config, [first] * 8)
    assert sum(not is_zero_variance(g.rewards, g.valid) for g in collected.groups) > 1
    for own, trial in worlds.trials:
        assert set(options(own)) <= set(trial.actions)
    for group in collected.groups:
        assert group.completions[0].logprobs is not None
        assert sum(c.logprobs is not None for c in group.completions) < 8


def test_figures_about_the_policy_count_what_it_gave_as_often_as_it_did(worlds, config):
    collected, _ = collect(worlds, config, [first] * 7 + ["nothing"])
    assert collected.tally.counts["completions"] == 8 * collected.tally.counts["groups"]
    figures = metrics(collected.tally)
    assert figures["format/invalid_share"] == 1 / 8
    assert figures["format/strict_share"] == 7 / 8
    assert figures["health/distinct_actions"] == 2.0
    assert 0 < figures["rollout/counterfactual_share"] <= 6 / 8


def test_gain_and_regret_are_those_of_what_the_policy_gave(worlds, config):
    collected, _ = collect(worlds, config, [first] * 8, quota=NUM_WORLDS)
    gains, regrets = [], []
    for example in collected.examples:
        costs = example["cost_veh_s"]
        gains.append(costs[example["teacher"]] - costs[example["chosen"]])
        regrets.append(costs[example["chosen"]] - min(costs.values()))
    figures = metrics(collected.tally)
    assert figures["rollout/new_instants"] == len(gains)
    assert figures["reward/gain_over_max_pressure_veh_s"] == pytest.approx(sum(gains) / len(gains))
    assert figures["reward/regret_veh_s"] == pytest.approx(sum(regrets) / len(regrets))
    assert any(regrets)


def test_only_an_answers_own_tokens_are_called_canonical(worlds, config):
    def compact(own: Decision) -> str:
        return answer_text(own, Action(phase=own.legal[0])).replace(" ", "")

    collected, _ = collect(worlds, config, [compact] * 7 + [last])
    for group in collected.groups:
        spelled = [" " in completion.text for completion in group.completions]
        assert list(group.canonical) == spelled
        assert not all(spelled)


def test_the_mean_reward_is_that_of_what_the_policy_gave(worlds, config):
    def score(question: Asked, kinds, tried):
        right = options(question.telling.decision)[0]
        rewards = [1.0 if action == right else -1.0 for action in question.chosen()]
        return [Reward(traffic=0.0, format=r, cost_veh_s=None) for r in rewards]

    collected, _ = collect(worlds, config, [first] * 7 + [last], score=score)
    assert metrics(collected.tally)["reward/mean"] == pytest.approx(6 / 8)


def test_an_instant_is_told_again_with_all_its_legal_answers(worlds, config):
    recall = Recall(seed=1, num_waiting=0)
    collect(worlds, told(config, 2), [first] * 8, recall=recall)
    assert recall.ready()
    num_tried = len(worlds.trials)
    collected, _ = collect(worlds, told(config, 2), [first] * 8, recall=recall, quota=8)
    tried = {state_id(own) for own, _ in worlds.trials[num_tried:]}
    again = [group for group in collected.groups if group.group_id not in tried]
    assert again
    for group in again:
        assert all(group.canonical)
        assert 0 in group.times_given
        assert len({c.text for c in group.completions}) > 1

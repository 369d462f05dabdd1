"""Every decision format goes the whole way: states, dataset, lessons, groups, closed loop."""

from __future__ import annotations

import json

import pytest
from rollout_case import Pool, Sampler, collect, rollout_config

from envs.answers import FORMATS, act, answer_text, options
from envs.controllers import max_pressure
from envs.errors import UserError
from rl_ft.closed_loop import Job, play_model
from rl_ft.config import Config
from rl_ft.dataset import read_lessons, read_states, write_dataset
from rl_ft.lookup import LookupPool
from rl_ft.question import asked_as_taught, write_question
from rl_ft.replay import check_dataset
from rl_ft.states import collect_states
from rl_ft.worlds import WorldPool


@pytest.fixture(scope="module", params=list(FORMATS))
def config(request, data_config, smoke_config) -> Config:
    """Small, with a horizon in which the longest green shows."""
    content = data_config.model_dump()
    content["decision_format"] = request.param
    content["reward"]["horizon_s"] = 60.0
    content["rollout"] = rollout_config(smoke_config).rollout.model_dump() | {"num_worlds": 2}
    return Config.model_validate(content)


@pytest.fixture(scope="module")
def dataset(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dataset") / "data"
    write_dataset(directory, collect_states(config), config.prepare.num_eval_states, config)
    return directory


def test_a_state_has_an_outcome_for_everything_that_may_be_answered(dataset, config):
    states = read_states(dataset)
    assert {state.decision.format for state in states} == {config.decision_format}
    for state in states:
        assert tuple(state.outcomes) == options(state.decision)
        assert len(state.outcomes) > 1
    # What is answered makes a difference, its duration too.
    assert any(
        len({outcome.digest for outcome in state.outcomes.values()}) == len(state.outcomes)
        for state in states
    )


def test_rows_are_measured_again_exactly(dataset):
    assert [row.difference for row in check_dataset(dataset, num_rows=2, seed=1)] == [None, None]


def test_lessons_are_answered_in_the_format(dataset, config):
    for teacher in config.prepare.teachers:
        for row in read_lessons(dataset / f"sft_{teacher}.jsonl"):
            assert row.answer in row.legal_answers == tuple(row.cost_veh_s)
            keys = {tuple(json.loads(answer)) for answer in row.legal_answers}
            assert len(keys) == 1


def first(decision):
    return answer_text(decision, options(decision)[0])


def last(decision):
    return answer_text(decision, options(decision)[-1])


@pytest.mark.parametrize("offline", [False, True], ids=["simulated", "looked up"])
def test_groups_teach_with_what_was_not_said_beside_it(config, dataset, offline):
    if offline:
        pool = LookupPool(read_states(dataset), seed=1, num_worlds=2)
    else:
        pool = WorldPool(config, ("generated:1",), seed=2, num_worlds=2)
    rollout = config.rollout.model_copy(update={"counterfactuals": True})
    config = config.model_copy(update={"rollout": rollout})
    collected, _ = collect(Pool(pool), config, [first, last, first, first], quota=4)
    pool.close()
    counts = collected.tally.counts
    assert counts["strict"] == counts["completions"] == 4 * counts["groups"]
    assert counts["disagreed"] == 0
    assert offline or counts["agreed"] > 0
    assert any(max(group.rewards) > min(group.rewards) for group in collected.groups)
    for group in collected.groups:
        assert all(group.canonical)
        assert group.rewards.index(max(group.rewards)) == group.advantages.index(
            max(group.advantages)
        )


def test_the_closed_loop_understands_every_answer(config):
    def ask(decisions):
        texts = [answer_text(d, act(d, max_pressure(d).phase)) for d in decisions]
        return [Sampler._completion(d, text) for d, text in zip(decisions, texts, strict=True)]

    jobs = [Job(scenario="generated:3", seed=1, max_s=600)]
    [episode] = play_model("mine", ask, jobs, config, num_worlds=1, on_played=lambda share: None)
    assert episode.decisions > 5
    assert (episode.invalid_answers, episode.partial_answers) == (0, 0)
    assert episode.trips.throughput_veh > 0


def test_a_model_says_how_it_is_asked(config, tmp_path):
    write_question(tmp_path, config)
    assert asked_as_taught(tmp_path, Config()).decision_format == config.decision_format


@pytest.mark.parametrize("content", ["{", "[]", '{"decision_format": "phrase", "instructions": 1}'])
def test_a_model_that_says_nonsense_is_named(tmp_path, content):
    (tmp_path / "question.json").write_text(content)
    with pytest.raises(UserError, match=r"question\.json does not say how the model is asked"):
        asked_as_taught(tmp_path, Config())


def test_answers_are_few_tokens_of_the_small_model(config, dataset, tmp_path):
    from rl_ft.render import Renderer
    from rl_ft.tiny import build_tiny

    model = build_tiny(tmp_path / "model", config=config.model.tiny, seed=1)
    renderer = Renderer(str(model), max_prompt_length=512)
    for state in read_states(dataset):
        for action in options(state.decision):
            text = answer_text(state.decision, action)
            ids = renderer.answer_ids(text)
            assert renderer.decode_batch([ids]) == [text]
            assert len(ids) <= 6

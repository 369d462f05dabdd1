"""Where a model is not sure it is asked again in other words, and its answers vote."""

from __future__ import annotations

import math
from collections.abc import Callable

import decision_case
import pytest
from decision_case import lane, observation

from envs.answers import FORMATS, answer_text, offered, options, parse
from envs.naming import as_told, in_world
from envs.types import Action, Decision, LaneState
from rl_ft.types import Completion
from rl_ft.vote import SURE, doubts, elected, voting

NUM = 5


def said(text: str, probability: float) -> Completion:
    logprob = math.log(probability) / 2
    return Completion(
        token_ids=(7, 2),
        logprobs=(logprob, logprob),
        text=text,
        finish_reason="stop",
        weights_version=3,
    )


def asked_of(decision_format: str, *lanes: LaneState) -> Decision:
    return offered(decision_case.decision(observation(*lanes)), decision_format)


@pytest.fixture(params=sorted(FORMATS))
def decision(request) -> Decision:
    return asked_of(request.param, lane(3), lane(1), lane(2))


class Asked:
    """Answers each question as `choose` says, and keeps what it was asked."""

    def __init__(self, choose: Callable[[Decision, bool], tuple[Action, float]]) -> None:
        self._choose = choose
        self.batches: list[list[Decision]] = []

    def __call__(self, decisions: list[Decision]) -> list[Completion]:
        self.batches.append(decisions)
        chosen = [(d, *self._choose(d, len(self.batches) == 1)) for d in decisions]
        return [said(answer_text(d, action), share) for d, action, share in chosen]


def test_a_sure_answer_is_taken_at_its_word(decision):
    asked = Asked(lambda d, _: (options(d)[0], SURE + 0.01))
    [answer] = voting(asked, num_tellings=NUM)([decision])
    assert parse(decision, answer.text).action == options(decision)[0]
    assert sum(map(len, asked.batches)) == 1


def test_an_unsure_model_is_asked_again_as_often_as_was_set(decision):
    asked = Asked(lambda d, _: (options(d)[0], 0.6))
    voting(asked, num_tellings=NUM)([decision])
    assert [len(batch) for batch in asked.batches] == [1, NUM - 1]


def test_only_the_questions_of_unsure_answers_are_asked_again(decision):
    asked = Asked(lambda d, is_first: (options(d)[0], 0.99 if d is decision else 0.6))
    other = asked_of(decision.format, lane(1), lane(4), lane(2))
    voting(asked, num_tellings=NUM)([decision, other, decision])
    assert [len(batch) for batch in asked.batches] == [3, NUM - 1]


def test_each_of_several_unsure_questions_gets_its_own_answers(decision):
    """Of one all tellings mean the first action, of the other the last."""
    other = asked_of(decision.format, lane(1), lane(4), lane(2))
    meant = {decision.observation.lanes: 0, other.observation.lanes: -1}

    def choose(told: Decision, is_first: bool) -> tuple[Action, float]:
        place = meant[told.observation.lanes]
        asked = decision if place == 0 else other
        action = options(asked)[place if not is_first else 1]
        order = [
            [phase.state for phase in asked.junction.phases].index(phase.state)
            for phase in told.junction.phases
        ]
        return as_told(action, order), 0.5

    answers = voting(Asked(choose), num_tellings=NUM)([decision, other])
    assert parse(decision, answers[0].text).action == options(decision)[0]
    assert parse(other, answers[1].text).action == options(other)[-1]


def test_once_is_once(decision):
    asked = Asked(lambda d, _: (options(d)[0], 0.1))
    voting(asked, num_tellings=1)([decision])
    assert sum(map(len, asked.batches)) == 1


def test_whoever_sees_through_the_words_outvotes_the_first_answer(decision):
    """Every telling's answer means the same action in the world; the first one meant another."""
    wrong, right = options(decision)[:2]
    tellings = doubts(decision, said(answer_text(decision, wrong), 0.6), num_tellings=NUM)
    answers = [said(answer_text(t.decision, as_told(right, t.order)), 0.5) for t in tellings]
    answer = elected(decision, said(answer_text(decision, wrong), 0.6), tellings, answers)
    assert parse(decision, answer.text).action == right


def test_probabilities_are_added_not_heads_counted(decision):
    sure, doubtful = options(decision)[:2]
    tellings = doubts(decision, said(answer_text(decision, sure), 0.9), num_tellings=3)
    answers = [said(answer_text(t.decision, as_told(doubtful, t.order)), 0.4) for t in tellings]
    answer = elected(decision, said(answer_text(decision, sure), 0.9), tellings, answers)
    assert parse(decision, answer.text).action == sure


def test_an_invalid_answer_has_no_vote(decision):
    first = said(answer_text(decision, options(decision)[0]), 0.3)
    tellings = doubts(decision, first, num_tellings=NUM)
    answer = elected(decision, first, tellings, [said("whatever", 0.9) for _ in tellings])
    assert answer == first


@pytest.mark.parametrize("text", ["nothing", "the phase {0}", ""])
def test_an_answer_that_is_not_strict_counts_as_what_it_is(text, decision):
    answer = said(text.format(answer_text(decision, options(decision)[0])), 0.2)
    assert doubts(decision, answer, num_tellings=NUM) == []
    assert elected(decision, answer, [], []) == answer


def test_the_same_question_is_always_told_in_the_same_ways(decision):
    answer = said(answer_text(decision, options(decision)[0]), 0.2)
    once, again = (doubts(decision, answer, num_tellings=NUM) for _ in range(2))
    assert once == again
    assert len({telling.decision for telling in once}) == NUM - 1


def test_every_telling_means_the_same_actions(decision):
    answer = said(answer_text(decision, options(decision)[0]), 0.2)
    for telling in doubts(decision, answer, num_tellings=NUM):
        meant = {in_world(action, telling.order) for action in options(telling.decision)}
        assert meant == set(options(decision))

"""Recall: instants come back as often as they were added, and not at once."""

from __future__ import annotations

from collections import Counter

import pytest
from decision_case import decision, observation, outcome

from envs.types import Action
from rl_ft.recall import Instant, Recall
from rl_ft.worlds import Tried


def instants(num: int) -> list[Instant]:
    seen = decision(observation())
    return [Instant(decision=seen, tried=Tried(outcomes={}, failure=str(i))) for i in range(num)]


def filled(seed: int, *, times: int = 2, num: int = 20, num_waiting: int = 0) -> Recall:
    recall = Recall(seed=seed, num_waiting=num_waiting)
    for instant in instants(num) * times:
        recall.add(instant)
    return recall


def test_nothing_is_drawn_before_enough_instants_wait():
    recall = filled(1, times=1, num=5, num_waiting=5)
    assert recall.draw(4) == []
    recall.add(instants(1)[0])
    assert len(recall.draw(4)) == 1


def test_every_instant_comes_back_as_often_as_it_was_added():
    recall = filled(1, times=3)
    drawn = recall.draw(50) + recall.draw(50)
    assert set(Counter(instant.tried.failure for instant in drawn).values()) == {3}
    assert len(drawn) == 60


def test_the_order_is_drawn_from_the_seed():
    def order(seed: int) -> list[str | None]:
        return [instant.tried.failure for instant in filled(seed).draw(40)]

    assert order(1) == order(1) != order(2)


def test_an_instant_is_complete_when_every_legal_phase_was_tried():
    seen = decision(observation(), (0, 2))
    for phases, complete in (((0,), False), ((0, 2), True), ((0, 1, 2), True)):
        tried = Tried(outcomes={Action(phase=phase): outcome(1.0) for phase in phases}, agreed=True)
        assert Instant(decision=seen, tried=tried).is_complete() is complete


@pytest.mark.parametrize("told", [True, False])
def test_what_is_put_back_does_not_count_its_agreement_again(told):
    instant = Instant(decision=decision(observation()), tried=Tried(outcomes={}, agreed=True))
    again = instant.put_back(told=told)
    assert (again.times_told, again.tried.agreed) == (int(told), None)

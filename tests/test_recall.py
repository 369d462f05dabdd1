"""Recall: instants come back as often as they were added for, and not at once."""

from __future__ import annotations

from collections import Counter

from decision_case import decision, observation

from rl_ft.recall import Instant, Recall
from rl_ft.worlds import Tried


def instants(num: int) -> list[Instant]:
    return [
        Instant(decision=decision(observation()), tried=Tried(outcomes={}, failure=str(i)))
        for i in range(num)
    ]


def test_nothing_is_drawn_before_enough_instants_wait():
    recall = Recall(times=2, seed=1, num_waiting=10)
    for instant in instants(5):
        recall.add(instant)
    assert recall.draw(4) == []


def test_every_instant_comes_back_as_often_as_it_was_added_for():
    recall = Recall(times=3, seed=1, num_waiting=0)
    for instant in instants(20):
        recall.add(instant)
    drawn = recall.draw(50) + recall.draw(50)
    assert set(Counter(instant.tried.failure for instant in drawn).values()) == {3}
    assert len(drawn) == 60


def test_the_order_is_drawn_from_the_seed():
    def order(seed: int) -> list[str | None]:
        recall = Recall(times=2, seed=seed, num_waiting=0)
        for instant in instants(20):
            recall.add(instant)
        return [instant.tried.failure for instant in recall.draw(40)]

    assert order(1) == order(1) != order(2)


def test_without_times_nothing_is_kept():
    recall = Recall(times=0, seed=1, num_waiting=0)
    recall.add(instants(1)[0])
    assert recall.draw(1) == []

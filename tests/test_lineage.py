"""Lineage: the weights that a refused update is about are still there when it is refused."""

from __future__ import annotations

import pytest
from version_case import group, weights

from rl_ft.lineage import Lineage


def versions(refs) -> list[int]:
    return [ref.version for ref in refs]


def in_turns(*steps: int) -> Lineage:
    """Every version sampled for its own step."""
    lineage = Lineage(0)
    for step in steps:
        lineage.load(weights(step))
        lineage.sample(step, [group(step)])
    return lineage


def test_in_turns_the_last_two_versions_are_suspected():
    found = in_turns(0, 1, 2).suspects(2)
    assert (found.claimed, versions(found.earlier)) == (weights(2), [1])
    assert found.groups == (group(2),)


def test_at_the_first_step_no_other_weights_are_suspected():
    assert in_turns(0).suspects(0).earlier == ()


def test_a_learner_that_began_again_leaves_what_was_loaded_before_it_suspected():
    found = in_turns(5, 6, 4).suspects(4)
    assert (found.claimed, versions(found.earlier)) == (weights(4), [6])


@pytest.fixture
def overlapping() -> Lineage:
    """One version behind but for a fence at 4; step 5 has been sampled when step 4 is refused."""
    lineage = Lineage(1)
    for version, steps in {0: (0, 1), 1: (2,), 2: (3,), 3: (), 4: (4, 5)}.items():
        lineage.load(weights(version))
        for step in steps:
            lineage.sample(step, [group(version)])
    return lineage


def test_stale_groups_are_held_against_the_version_that_they_carry(overlapping):
    found = overlapping.suspects(5)
    assert found.groups == (group(4),)
    assert found.claimed == weights(4)


def test_the_step_that_the_learner_is_at_has_its_groups_though_later_ones_were_sampled(overlapping):
    assert overlapping.suspects(4).groups == (group(4),)


def test_the_last_version_that_was_compared_exactly_stays_suspected_up_to_the_next(overlapping):
    assert versions(overlapping.suspects(4).earlier) == [3, 2, 0]


def test_once_a_fence_has_passed_what_was_compared_before_it_is_let_go(overlapping):
    overlapping.load(weights(5))
    overlapping.sample(6, [group(5)])
    assert versions(overlapping.suspects(6).earlier) == [4, 3]

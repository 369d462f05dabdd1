"""What phases are called: A, B, C, ... by their place; to learners anything, in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from envs.types import Action, Decision

LETTERS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"
"""Without I, which is a word."""
NUM_DRAWN_NAMES = 12
"""Learners see names from A to the 12th, on any line: a model that knew names by their places could
not name the eighth green of a junction if it learnt from junctions of four."""


def phase_name(index: int) -> str:
    """A to Z without I, then AA, AB, ..."""
    name = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, len(LETTERS))
        name = LETTERS[letter] + name
    return name


def retold(decision: Decision, rng: random.Random) -> tuple[Decision, tuple[int, ...]]:
    """The decision in a random order and under random names, and what `order` that is.

    Place i holds what was phase order[i]. Whoever learns from many such tellings learns to read
    the traffic of a line and to answer with the name that it ends with.
    """
    num = len(decision.junction.phases)
    order = rng.sample(range(num), num)
    names = [phase_name(i) for i in range(max(num, NUM_DRAWN_NAMES))]
    return renamed(decision, order, rng.sample(names, num)), tuple(order)


def as_told(action: Action, order: Sequence[int]) -> Action:
    """An action in the world by its place in a telling, where place i holds phase order[i]."""
    return replace(action, phase=order.index(action.phase))


def in_world(action: Action, order: Sequence[int]) -> Action:
    """The inverse of `as_told`."""
    return replace(action, phase=order[action.phase])


def renamed(decision: Decision, order: Sequence[int], names: Sequence[str]) -> Decision:
    """The same decision with its phases in another order: place i holds what was phase order[i]
    and is called names[i].

    Raises:
        ValueError: `order` is not a permutation of the phases, or `names` are not as many, each
            another.
    """
    junction, observation = decision.junction, decision.observation
    num = len(junction.phases)
    if sorted(order) != list(range(num)):
        raise ValueError(f"{order} is no order of {num} phases")
    if len(names) != num or len(set(names)) != num:
        raise ValueError(f"{names} are not {num} different names")
    place = {old: new for new, old in enumerate(order)}
    phases = tuple(
        replace(junction.phases[old], name=name) for old, name in zip(order, names, strict=True)
    )
    return replace(
        decision,
        junction=replace(junction, phases=phases),
        observation=replace(
            observation,
            current=place[observation.current],
            downstream_free=tuple(observation.downstream_free[old] for old in order),
            downstream_queue_veh=tuple(observation.downstream_queue_veh[old] for old in order),
            inside_veh=tuple(observation.inside_veh[old] for old in order),
            upstream_veh=tuple(observation.upstream_veh[old] for old in order),
        ),
        legal=tuple(sorted(place[old] for old in decision.legal)),
    )

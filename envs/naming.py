"""What phases are called: A, B, C, ... by their place, in an order that means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from envs.types import Decision


def phase_name(index: int) -> str:
    """A to Z, then AA, AB, ..."""
    letters = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("A") + letter) + letters
    return letters


def renamed(decision: Decision, order: Sequence[int]) -> Decision:
    """The same decision with its phases in another order: place i holds what was phase order[i].

    Whoever learns from many orders learns that names mean nothing.

    Raises:
        ValueError: `order` is not a permutation of the phases.
    """
    junction, observation = decision.junction, decision.observation
    if sorted(order) != list(range(len(junction.phases))):
        raise ValueError(f"{order} is no order of {len(junction.phases)} phases")
    place = {old: new for new, old in enumerate(order)}
    phases = tuple(
        replace(junction.phases[old], name=phase_name(new)) for new, old in enumerate(order)
    )
    return replace(
        decision,
        junction=replace(junction, phases=phases),
        observation=replace(
            observation,
            current=place[observation.current],
            downstream_free=tuple(observation.downstream_free[old] for old in order),
            downstream_queue_veh=tuple(observation.downstream_queue_veh[old] for old in order),
        ),
        legal=tuple(sorted(place[old] for old in decision.legal)),
    )

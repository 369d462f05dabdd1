"""What a service of a model tells a junction, and whether what a junction asks makes sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from envs.types import Action, Decision

DecidedBy = Literal["model", "max_pressure", "only_one"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a junction is to show next."""

    phase: int
    """Index into the phases of the junction that asked."""
    name: str
    state: str
    """SUMO signal state of the phase."""
    hold_s: int
    """For how long it is settled; 0: until the next decision instant."""
    decided_by: DecidedBy
    """`max_pressure`: the answer was invalid or did not come; `only_one`: no other is legal."""
    answer: str
    """What the model said, or its answers to several tellings elected."""


def problem(decision: Decision) -> str | None:
    """What is not right about a decision that came from outside; None if nothing."""
    junction, seen = decision.junction, decision.observation
    num_phases, num_lanes = len(junction.phases), len(junction.lanes)
    lengths = {
        "observation.lanes": (len(seen.lanes), num_lanes),
        "observation.downstream_free": (len(seen.downstream_free), num_phases),
        "observation.downstream_queue_veh": (len(seen.downstream_queue_veh), num_phases),
        "observation.inside_veh": (len(seen.inside_veh), num_phases),
        "observation.upstream_veh": (len(seen.upstream_veh), num_phases),
    }
    for i, phase in enumerate(junction.phases):
        lengths[f"junction.phases.{i}.turns"] = (len(phase.turns), len(phase.lanes))
        lengths[f"junction.phases.{i}.protected"] = (len(phase.protected), len(phase.lanes))
        if not phase.lanes or not set(phase.lanes) <= set(range(num_lanes)):
            return f"junction.phases.{i}.lanes: expected indices below {num_lanes}, at least one"
    if len({phase.name for phase in junction.phases}) < num_phases:
        return "junction.phases: expected names that differ"
    for name, (got, expected) in lengths.items():
        if got != expected:
            return f"{name}: expected {expected} entries, got {got}"
    if not decision.legal or not {*decision.legal, seen.current} <= set(range(num_phases)):
        return f"legal, observation.current: expected indices below {num_phases}, at least one"
    return None


def chosen(decision: Decision, action: Action, decided_by: DecidedBy, answer: str) -> Choice:
    """What is told to a junction that an action was found for."""
    phase = decision.junction.phases[action.phase]
    return Choice(
        phase=action.phase,
        name=phase.name,
        state=phase.state,
        hold_s=action.hold_s,
        decided_by=decided_by,
        answer=answer,
    )

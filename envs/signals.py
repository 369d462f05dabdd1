"""What a signalled junction may do: its green phases, the way between them, and what is legal now.

Pure functions on strings and carriers; nothing here talks to SUMO. Signal states are SUMO's: one
character per controlled link (G, g: green with and without priority; y: yellow; r: red; s: right
turn on red after a stop; o, O: off).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from envs.types import JunctionSpec, Observation, SignalTiming

GREEN = frozenset("Gg")


def green_states(program: Sequence[str]) -> tuple[str, ...]:
    """The distinct green states of a signal program, in its own order.

    A state with any yellow is a transition, one without green serves nobody.
    """
    greens = [s for s in program if GREEN & set(s) and not set(s) & set("yYu")]
    return tuple(dict.fromkeys(greens))


def transition_state(now: str, following: str) -> str:
    """The yellow state between two green ones.

    Links that are green in both stay green, with the weaker of both priorities, so the state
    allows no pair of links that one of the two phases does not allow.
    """
    return "".join(_transition_link(a, b) for a, b in zip(now, following, strict=True))


def _transition_link(now: str, following: str) -> str:
    if now in GREEN:
        if following in GREEN:
            return "G" if now == following == "G" else "g"
        return "y"
    return now if now == following else "r"


def clearance_state(now: str, following: str) -> str:
    """The all-red state after the yellow: only links that are green in both phases stay green."""
    return transition_state(now, following).replace("y", "r")


def conflicting_greens(
    state: str, foes: Collection[tuple[int, int]]
) -> tuple[tuple[int, int], ...]:
    """Pairs of foe links that both have right of way (`G`) in a state."""
    return tuple((a, b) for a, b in foes if state[a] == state[b] == "G")


def legal_phases(
    junction: JunctionSpec, observation: Observation, timing: SignalTiming
) -> tuple[int, ...]:
    """Indices of the phases that may be chosen now; never empty.

    Before `min_green_s`, or `occupied_green_s` while the junction is not clear, only the running
    phase. When the running green has served nobody and nobody approaches it, only phases with a
    queue, if there are any, and once a first vehicle has waited `starvation_s`, only phases that
    serve its lane: a shared lane whose head wants another turn would otherwise repeat one
    observation for ever (lock-in). After `max_green_s`, if others wait, every phase but the running
    one.
    """
    every = tuple(range(len(junction.phases)))
    current = observation.current
    occupied = any(observation.inside_veh)
    if observation.green_s < max(timing.min_green_s, occupied * timing.occupied_green_s):
        return (current,)
    others = tuple(i for i in every if i != current)
    waiting = _phases_with_queue(junction, observation, others)
    if not waiting:
        return every
    idle = _serves_nobody(junction, observation)
    starving = _starving_phases(junction, observation, others, timing) if idle else ()
    if starving:
        return starving
    if idle and timing.starvation_s:
        return waiting
    if observation.green_s >= timing.max_green_s:
        return others
    return every


def _phases_with_queue(
    junction: JunctionSpec, observation: Observation, candidates: Sequence[int]
) -> tuple[int, ...]:
    return tuple(
        i
        for i in candidates
        if any(observation.lanes[lane].queue_veh for lane in junction.phases[i].lanes)
    )


def _serves_nobody(junction: JunctionSpec, observation: Observation) -> bool:
    lanes = [observation.lanes[i] for i in junction.phases[observation.current].lanes]
    approaching = sum(lane.moving_veh[0] + lane.moving_veh[1] for lane in lanes)
    return observation.served_veh == 0 and approaching == 0


def _starving_phases(
    junction: JunctionSpec,
    observation: Observation,
    candidates: Sequence[int],
    timing: SignalTiming,
) -> tuple[int, ...]:
    waits = [
        (lane.first_wait_s, i)
        for i, lane in enumerate(observation.lanes)
        if timing.starvation_s and lane.first_wait_s >= timing.starvation_s
    ]
    for _, lane in sorted(waits, reverse=True):
        serving = tuple(i for i in candidates if lane in junction.phases[i].lanes)
        if serving:
            return serving
    return ()

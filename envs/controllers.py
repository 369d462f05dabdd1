"""Classical controllers: baselines, teachers and base policies, as pure functions of a Decision.

`fixed` and `actuated` are signal programs that SUMO runs by itself, and `lookahead` needs a world
to branch; those three live in `envs.sumo`. All choose from the same legal phases as a model does.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from envs.types import Action, Decision

PROGRAMS = ("fixed", "actuated")
"""Controllers that are programs of the network itself."""

EXTENDED_S = 15
EXTENDING_VEH = 4


def max_pressure(decision: Decision) -> Action:
    """The legal phase with the largest difference of queues before and behind the junction.

    RESCO's MAXPRESSURE (Ault and Sharon 2021), after Varaiya 2013.
    """
    observation = decision.observation
    return _best(
        decision,
        lambda i: (
            sum(observation.lanes[lane].queue_veh for lane in decision.junction.phases[i].lanes)
            - observation.downstream_queue_veh[i]
        ),
    )


def max_wave(decision: Decision) -> Action:
    """The legal phase with the most queued and approaching vehicles: RESCO's MAXWAVE (greedy)."""
    lanes = decision.observation.lanes
    return _best(
        decision,
        lambda i: sum(
            lanes[lane].queue_veh + sum(lanes[lane].moving_veh)
            for lane in decision.junction.phases[i].lanes
        ),
    )


def max_wave_extended(decision: Decision) -> Action:
    """Max-wave that keeps a green for `EXTENDED_S` while it has `EXTENDING_VEH` to serve.

    Counted are vehicles that queue or come within 50 m. As an actuated signal does, it lets a queue
    go before it changes: where choices are made every few seconds and roads are full, max-wave
    itself spends much of the time in yellow.
    """
    seen = decision.observation
    served = [seen.lanes[lane] for lane in decision.junction.phases[seen.current].lanes]
    waiting_veh = sum(lane.queue_veh + lane.moving_veh[0] for lane in served)
    extends = seen.green_s < EXTENDED_S and waiting_veh >= EXTENDING_VEH
    if extends and seen.current in decision.legal:
        return Action(phase=seen.current)
    return max_wave(decision)


def random_phase(decision: Decision) -> Action:
    """A legal phase at random; the instant and the simulation's seed decide which."""
    key = f"{decision.seed}/{decision.observation.time_s}/{decision.junction.tls_id}"
    return Action(phase=random.Random(key).choice(decision.legal))


def _best(decision: Decision, score: Callable[[int], float]) -> Action:
    """The legal phase with the highest score; a tie keeps the running phase, else the first."""
    current = decision.observation.current
    return Action(phase=max(decision.legal, key=lambda i: (score(i), i == current, -i)))


CONTROLLERS: dict[str, Callable[[Decision], Action]] = {
    "max_pressure": max_pressure,
    "max_wave": max_wave,
    "max_wave_extended": max_wave_extended,
    "random": random_phase,
}

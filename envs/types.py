"""The carriers of the traffic world: read this file and you know what travels between its parts.

All are frozen values that pickle; none holds a connection or a simulation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Approach = str
"""Compass name of the arm a lane comes from: north, northeast, east, ..., or one of those with a
number (`north2`) when two arms share a sector."""

DecisionFormat = Literal["phase", "phase_duration", "extend"]
"""How a junction is asked: see `envs.answers`."""

SECTORS: tuple[Approach, ...] = (
    *("north", "northeast", "east", "southeast"),
    *("south", "southwest", "west", "northwest"),
)
"""Clockwise."""

Turn = str
"""left, through, right or turnaround."""

TURNS: tuple[Turn, ...] = ("turnaround", "left", "through", "right")
"""From the middle of the road to the kerb."""


NUM_RNGS = 1024
"""SUMO's lanes share 64 generators of random numbers. With one for each, what a junction does
changes the dice of nobody whom its vehicles have not met: two branches differ by what was chosen,
not by chance, and so do two controllers under one seed. Lanes beyond this number share them again;
more generators cost forks time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalTiming:
    """What a junction must respect, in seconds. RESCO's defaults (10 s decisions, 3 s yellow)."""

    decision_interval_s: int = 10
    yellow_s: int = 3
    all_red_s: int = 0
    min_green_s: int = 5
    occupied_green_s: int = 15
    """A green lasts this long at least while a vehicle stands within the junction: left turners
    who wait for a gap would else be caught in the way of the next green and, green after green,
    catch others until nobody moves. 0 turns the rule off."""
    max_green_s: int = 120
    starvation_s: int = 90
    """A first vehicle that has waited this long, while the running green serves nobody, makes the
    phases that serve it the only legal ones. 0 turns the rule off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One network with its demand and time window; the seed of a simulation is not part of it.

    Example:
        Scenario(name="resco:cologne1", kind="resco", net_file="/.../cologne1.net.xml",
                 route_files=("/.../cologne1.rou.xml",), begin_s=25200, end_s=28800)
    """

    name: str
    kind: str
    """generated, resco or user."""
    net_file: str
    route_files: tuple[str, ...]
    additional_files: tuple[str, ...] = ()
    begin_s: float
    end_s: float
    step_length_s: float = 1.0
    options: tuple[tuple[str, str], ...] = ()
    """SUMO's options that decide how vehicles move, by name: those of a user's `.sumocfg`, and
    the `scale` that a name asks for."""
    timing: SignalTiming = field(default_factory=SignalTiming)


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneSpec:
    """An incoming lane of a junction.

    `chain` lists the lane itself and then the lanes upstream that lead only into it, as far as
    detectors reach (200 m), each with the distance of its end from the stop line in metres.
    """

    lane_id: str
    approach: Approach
    turns: tuple[Turn, ...]
    """Every turn that may be made from this lane, whatever the phase."""
    length_m: float
    """Total length of the chain."""
    speed_limit_mps: float
    chain: tuple[tuple[str, float], ...]
    upstream: tuple[tuple[str, float], ...] = ()
    """Further lanes within detector range, from which vehicles may come to this one or go
    elsewhere, each with the distance of its end from the stop line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A green phase: what the signal shows while it runs, and what it opens.

    Example (two lanes of the northern arm, the left turn giving way):
        Phase(name="A", state="GGgrr", lanes=(0, 1), turns=(("through",), ("left",)),
              protected=(True, False))
    """

    name: str
    """A, B, C, ... by its place; learners see other names (`envs.naming.retold`)."""
    state: str
    """SUMO signal state, one character per controlled link."""
    lanes: tuple[int, ...]
    """Indices into `JunctionSpec.lanes` that get some green."""
    turns: tuple[tuple[Turn, ...], ...]
    """For each of `lanes`: the turns this phase opens from it (right-on-red is not counted)."""
    protected: tuple[bool, ...]
    """For each of `lanes`: no opened turn has to give way (`G`, not `g`)."""
    downstream: tuple[str, ...] = ()
    """Lanes that the opened links lead into."""
    inside: tuple[str, ...] = ()
    """Lanes within the junction on the ways that the opened links take."""
    upstream: tuple[tuple[str, float], ...] = ()
    """The `upstream` of `lanes`, each lane once, without what is in one of their chains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JunctionSpec:
    """A signalled junction with at least two green phases; constant during a simulation."""

    tls_id: str
    lanes: tuple[LaneSpec, ...]
    phases: tuple[Phase, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneState:
    """What detectors on one lane see now."""

    queue_veh: int
    """Vehicles slower than 0.1 m/s within 200 m of the stop line (RESCO's queue)."""
    moving_veh: tuple[int, int, int]
    """Moving vehicles at 0-50, 50-100 and 100-200 m from the stop line."""
    first_wait_s: int
    """How long the vehicle nearest to the stop line has been standing; 0 if it moves."""
    upstream_veh: tuple[int, int] = (0, 0)
    """Vehicles that halt and that move on the lane's `upstream`, within 200 m of the stop line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """What one junction's detectors see at one instant."""

    time_s: float
    lanes: tuple[LaneState, ...]
    """In the order of `JunctionSpec.lanes`."""
    downstream_free: tuple[float, ...]
    """For each phase: smallest share, over the lanes it leads into, that no standing vehicle
    takes, 0..1."""
    downstream_queue_veh: tuple[int, ...]
    """For each phase: vehicles that halt within 50 m behind the junction, where it leads."""
    inside_veh: tuple[int, ...]
    """For each phase: vehicles that halt within the junction on its ways, such as left turners that
    still wait for a gap."""
    upstream_veh: tuple[tuple[int, int], ...]
    """For each phase: vehicles that halt and that move on its `upstream` lanes."""
    current: int
    """Index of the running green phase."""
    green_s: int
    """Seconds since it started (yellow not counted)."""
    served_veh: int
    """Vehicles that left the lanes of the running green since the last decision instant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One junction at one instant that has to choose its next green phase."""

    scenario: str
    seed: int
    junction: JunctionSpec
    observation: Observation
    legal: tuple[int, ...]
    """Indices of the phases that may be chosen now; never empty."""
    timing: SignalTiming = field(default_factory=SignalTiming)
    format: DecisionFormat = "phase"

    def legal_names(self) -> tuple[str, ...]:
        """Names of the legal phases, in order."""
        return tuple(self.junction.phases[i].name for i in self.legal)


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Action:
    """The next green phase of one junction, and for how long it is settled.

    Example:
        Action(phase=2, hold_s=30)  # C, and no other choice before 30 s have passed
    """

    phase: int
    """Index into `JunctionSpec.phases`."""
    hold_s: int = 0
    """Seconds, the change's yellow included, until the junction may choose again; it may not before
    the next decision instant in any case. What ends a green earlier (`envs.signals.legal_phases`)
    ends it here too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParseFailure:
    """Why a completion names no single legal action."""

    reason: str


JointAction = Mapping[str, Action]
"""By `tls_id`. Junctions that are not named follow the base controller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What happened to the traffic in the `horizon_s` after an instant, integrated over time.

    `time_loss_veh_s` counts seconds lost against the speed limit by vehicles in the network
    (SUMO's timeLoss) plus one second per second of every vehicle that waits to be inserted.
    """

    horizon_s: float
    time_loss_veh_s: float
    junction_time_loss_veh_s: float
    """The part lost on the deciding junction's incoming lanes."""
    halting_veh_s: float
    pending_veh_s: float
    arrived_veh: int
    interval_digest: str
    """Digest one decision interval after the instant: what the live world must equal if it
    executes the same action."""
    digest: str
    """Hash of every vehicle's position, lane and speed at the end: equal digests, equal worlds."""

    @property
    def is_finite(self) -> bool:
        """Every cost is a number."""
        costs = (
            self.time_loss_veh_s,
            self.junction_time_loss_veh_s,
            self.halting_veh_s,
            self.pending_veh_s,
        )
        return all(map(math.isfinite, costs))


@dataclass(frozen=True, kw_only=True, slots=True)
class TripStats:
    """An episode by its trips, in RESCO's definitions (unfinished and never departed included).

    Delay = (sum of timeLoss + departDelay over trips + sum of (end - scheduled departure) over
    vehicles that never departed) / their number.
    """

    delay_s: float
    wait_s: float
    queue_veh: float
    """Mean number of halting vehicles per signalled junction and decision instant."""
    throughput_veh: int
    """Vehicles that reached their destination."""
    unfinished_veh: int
    not_departed_veh: int
    num_trips: int
    gridlock: bool
    """See `envs.metrics` for the rule."""

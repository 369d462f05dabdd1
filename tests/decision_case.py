"""A hand-made junction and decisions on it: small enough to reckon every number by hand.

Lane 0 comes from the north (through and right share it), lane 1 from the north (left), lane 2 from
the east (through). Phase A opens the north, B the north's left alone, C the east and, yielding,
the north's left.
"""

from __future__ import annotations

from collections.abc import Sequence

from envs.types import Decision, JunctionSpec, LaneSpec, LaneState, Observation, Outcome, Phase

EMPTY = LaneState(queue_veh=0, moving_veh=(0, 0, 0), first_wait_s=0)


def _lane(lane_id: str, approach: str, *turns: str) -> LaneSpec:
    return LaneSpec(
        lane_id=lane_id,
        approach=approach,
        turns=turns,
        length_m=200.0,
        speed_limit_mps=13.9,
        chain=((lane_id, 0.0),),
    )


JUNCTION = JunctionSpec(
    tls_id="center",
    lanes=(
        _lane("n_0", "north", "through", "right"),
        _lane("n_1", "north", "left"),
        _lane("e_0", "east", "through"),
    ),
    phases=(
        Phase(
            name="A",
            state="GGrr",
            lanes=(0,),
            turns=(("through", "right"),),
            protected=(True,),
        ),
        Phase(name="B", state="rrGr", lanes=(1,), turns=(("left",),), protected=(True,)),
        Phase(
            name="C",
            state="rGgG",
            lanes=(0, 1, 2),
            turns=(("right",), ("left",), ("through",)),
            protected=(True, False, True),
        ),
    ),
)


def lane(
    queue: int = 0,
    moving: tuple[int, int, int] = (0, 0, 0),
    wait_s: int = 0,
    upstream: tuple[int, int] = (0, 0),
) -> LaneState:
    """What the detectors of one lane see."""
    return LaneState(queue_veh=queue, moving_veh=moving, first_wait_s=wait_s, upstream_veh=upstream)


def observation(
    *lanes: LaneState,
    current: int = 0,
    green_s: int = 20,
    served: int = 1,
    free: Sequence[float] = (1.0, 1.0, 1.0),
    behind: Sequence[int] = (0, 0, 0),
    inside: Sequence[int] = (0, 0, 0),
    upstream: Sequence[tuple[int, int]] = ((0, 0), (0, 0), (0, 0)),
) -> Observation:
    """What the junction sees; lanes that are not given are empty."""
    return Observation(
        time_s=100.0,
        lanes=(*lanes, *(EMPTY,) * (3 - len(lanes))),
        downstream_free=tuple(free),
        downstream_queue_veh=tuple(behind),
        inside_veh=tuple(inside),
        upstream_veh=tuple(upstream),
        current=current,
        green_s=green_s,
        served_veh=served,
    )


def decision(seen: Observation, legal: Sequence[int] = (0, 1, 2), seed: int = 1) -> Decision:
    """The junction's decision on what it sees."""
    return Decision(
        scenario="hand-made", seed=seed, junction=JUNCTION, observation=seen, legal=tuple(legal)
    )


def outcome(time_loss: float, *, junction: float = 0.0, halting: float = 0.0) -> Outcome:
    """An outcome that cost what is said."""
    return Outcome(
        horizon_s=60.0,
        time_loss_veh_s=time_loss,
        junction_time_loss_veh_s=junction,
        halting_veh_s=halting,
        pending_veh_s=0.0,
        arrived_veh=0,
        interval_digest="",
        digest="",
    )

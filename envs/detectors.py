"""What detectors on lanes see in the running simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import libsumo

from envs.layout import DETECTOR_RANGE_M
from envs.ledger import HALTING_MPS
from envs.types import LaneSpec, LaneState

NEAR_M, MID_M = 50.0, 100.0
VEHICLE_SPACE_M = 7.5
"""Length plus gap of a standing passenger car: SUMO's default."""

Counted = Callable[[str, float], tuple[int, int]]
"""`present`, or what remembers its answers."""


def sight(lane: LaneSpec, counted: Counted) -> tuple[LaneState, set[str]]:
    """What detectors see on a lane and what feeds it, and which vehicles those are."""
    queue, moving = 0, [0, 0, 0]
    nearest_m, first = DETECTOR_RANGE_M, None
    ids: set[str] = set()
    vehicle = libsumo.vehicle
    for lane_id, end_m in lane.chain:
        on_lane = libsumo.lane.getLastStepVehicleIDs(lane_id)
        if not on_lane:
            continue
        length = libsumo.lane.getLength(lane_id)
        for v in on_lane:
            distance_m = end_m + length - vehicle.getLanePosition(v)
            if distance_m >= DETECTOR_RANGE_M:
                continue
            ids.add(v)
            halting = vehicle.getSpeed(v) < HALTING_MPS
            if halting:
                queue += 1
            else:
                moving[(distance_m >= NEAR_M) + (distance_m >= MID_M)] += 1
            if distance_m < nearest_m:
                nearest_m, first = distance_m, v if halting else None
    wait_s = round(vehicle.getWaitingTime(first)) if first else 0
    state = LaneState(
        queue_veh=queue,
        moving_veh=(moving[0], moving[1], moving[2]),
        first_wait_s=wait_s,
        upstream_veh=behind(lane.upstream, counted),
    )
    return state, ids


def behind(lanes: Sequence[tuple[str, float]], counted: Counted) -> tuple[int, int]:
    """Vehicles that halt and that move on some lanes, given with the distance of their ends."""
    counts = [counted(*lane) for lane in lanes]
    return sum(halting for halting, _ in counts), sum(moving for _, moving in counts)


def present(lane_id: str, end_m: float) -> tuple[int, int]:
    """Vehicles within detector range that halt and that move on a lane that ends `end_m` before
    the stop line."""
    first_m = libsumo.lane.getLength(lane_id) - (DETECTOR_RANGE_M - end_m)
    vehicle = libsumo.vehicle
    near = [
        vehicle.getSpeed(v)
        for v in libsumo.lane.getLastStepVehicleIDs(lane_id)
        if vehicle.getLanePosition(v) > first_m
    ]
    halting = sum(speed < HALTING_MPS for speed in near)
    return halting, len(near) - halting


def downstream(lanes: Sequence[str]) -> tuple[float, int]:
    """What is behind the junction: smallest share of lane that no standing vehicle takes, and
    halting vehicles nearby.

    Moving vehicles make room: on a lane of ten metres a single one would always leave none.
    A queue further down the road belongs to the next signal. Counting it as pressure, at any
    distance, more than doubles max-pressure's delay on RESCO's cologne8.
    """
    free, queue = 1.0, 0
    vehicle = libsumo.vehicle
    for lane in lanes:
        present = libsumo.lane.getLastStepVehicleIDs(lane)
        if present:
            halting = [v for v in present if vehicle.getSpeed(v) < HALTING_MPS]
            room = max(1.0, libsumo.lane.getLength(lane) / VEHICLE_SPACE_M)
            free = min(free, max(0.0, 1.0 - len(halting) / room))
            queue += sum(vehicle.getLanePosition(v) < NEAR_M for v in halting)
    return free, queue

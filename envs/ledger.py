"""Adds up what traffic loses from one instant on: the measurement behind every reward.

Samples every `SAMPLE_S` seconds and at the end. SUMO's own timeLoss is cumulative per vehicle, so
sampling loses only what a vehicle loses after its last sample, just before it leaves the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import libsumo

from envs.types import Outcome

SAMPLE_S = 5
HALTING_MPS = 0.1
"""SUMO's and RESCO's limit below which a vehicle counts as halting."""


class Ledger:
    """Accumulates an Outcome; make it at the instant, call `step` after every simulation step."""

    def __init__(self, junction_lanes: Collection[str] = ()) -> None:
        self._junction_lanes = tuple(junction_lanes)
        self._loss_s = _time_losses()
        self._start_s = self._sampled_s = libsumo.simulation.getTime()
        self.interval_digest = ""
        self._time_loss = self._junction_time_loss = self._halting = self._pending = 0.0
        self._arrived = 0

    def step(self) -> None:
        """Count arrivals; sample if it is time, whatever the decision interval is."""
        self._arrived += libsumo.simulation.getArrivedNumber()
        elapsed_s = round(libsumo.simulation.getTime() - self._sampled_s, 6)
        if elapsed_s >= SAMPLE_S:
            self._sample(elapsed_s)

    def _sample(self, elapsed_s: float) -> None:
        self._sampled_s += elapsed_s
        now = _time_losses()
        before = self._loss_s
        gained = {v: loss - before.get(v, 0.0) for v, loss in now.items()}
        pending = len(libsumo.simulation.getPendingVehicles()) * elapsed_s
        self._time_loss += sum(gained.values()) + pending
        self._pending += pending
        self._junction_time_loss += sum(
            gained.get(v, 0.0)
            for lane in self._junction_lanes
            for v in libsumo.lane.getLastStepVehicleIDs(lane)
        )
        speed = libsumo.vehicle.getSpeed
        self._halting += elapsed_s * sum(speed(v) < HALTING_MPS for v in now)
        # Whom SUMO has taken off the road for a moment, after a collision, comes back with all that
        # was lost before.
        self._loss_s = before | now

    def outcome(self) -> Outcome:
        """What has been lost since the instant."""
        if rest_s := round(libsumo.simulation.getTime() - self._sampled_s, 6):
            self._sample(rest_s)
        return Outcome(
            horizon_s=libsumo.simulation.getTime() - self._start_s,
            time_loss_veh_s=self._time_loss,
            junction_time_loss_veh_s=self._junction_time_loss,
            halting_veh_s=self._halting,
            pending_veh_s=self._pending,
            arrived_veh=self._arrived,
            interval_digest=self.interval_digest,
            digest=world_digest(),
        )


def world_digest() -> str:
    """Hash of every vehicle's lane, position and speed now."""
    vehicle = libsumo.vehicle
    state = [
        (v, vehicle.getLaneID(v), vehicle.getLanePosition(v), vehicle.getSpeed(v))
        for v in vehicle.getIDList()
    ]
    return hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()


def _time_losses() -> dict[str, float]:
    loss = libsumo.vehicle.getTimeLoss
    return {v: loss(v) for v in libsumo.vehicle.getIDList()}

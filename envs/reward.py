"""What the answers of one group earn: measured outcomes and the format, as a named breakdown.

Pure. There are three traffic terms:

- `regret`: what an answer costs less than the group's mean, in units that are the same for every
  instant, so instants at which the choice hardly matters teach little. Beyond a bound all costs are
  one: an answer that is bad enough is not worth telling from a worse one, and must not decide how
  far apart the good ones are. Comparable within its group only.
- `tanh`: tanh(-cost / scale).
- `tanh_relative`: tanh(-(cost - what max-pressure's choice costs) / scale).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from envs.types import Outcome

TrafficTerm = Literal["regret", "tanh", "tanh_relative"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardWeights:
    """Weights on the terms of an Outcome, and what each kind of format earns."""

    traffic: TrafficTerm = "regret"
    time_loss: float = 1.0
    junction_time_loss: float = 0.0
    halting: float = 0.0
    scale_veh_s: float = 30.0
    """The cost that one unit of reward stands for."""
    max_regret_veh_s: float = 60.0
    """An answer that costs this much more than the best of its group costs as much as any worse."""
    format_strict: float = 0.0
    format_partial: float = -0.5
    format_invalid: float = -2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """One answer's reward: `total = traffic + format`."""

    traffic: float
    format: float
    cost_veh_s: float | None
    """What the answer cost the traffic; None for an invalid answer."""

    @property
    def total(self) -> float:
        """The scalar that training uses."""
        return self.traffic + self.format


FormatKind = str
"""strict, partial or invalid."""


def cost_veh_s(outcome: Outcome, weights: RewardWeights) -> float:
    """The weighted cost of an outcome in vehicle seconds.

    Raises:
        ValueError: a term is not finite; a broken simulation must not become a reward.
    """
    cost = (
        weights.time_loss * outcome.time_loss_veh_s
        + weights.junction_time_loss * outcome.junction_time_loss_veh_s
        + weights.halting * outcome.halting_veh_s
    )
    if not math.isfinite(cost):
        raise ValueError(f"the cost of an outcome is {cost}: {outcome}")
    return cost


def group_rewards(
    outcomes: Sequence[Outcome | None],
    formats: Sequence[FormatKind],
    weights: RewardWeights,
    *,
    reference: Outcome | None = None,
) -> tuple[Reward, ...]:
    """Rewards of one group; `outcomes[i]` is None exactly where `formats[i]` is invalid.

    `reference` is the outcome of max-pressure's choice. An invalid answer gets the traffic term of
    the worst valid one, so a bad format never pays.

    Raises:
        ValueError: `tanh_relative` without a reference.
    """
    costs = [None if outcome is None else cost_veh_s(outcome, weights) for outcome in outcomes]
    known = [cost for cost in costs if cost is not None]
    if weights.traffic == "tanh_relative" and known and reference is None:
        raise ValueError("tanh_relative is relative to max-pressure, whose outcome is missing")
    base = cost_veh_s(reference, weights) if reference is not None else 0.0
    terms = _traffic_terms(known, base, weights)
    worst = min(terms, default=0.0)
    earned = {
        "strict": weights.format_strict,
        "partial": weights.format_partial,
        "invalid": weights.format_invalid,
    }
    in_turn = iter(terms)
    return tuple(
        Reward(
            traffic=worst if cost is None else next(in_turn), format=earned[kind], cost_veh_s=cost
        )
        for cost, kind in zip(costs, formats, strict=True)
    )


def _traffic_terms(
    costs: Sequence[float], reference_veh_s: float, weights: RewardWeights
) -> list[float]:
    if not costs:
        return []
    if weights.traffic != "regret":
        zero = reference_veh_s if weights.traffic == "tanh_relative" else 0.0
        return [math.tanh((zero - cost) / weights.scale_veh_s) for cost in costs]
    bound = min(costs) + weights.max_regret_veh_s
    bounded = [min(cost, bound) for cost in costs]
    mean = statistics.fmean(bounded)
    return [(mean - cost) / weights.scale_veh_s for cost in bounded]

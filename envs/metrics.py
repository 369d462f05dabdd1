"""What an episode cost its travellers, and how two controllers compare over paired episodes.

Delay, wait and throughput are RESCO's, computed from SUMO's own trip records; the comparison
statistics are deterministic functions of their arguments. This module runs no simulation.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from envs.errors import UserError, WorldError
from envs.types import TripStats

GRIDLOCK_LOST_S = 300.0
"""A vehicle that has lost this much and is still not there is stranded (SUMO's own default limit
for calling a vehicle jammed, `--time-to-teleport`)."""

GRIDLOCK_SHARE = 0.05
"""An episode with more than this share of its scheduled vehicles stranded is a gridlock.

Measured on one-hour runs: 0 to 0.2 % under the fixed programs of cologne1, cologne3 and
ingolstadt21 (delays up to 140 s); 4 % on ingolstadt7, whose unsignalised junction jams for part
of the hour; 5.3 % with one of cologne3's three signals locked (131 s); 28 to 39 % with all
signals locked (500 to 690 s).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A heavy-tailed sample in three numbers."""

    median: float
    mean: float
    p95: float
    n: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean with its confidence interval; infinite bounds where one value says nothing of spread.

    Example:
        Interval(mean=-7.1, low=-9.0, high=-5.2, n=5)
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        """The sign of the mean is not in doubt at this confidence."""
        return self.low > 0 or self.high < 0


def trip_stats(
    tripinfo_file: Path,
    *,
    not_departed_depart_s: Sequence[float],
    end_s: float,
    queue_veh: float,
) -> TripStats:
    """The episode that ended at `end_s`, unfinished and never inserted vehicles included.

    The file is written with `--tripinfo-output.write-unfinished true` and without
    `write-undeparted`: who never departed comes from `not_departed_depart_s`, their scheduled
    departures. Wait is the mean over departed vehicles, as in RESCO.

    Gridlock: more than `GRIDLOCK_SHARE` of all scheduled vehicles are stranded, that is, have not
    arrived by the end although they have lost `GRIDLOCK_LOST_S` or more already.
    """
    lost_s: list[float] = []
    wait_s: list[float] = []
    arrived: list[bool] = []
    for trip in _read_trips(tripinfo_file):
        if float(trip["depart"]) < 0:
            raise ValueError(
                f"{tripinfo_file} lists {trip['id']}, which never departed: it would be counted "
                "twice; write the file without --tripinfo-output.write-undeparted"
            )
        lost_s.append(float(trip["timeLoss"]) + float(trip["departDelay"]))
        wait_s.append(float(trip["waitingTime"]))
        arrived.append(float(trip["arrival"]) >= 0)
    pending_s = [end_s - depart_s for depart_s in not_departed_depart_s]
    num_trips = len(lost_s) + len(pending_s)
    if num_trips == 0:
        raise UserError(
            f"No vehicle was scheduled before second {end_s:g}, so there is no delay to report: "
            "check that the routes depart inside the scenario's time window."
        )
    unfinished_s = [lost for lost, done in zip(lost_s, arrived, strict=True) if not done]
    stranded = sum(lost >= GRIDLOCK_LOST_S for lost in [*unfinished_s, *pending_s])
    return TripStats(
        delay_s=(math.fsum(lost_s) + math.fsum(pending_s)) / num_trips,
        wait_s=math.fsum(wait_s) / len(wait_s) if wait_s else 0.0,
        queue_veh=queue_veh,
        throughput_veh=sum(arrived),
        unfinished_veh=len(unfinished_s),
        not_departed_veh=len(pending_s),
        num_trips=num_trips,
        gridlock=stranded > GRIDLOCK_SHARE * num_trips,
    )


def summarise(values: Sequence[float]) -> Summary:
    """Median, mean and 95th percentile (linear interpolation) of at least one value."""
    data = _sample(values)
    return Summary(
        median=float(np.median(data)),
        mean=float(data.mean()),
        p95=float(np.percentile(data, 95)),
        n=data.size,
    )


def gridlock_rate(flags: Iterable[bool]) -> float:
    """Share of episodes that ended in gridlock."""
    return float(_sample([float(flag) for flag in flags]).mean())


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    seed: int = 0,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Mean of `a - b`, pair by pair, with the wider of the bootstrap and the t interval.

    The percentile bootstrap of five pairs covers about 80 % where it says 95 %; the t interval is
    right for bell-shaped differences but blind to skew. Taking the lowest low and the highest high
    of the two claims no more than either would.
    """
    by_bootstrap = bootstrap_difference(
        a, b, seed=seed, num_resamples=num_resamples, confidence=confidence
    )
    by_t = t_difference(a, b, confidence=confidence)
    return Interval(
        mean=by_t.mean,
        low=min(by_bootstrap.low, by_t.low),
        high=max(by_bootstrap.high, by_t.high),
        n=by_t.n,
    )


def bootstrap_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    seed: int = 0,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of the mean paired difference `a - b`: same arguments, same interval."""
    difference = _differences(a, b)
    rng = np.random.default_rng(seed)
    picks = rng.integers(difference.size, size=(num_resamples, difference.size))
    means = difference[picks].mean(axis=1)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(
        mean=float(difference.mean()), low=float(low), high=float(high), n=difference.size
    )


def t_difference(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's interval of the mean paired difference `a - b`; infinite for a single pair."""
    difference = _differences(a, b)
    mean = float(difference.mean())
    if difference.size < 2:
        return Interval(mean=mean, low=-math.inf, high=math.inf, n=1)
    error = float(difference.std(ddof=1)) / math.sqrt(difference.size)
    half = t_quantile(0.5 + confidence / 2, difference.size - 1) * error
    return Interval(mean=mean, low=mean - half, high=mean + half, n=difference.size)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t for 0.5 <= probability < 1, to 1e-10 (bisection of the exact law)."""
    if not 0.5 <= probability < 1:
        raise ValueError(f"probability must be in [0.5, 1), got {probability}")
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    while high - low > 1e-10 * max(high, 1.0):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0: the finite series for whole degrees of freedom."""
    theta = math.atan(t / math.sqrt(degrees))
    cos_squared = math.cos(theta) ** 2
    odd = degrees % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cos_squared * k / (k + 1)
    within = math.sin(theta) * total
    if odd:
        within = 2 / math.pi * (theta + within)
    return 0.5 + within / 2


def _read_trips(file: Path) -> Iterable[dict[str, str]]:
    try:
        for _, element in ElementTree.iterparse(file, events=("end",)):
            if element.tag == "tripinfo":
                yield element.attrib
                element.clear()
    except (OSError, ElementTree.ParseError) as error:
        raise WorldError("trips", f"{file} is not a complete tripinfo file: {error}") from error


def _sample(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=float)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"expected a list of at least one number, got shape {data.shape}")
    return data


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    left, right = _sample(a), _sample(b)
    if left.size != right.size:
        raise ValueError(f"pairs need equal lengths, got {left.size} and {right.size}")
    return left - right

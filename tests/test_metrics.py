from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from envs.errors import UserError, WorldError
from envs.metrics import (
    Interval,
    bootstrap_difference,
    gridlock_rate,
    paired_difference,
    summarise,
    t_difference,
    t_quantile,
    trip_stats,
)

ARRIVED = (
    '<tripinfo id="{id}" depart="{depart}.00" departDelay="{delay}" arrival="900.00" '
    'duration="50.00" waitingTime="{wait}" timeLoss="{loss}" vaporized=""/>'
)
UNFINISHED = ARRIVED.replace('arrival="900.00"', 'arrival="-1.00"').replace(
    'vaporized=""', 'vaporized="end"'
)


def write_trips(folder: Path, trips: list[str]) -> Path:
    file = folder / "tripinfo.xml"
    file.write_text(
        '<?xml version="1.0"?>\n<tripinfos xmlns:xsi="x">\n' + "\n".join(trips) + "\n</tripinfos>"
    )
    return file


def trip(template: str, loss: float, *, delay: float = 0.0, wait: float = 0.0) -> str:
    return template.format(id=f"v{loss}", depart=10, delay=delay, wait=wait, loss=loss)


def test_delay_counts_unfinished_and_never_departed_vehicles_as_resco_does(tmp_path):
    file = write_trips(
        tmp_path,
        [trip(ARRIVED, 20, delay=4, wait=10), trip(UNFINISHED, 100, delay=6, wait=60)],
    )
    stats = trip_stats(file, not_departed_depart_s=[950.0, 990.0], end_s=1000.0, queue_veh=2.5)
    assert stats.delay_s == (24 + 106 + 50 + 10) / 4
    assert stats.wait_s == 35
    assert (stats.throughput_veh, stats.unfinished_veh, stats.not_departed_veh) == (1, 1, 2)
    assert (stats.num_trips, stats.queue_veh) == (4, 2.5)


def test_an_episode_of_which_nobody_departed_has_the_delay_of_those_who_wait(tmp_path):
    file = write_trips(tmp_path, [])
    stats = trip_stats(file, not_departed_depart_s=[0.0], end_s=60.0, queue_veh=0.0)
    assert (stats.delay_s, stats.wait_s, stats.gridlock) == (60.0, 0.0, False)


def test_gridlock_is_more_than_a_twentieth_of_the_vehicles_stranded(tmp_path):
    arrived = [trip(ARRIVED, 30)] * 95
    five = write_trips(tmp_path, arrived + [trip(UNFINISHED, 290, delay=20)] * 5)
    assert not trip_stats(five, not_departed_depart_s=[], end_s=3600, queue_veh=0).gridlock
    assert trip_stats(five, not_departed_depart_s=[3300], end_s=3600, queue_veh=0).gridlock


def test_slow_but_arriving_traffic_and_late_starters_are_no_gridlock(tmp_path):
    trips = [trip(ARRIVED, 900)] * 60 + [trip(UNFINISHED, 120)] * 30
    file = write_trips(tmp_path, trips)
    stats = trip_stats(file, not_departed_depart_s=[3500] * 10, end_s=3600, queue_veh=0)
    assert not stats.gridlock


def test_a_window_without_vehicles_is_refused_in_one_sentence(tmp_path):
    file = write_trips(tmp_path, [])
    with pytest.raises(UserError, match="No vehicle was scheduled"):
        trip_stats(file, not_departed_depart_s=[], end_s=3600, queue_veh=0)


def test_a_file_cut_off_by_a_dead_simulation_is_a_world_error(tmp_path):
    file = tmp_path / "tripinfo.xml"
    file.write_text("<tripinfos>\n" + trip(ARRIVED, 30))
    with pytest.raises(WorldError, match="not a complete"):
        trip_stats(file, not_departed_depart_s=[], end_s=3600, queue_veh=0)


def test_never_departed_vehicles_in_the_file_are_refused_not_counted_twice(tmp_path):
    undeparted = trip(UNFINISHED, 0, delay=200).replace('depart="10.00"', 'depart="-1"')
    file = write_trips(tmp_path, [undeparted])
    with pytest.raises(ValueError, match="counted twice"):
        trip_stats(file, not_departed_depart_s=[800], end_s=1000, queue_veh=0)


def test_summary_shows_the_tail_that_the_median_hides():
    summary = summarise([20, 21, 22, 23, 500])
    assert (summary.median, summary.n) == (22, 5)
    assert summary.mean == pytest.approx(117.2)
    assert summary.p95 == pytest.approx(404.6)
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_gridlock_rate_is_the_share_of_episodes():
    assert gridlock_rate([True, False, False, False]) == 0.25


@pytest.mark.parametrize(
    ("probability", "degrees", "table"),
    [
        (0.975, 1, 12.7062047),
        (0.975, 2, 4.3026527),
        (0.975, 4, 2.7764451),
        (0.975, 9, 2.2621572),
        (0.95, 5, 2.0150484),
        (0.975, 1000, 1.9623391),
        (0.5, 3, 0.0),
    ],
)
def test_t_quantile_agrees_with_the_tables(probability, degrees, table):
    assert t_quantile(probability, degrees) == pytest.approx(table, abs=1e-6)


def test_t_quantile_refuses_a_probability_outside_its_half():
    with pytest.raises(ValueError, match="probability"):
        t_quantile(0.2, 4)


def test_paired_difference_is_deterministic_and_takes_the_wider_bounds():
    a, b = [15.2, 16.0, 14.8, 17.1, 15.5], [23.0, 25.1, 22.2, 24.0, 26.3]
    both = paired_difference(a, b, seed=3)
    assert both == paired_difference(a, b, seed=3)
    parts = bootstrap_difference(a, b, seed=3), t_difference(a, b)
    assert both.low == min(part.low for part in parts)
    assert both.high == max(part.high for part in parts)
    assert both.mean == pytest.approx(-8.4)
    assert both.excludes_zero


def test_pairing_finds_a_small_gain_under_large_differences_between_seeds():
    b = [20.0, 120.0, 40.0, 300.0, 75.0]
    a = [x - 1 - 0.05 * i for i, x in enumerate(b)]
    assert paired_difference(a, b).excludes_zero


def test_one_pair_claims_nothing():
    interval = paired_difference([10.0], [20.0])
    assert (interval.mean, interval.low, interval.high) == (-10.0, -math.inf, math.inf)
    assert not interval.excludes_zero


def test_pairs_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference([1.0, 2.0], [1.0])


def test_default_interval_covers_what_it_claims_with_five_pairs():
    rng = np.random.default_rng(0)
    covered = [
        (found := paired_difference(sample, [0.0] * 5, num_resamples=400)).low < 0 < found.high
        for sample in rng.normal(size=(1000, 5))
    ]
    assert np.mean(covered) > 0.93


def test_an_interval_over_zero_decides_nothing():
    assert not Interval(mean=1.0, low=-1.0, high=3.0, n=5).excludes_zero
    assert Interval(mean=1.0, low=0.5, high=3.0, n=5).excludes_zero

"""HealthMonitor: a budget must be exceeded for as long as it tolerates, and then it is named."""

from __future__ import annotations

import pytest

from rl_ft.config import Config
from rl_ft.health import HealthError, HealthMonitor

BUDGETS = {
    "health/failed_share": 0.2,
    "format/invalid_share": 0.5,
    "health/zero_variance_share": 0.98,
}


@pytest.fixture
def config() -> Config:
    return Config()


@pytest.mark.parametrize(("name", "bound"), BUDGETS.items())
def test_a_budget_exceeded_for_its_patience_stops_the_run_by_name(config, name, bound):
    monitor = HealthMonitor(config)
    for step in range(config.health.patience - 1):
        monitor.observe(step, {name: bound + 0.01})
    with pytest.raises(HealthError, match=name):
        monitor.observe(9, {name: bound + 0.01})


@pytest.mark.parametrize(("name", "bound"), BUDGETS.items())
def test_exactly_the_budget_is_within_it(config, name, bound):
    monitor = HealthMonitor(config)
    for step in range(3 * config.health.patience):
        monitor.observe(step, {name: bound})


def test_one_good_step_starts_the_count_again(config):
    monitor = HealthMonitor(config)
    for step in range(4 * config.health.patience):
        good = step % config.health.patience == config.health.patience - 1
        monitor.observe(step, {"health/failed_share": 0.0 if good else 1.0})


def test_a_single_disagreement_of_branch_and_world_stops_at_once(config):
    with pytest.raises(HealthError, match="branch_disagreements"):
        HealthMonitor(config).observe(0, {"health/branch_disagreements": 1.0})


def test_low_entropy_stops_after_its_own_patience(config):
    monitor = HealthMonitor(config)
    for step in range(config.grpo.patience - 1):
        monitor.observe(step, {"entropy": 0.0})
    with pytest.raises(HealthError, match="entropy has been below"):
        monitor.observe(99, {"entropy": 0.0})


def test_metrics_that_are_not_there_count_for_nothing(config):
    monitor = HealthMonitor(config)
    for step in range(100):
        monitor.observe(step, {"reward/mean": -9.0})

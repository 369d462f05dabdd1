"""Rollout: between two questions the policy drives the worlds."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

import pytest
from rollout_case import Pool, collect, extremes, first, greens, last, reference, rollout_config

from envs.errors import WorldError
from envs.types import Action
from rl_ft.config import Config
from rl_ft.worlds import Order, Trial, Tried, WorldPool


@pytest.fixture(scope="module")
def config(smoke_config: Config) -> Config:
    return rollout_config(smoke_config)


def pausing(config: Config) -> Config:
    """The configuration under which worlds are driven for a while between two questions."""
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_pause": 6})})


@pytest.fixture(scope="module")
def driven(config):
    """Worlds that the policy drives between questions."""
    pool = WorldPool(pausing(config), ("generated:1", "generated:6"), seed=3, num_worlds=3)
    yield Pool(pool)
    pool.close()


def test_between_questions_the_policy_drives_by_what_its_answers_mean(driven, config):
    rounds = driven.num_rounds
    _, sampler = collect(driven, pausing(config), extremes(), quota=12)
    assert len(driven.driven) > 5
    assert len(sampler.seeds) <= driven.num_rounds - rounds  # one call for questions and choices
    for standing, order in driven.driven:
        assert order == {d.junction.tls_id: Action(phase=greens(d)[0]) for d in standing}


def test_where_the_driving_policy_has_no_answer_max_pressure_decides(driven, config):
    driven.driven.clear()
    collect(driven, pausing(config), ["nothing", first], quota=6)
    assert driven.driven
    for standing, order in driven.driven:
        assert order == {d.junction.tls_id: Action(phase=reference(d)) for d in standing}


def test_a_world_that_dies_while_the_policy_drives_is_counted(driven, config):
    def kill_a_driven_one() -> None:
        for pid, state in zip(driven.pool.pids(), driven.states_now, strict=True):
            if isinstance(state, tuple):
                os.kill(pid, signal.SIGKILL)
                driven.before_settle = lambda: None
                return

    driven.before_settle = kill_a_driven_one
    collected, _ = collect(driven, pausing(config), [first, last], quota=12)
    counts = collected.tally.counts
    assert counts["failed"] == counts["failed/died"] == 1
    assert counts["driven"] > 0


def test_questions_that_all_fail_are_found_out_although_driving_works(driven, config):
    class CannotFork(Pool):
        async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
            kept = [None if isinstance(order, Trial) else order for order in orders]
            failed = Tried(outcomes={}, failure="timeout")
            tried = self.pool.settle(kept)
            return [
                failed if isinstance(order, Trial) else done
                for order, done in zip(orders, tried, strict=True)
            ]

    with pytest.raises(WorldError, match="failed/timeout"):
        collect(CannotFork(driven.pool), pausing(config), extremes(), quota=2)

"""Closed-loop episodes on real worlds: the same whatever is played beside them, and how far."""

from __future__ import annotations

import psutil
import pytest

from envs.answers import answer_text
from envs.controllers import CONTROLLERS
from envs.types import Action
from envs.world import World
from rl_ft.closed_loop import Job, play_controller, play_model
from rl_ft.types import Completion

JOBS = [Job(scenario="generated:1", seed=seed, max_s=125.0) for seed in (1, 2)]
LONGER = Job(scenario="generated:2", seed=1, max_s=200.0)


def like_max_pressure(decisions):
    """A model that answers as max-pressure does."""
    return [
        Completion(
            token_ids=(1,),
            logprobs=(0.0,),
            text=answer_text(d, Action(phase=CONTROLLERS["max_pressure"](d).phase)),
            finish_reason="stop",
            weights_version=0,
        )
        for d in decisions
    ]


def played(config, jobs, num_worlds=4, on_played=lambda share: None):
    episodes = play_model(
        "m", like_max_pressure, jobs, config, num_worlds=num_worlds, on_played=on_played
    )
    return {episode.job: episode for episode in episodes}


def driven(config, name, jobs, on_played=lambda share: None):
    return list(play_controller(name, jobs, config, on_played=on_played))


def test_an_episode_is_the_same_whatever_runs_beside_it(smoke_config):
    together = played(smoke_config, [*JOBS, LONGER])
    assert played(smoke_config, [*JOBS, LONGER], num_worlds=1) == together
    assert played(smoke_config, JOBS[1:]) == {JOBS[1]: together[JOBS[1]]}


def world_processes():
    children = psutil.Process().children()
    return [child for child in children if "envs.world_process" in " ".join(child.cmdline())]


@pytest.mark.parametrize("num_worlds", [1, 2, 3])
def test_no_more_worlds_run_side_by_side_than_asked_for(smoke_config, num_worlds):
    running = []

    def ask(decisions):
        running.append(len(world_processes()))
        return like_max_pressure(decisions)

    jobs = [*JOBS, LONGER, *(Job(scenario="generated:1", seed=3, max_s=60.0),) * 2]
    episodes = play_model(
        "m", ask, jobs, smoke_config, num_worlds=num_worlds, on_played=lambda share: None
    )
    assert len(list(episodes)) == len(jobs)
    assert max(running) == num_worlds


def test_a_model_that_answers_like_a_controller_drives_like_it(smoke_config):
    models = played(smoke_config, JOBS)
    for episode in driven(smoke_config, "max_pressure", JOBS):
        assert models[episode.job].trips == episode.trips


@pytest.mark.parametrize("name", ["fixed", "max_pressure", "random", "lookahead"])
def test_driving_in_slices_is_driving_at_once(smoke_config, name):
    [job, _] = JOBS
    scenario = job.load()
    with World() as world:
        world.reset(scenario, job.seed, program=name if name == "fixed" else None)
        horizon_s = smoke_config.lookahead_horizon_s
        world.drive(name, scenario.end_s, horizon_s=horizon_s)
        at_once = world.trips()
    [sliced] = driven(smoke_config, name, [job])
    assert sliced.trips == at_once


def test_the_shares_of_what_was_played_add_up_to_the_episodes(smoke_config):
    shares = []
    played(smoke_config, [*JOBS, LONGER], num_worlds=2, on_played=shares.append)
    assert sum(shares) == pytest.approx(3)
    shares.clear()
    driven(smoke_config, "max_pressure", JOBS, on_played=shares.append)
    assert sum(shares) == pytest.approx(2)
    assert len(shares) == 6


def test_a_job_cuts_its_scenario_and_never_stretches_it():
    scenario = Job(scenario="generated:1", seed=1).load()
    assert JOBS[0].load().end_s == scenario.begin_s + 125
    assert Job(scenario="generated:1", seed=1, max_s=1e9).load() == scenario


@pytest.mark.parametrize(
    "play", [played, lambda *a, **k: driven(a[0], "max_pressure", *a[1:], **k)]
)
def test_whoever_is_told_how_far_it_is_may_end_it(smoke_config, play):
    def enough(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(smoke_config, JOBS, on_played=enough)

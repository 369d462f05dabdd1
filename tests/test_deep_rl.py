"""The standard learner that the language model is compared with, at the smallest size."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from envs.scenario import load_scenario
from envs.types import Decision
from envs.world import World

FILE = Path(__file__).resolve().parent.parent / "scripts" / "bench" / "deep_rl.py"
LENGTH_S = 600
"""Sixty decisions: an update wants a batch of 32."""


@pytest.fixture(scope="module")
def deep_rl():
    spec = importlib.util.spec_from_file_location("deep_rl", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def scenario(tmp_path_factory):
    """The first minutes of a generated city with two junctions."""
    city = load_scenario("generated:6")
    file = tmp_path_factory.mktemp("town") / "town.sumocfg"
    file.write_text(
        f"<configuration><input><net-file value='{city.net_file}'/>"
        f"<route-files value='{','.join(city.route_files)}'/></input>"
        f"<time><begin value='0'/><end value='{LENGTH_S}'/></time></configuration>"
    )
    return load_scenario(str(file))


def trained(deep_rl, scenario, *, seed=1, reward="network"):
    delays_s = []
    learners = deep_rl.train(
        scenario,
        episodes=1,
        seed=seed,
        reward=reward,
        report=lambda _, trips: delays_s.append(trips.delay_s),
    )
    return learners, delays_s


@pytest.fixture(scope="module")
def learned(deep_rl, scenario):
    return trained(deep_rl, scenario)


@pytest.fixture(scope="module")
def decisions(scenario) -> list[Decision]:
    found: list[Decision] = []
    with World() as world:
        world.reset(scenario, seed=1)
        while not world.time()[1]:
            found += world.decisions()
            world.drive("random", world.time()[0] + 50)
    return found


def weights(learners) -> dict[str, list[torch.Tensor]]:
    return {
        name: list(learner.dqn.q_net.state_dict().values()) for name, learner in learners.items()
    }


def equal(left, right) -> list[bool]:
    return [
        torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    ]


def test_a_vector_has_five_numbers_per_lane_six_per_phase_and_one(deep_rl, decisions):
    for decision in decisions:
        numbers = deep_rl.vector(decision)
        lanes, phases = len(decision.junction.lanes), len(decision.junction.phases)
        assert (
            len(numbers) == deep_rl.vector_length(decision.junction) == 5 * lanes + 6 * phases + 1
        )
        assert numbers.min() >= 0
        assert numbers.max() <= deep_rl.MAX_UNITS
        assert tuple(numbers[-phases:].nonzero()[0]) == decision.legal
        assert numbers[-2 * phases : -phases].argmax() == decision.observation.current


def test_no_phase_is_chosen_that_is_not_legal(deep_rl, learned, decisions):
    """Whatever the network would like best: each phase in turn is the only legal one."""
    learners, _ = learned
    for decision in decisions:
        learner = learners[decision.junction.tls_id]
        for phase in range(len(decision.junction.phases)):
            seen = deep_rl.vector(replace(decision, legal=(phase,)))
            assert learner.best(seen) == learner.explore(seen, (phase,)) == phase


def test_an_update_never_hopes_for_a_phase_that_is_not_legal(deep_rl, learned, decisions):
    learners, _ = learned
    for decision in decisions:
        legal = range(1, len(decision.junction.phases))
        seen = torch.tensor(deep_rl.vector(replace(decision, legal=tuple(legal))))[None]
        values = learners[decision.junction.tls_id].dqn.q_net_target(seen)[0]
        assert values.isfinite().nonzero().flatten().tolist() == list(legal)


def test_training_changes_every_network(deep_rl, scenario, learned):
    learners, delays_s = learned
    assert len(delays_s) == 1
    assert len(learners) == 2
    with World() as world:
        junctions = world.reset(scenario, seed=1)
    assert sorted(learners) == sorted(junction.tls_id for junction in junctions)
    fresh = {
        junction.tls_id: deep_rl.Learner(
            junction, seed=deep_rl.SEEDS_APART + index, num_decisions=1
        )
        for index, junction in enumerate(junctions)
    }
    assert not any(equal(weights(fresh), weights(learners)))


def test_the_same_seed_gives_the_same_training(deep_rl, scenario, learned):
    again, delays_s = trained(deep_rl, scenario)
    assert delays_s == learned[1]
    assert all(equal(weights(again), weights(learned[0])))


def test_another_seed_and_another_reward_give_another_training(deep_rl, scenario, learned):
    for changed in ({"seed": 2}, {"reward": "local"}):
        others, _ = trained(deep_rl, scenario, **changed)
        assert not all(equal(weights(others), weights(learned[0])))


def test_it_prints_and_writes_what_every_policy_reached_on_the_same_seeds(scenario, tmp_path):
    options = ("--episodes", "1", "--seeds", "2", "--out", str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(FILE), "--scenario", scenario.name, *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not done.returncode, done.stderr
    assert "episode 1 of 1: delay" in done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    played = [(row["policy"], row["seed"]) for row in results["rows"]]
    assert played == [(p, s) for p in ("dqn", "max_pressure", "max_wave") for s in (1, 2)]
    assert not any(row["invalid_answers"] for row in results["rows"])
    assert [(c["policy"], c["versus"], c["n"]) for c in results["comparisons"]] == [
        ("max_pressure", "dqn", 2),
        ("max_wave", "dqn", 2),
    ]
    assert results["training"]["seconds"] > 0
    for policy in ("dqn", "max_pressure", "max_wave"):
        assert policy in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--episodes", "0", "expected 1 to 999"),
        ("--model", "nowhere", "expected a model folder"),
    ],
)
def test_a_wrong_option_is_said_before_the_training(option, value, said):
    done = subprocess.run(
        [sys.executable, str(FILE), option, value],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr

"""Episodes of an evaluation that are kept as they end: what is played again, and what is not."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from envs.errors import UserError
from rl_ft.closed_loop import Job
from rl_ft.config import Config
from rl_ft.played import Played, signature

JOBS = [Job(scenario="generated:1", seed=seed) for seed in (1, 2, 3)]


def row(policy, seed):
    return {"policy": policy, "scenario": "generated:1", "seed": seed, "delay_s": 10.0 + seed}


@pytest.fixture
def file(tmp_path):
    """Two of three episodes of one policy."""
    played = Played(tmp_path / "episodes.jsonl")
    played.begin("fixed", "as now")
    for seed in (1, 2):
        played.add(row("fixed", seed))
    return tmp_path / "episodes.jsonl"


def test_what_was_played_is_not_missing(file):
    assert Played(file).missing("fixed", JOBS) == JOBS[2:]


def test_another_policy_has_played_nothing(file):
    assert Played(file).missing("max_wave", JOBS) == JOBS


def test_rows_come_back_as_they_were(file):
    assert Played(file).chosen(["fixed"], JOBS) == [row("fixed", 1), row("fixed", 2)]


def test_rows_that_are_not_asked_for_are_left_out(file):
    assert Played(file).chosen(["fixed"], JOBS[1:]) == [row("fixed", 2)]


def test_an_episode_that_was_cut_off_is_played_again(file):
    file.write_text(file.read_text()[:-20])
    assert Played(file).missing("fixed", JOBS) == JOBS[1:]


def test_after_a_cut_line_the_next_one_is_whole(file):
    file.write_text(file.read_text()[:-20])
    played = Played(file)
    played.begin("fixed", "as now")
    played.add(row("fixed", 3))
    assert [r["seed"] for r in Played(file).rows] == [1, 3]


def test_a_line_that_is_no_episode_is_named(file):
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(UserError, match="line 1 is no episode"):
        Played(file)


def test_episodes_that_would_be_played_otherwise_now_are_refused(file):
    with pytest.raises(UserError, match="with other weights, settings or code"):
        Played(file).begin("fixed", "otherwise")


def test_other_weights_sign_otherwise(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"some")
    one = signature(Config(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"more")
    assert signature(Config(), tmp_path) != one


def test_more_seeds_and_worlds_side_by_side_sign_the_same():
    more = Config().evaluate.model_copy(update={"seeds": 99, "num_worlds": 3})
    assert signature(Config().model_copy(update={"evaluate": more}), None) == signature(
        Config(), None
    )


def test_other_tellings_sign_otherwise():
    once = Config().evaluate.model_copy(update={"num_tellings": 1})
    assert signature(Config().model_copy(update={"evaluate": once}), None) != signature(
        Config(), None
    )


def evaluate(out, seeds, *more):
    return [
        str(Path(sys.executable).with_name("rl-ft")),
        *("evaluate", "--controller", "max_pressure", "--scenario", "generated:1001"),
        *("--seeds", str(seeds), "--out", str(out), *more),
    ]


def results(out):
    return json.loads((out / "results.json").read_text())


def test_an_interrupted_evaluation_goes_on_to_what_it_would_have_been(tmp_path):
    episodes = tmp_path / "stopped" / "episodes.jsonl"
    process = subprocess.Popen(evaluate(tmp_path / "stopped", 12), stderr=subprocess.PIPE)
    while not (episodes.is_file() and episodes.read_text().count("\n") >= 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume plays the others" in " ".join(said.decode().split())
    begun = episodes.read_text()
    assert 2 <= begun.count("\n") < 12
    subprocess.run(evaluate(tmp_path / "stopped", 12, "--resume"), check=True, timeout=120)
    subprocess.run(evaluate(tmp_path / "straight", 12), check=True, timeout=120)
    assert episodes.read_text().startswith(begun)
    assert results(tmp_path / "stopped") == results(tmp_path / "straight")

"""Episodes of an evaluation that are kept as they end: what is played again, and what is not."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from envs.errors import UserError
from envs.scenario import load_scenario
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
    played.begin("fixed", "generated:1", "as now")
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
    played.begin("fixed", "generated:1", "as now")
    played.add(row("fixed", 3))
    assert Played(file).chosen(["fixed"], JOBS) == [row("fixed", 1), row("fixed", 3)]


def test_an_episode_that_is_there_twice_counts_once(file):
    file.write_text(2 * file.read_text())
    assert len(Played(file)) == 2


def test_a_line_that_is_no_episode_is_named(file):
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(UserError, match="line 1 is no episode"):
        Played(file)


def test_episodes_that_would_be_played_otherwise_now_are_refused(file):
    with pytest.raises(UserError, match="with other weights, settings, files or code"):
        Played(file).begin("fixed", "generated:1", "otherwise")


def test_another_scenario_may_be_played_otherwise(file):
    Played(file).begin("fixed", "generated:2", "otherwise")


def changed(**sections):
    tree = Config().model_dump()
    for name, values in sections.items():
        tree[name] |= values
    return Config.model_validate(tree)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"some")
    return folder


def test_other_weights_sign_otherwise(model, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes(b"more")
    signs = [signature(Config(), folder, "generated:1") for folder in (model, other)]
    assert signs[0] != signs[1]


@pytest.mark.parametrize(
    "sections", [{"evaluate": {"num_tellings": 1}}, {"grpo": {"max_completion_length": 2}}]
)
def test_what_a_model_answers_by_is_signed(model, sections):
    signs = [signature(conf, model, "generated:1") for conf in (Config(), changed(**sections))]
    assert signs[0] != signs[1]


@pytest.mark.parametrize(
    "sections",
    [
        {"evaluate": {"seeds": 99, "num_worlds": 3}},
        {"generation": {"gpu_memory_utilization": 0.3}},
        {"ray": {"num_cpus": 9}},
    ],
)
def test_how_the_work_is_placed_is_not_signed(model, sections):
    signs = [signature(conf, model, "generated:1") for conf in (Config(), changed(**sections))]
    assert signs[0] == signs[1]


def test_settings_of_models_do_not_matter_to_controllers():
    once = changed(evaluate={"num_tellings": 1})
    assert signature(once, None, "generated:1") == signature(Config(), None, "generated:1")


def test_files_of_a_scenario_that_have_changed_sign_otherwise(tmp_path):
    generated = load_scenario("generated:1")
    [net, routes] = tmp_path / "my.net.xml", tmp_path / "my.rou.xml"
    shutil.copy(generated.net_file, net)
    shutil.copy(generated.route_files[0], routes)
    name = f"{net},{routes}"
    # A process reads them once: each of these evaluations would be one of its own.
    before = subprocess.run(sign(name), capture_output=True, text=True, check=True).stdout
    assert subprocess.run(sign(name), capture_output=True, text=True).stdout == before
    routes.write_text(routes.read_text().replace("</routes>", "<!-- less --></routes>"))
    assert subprocess.run(sign(name), capture_output=True, text=True).stdout != before


def test_the_settings_of_a_configuration_sign_otherwise(tmp_path):
    files = (load_scenario("generated:1").net_file, *load_scenario("generated:1").route_files)
    config = tmp_path / "my.sumocfg"
    signs = set()
    for scale in (1, 2):
        config.write_text(
            f'<configuration><input><net-file value="{files[0]}"/><route-files value="{files[1]}"/>'
            f'</input><processing><scale value="{scale}"/></processing></configuration>'
        )
        signs.add(subprocess.run(sign(str(config)), capture_output=True, text=True).stdout)
    assert len(signs) == 2


def sign(name):
    code = (
        "from rl_ft.config import Config; from rl_ft.played import signature; "
        f"print(signature(Config(), None, {name!r}))"
    )
    return [sys.executable, "-c", code]


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
    _, said = process.communicate(timeout=180)
    assert process.returncode == 130
    assert "--resume plays the others" in " ".join(said.decode().split())
    begun = episodes.read_text()
    assert 2 <= begun.count("\n") < 12
    subprocess.run(evaluate(tmp_path / "stopped", 12, "--resume"), check=True, timeout=300)
    subprocess.run(evaluate(tmp_path / "straight", 12), check=True, timeout=300)
    assert episodes.read_text().startswith(begun)
    assert results(tmp_path / "stopped") == results(tmp_path / "straight")


def test_two_evaluations_do_not_share_a_folder(tmp_path):
    episodes = tmp_path / "out" / "episodes.jsonl"
    process = subprocess.Popen(evaluate(tmp_path / "out", 12), stderr=subprocess.DEVNULL)
    while not episodes.is_file():
        assert process.poll() is None
        time.sleep(0.05)
    second = subprocess.run(
        evaluate(tmp_path / "out", 12, "--resume"), capture_output=True, text=True, timeout=60
    )
    process.kill()
    process.wait()
    assert second.returncode == 2
    assert f"in use by another run (process {process.pid})" in " ".join(second.stderr.split())

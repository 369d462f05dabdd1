"""The main job as a user types it: one command, Ctrl-C, `--resume`, and the verdict on a model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from rl_ft.monitor import read_metrics
from rl_ft.weights import digest, read_folder

pytestmark = pytest.mark.e2e

STAGE = "grpo/max_pressure"
STEPS = 12


def command(*arguments):
    return [str(Path(sys.executable).with_name("rl-ft")), *map(str, arguments)]


def rl_ft(*arguments, timeout_s=1100):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=timeout_s)


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


# ---- one command


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "run"
    return folder, rl_ft("run", "--recipe", "smoke", "--out", folder)


def test_the_main_job_ends_well_and_says_where_its_report_is(smoke):
    _, done = smoke
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stderr


def test_the_main_job_leaves_everything_in_its_folder(smoke):
    folder, _ = smoke
    for name in ("report.html", "config.yaml", "metrics.json", "metrics.jsonl", "run.log"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "manifest.json").read_text())["starts"][-1]["ending"] == "finished"


def test_every_policy_has_one_row_per_scenario_and_seed(smoke):
    folder, _ = smoke
    results = results_of(folder / "eval")
    rows = [(row["policy"], row["scenario"], row["seed"]) for row in results["rows"]]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    scenarios = {row["scenario"] for row in results["rows"]}
    policies = {*config["evaluate"]["controllers"], "sft:max_pressure", "grpo:max_pressure"}
    assert "generated:1001" in scenarios
    assert sorted(rows) == sorted(
        (policy, scenario, seed)
        for policy in policies
        for scenario in scenarios
        for seed in range(1, config["evaluate"]["seeds"] + 1)
    )


def test_the_loss_is_finite_and_rewards_are_real(smoke):
    folder, _ = smoke
    steps = read_metrics(folder, STAGE)
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step["values"]["loss"]) for step in steps)
    assert any(step["values"]["reward/mean"] != 0 for step in steps)
    assert any(step["values"]["reward/regret_veh_s"] > 0 for step in steps)


def test_the_trained_model_is_an_ordinary_one(smoke):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = smoke[0] / STAGE / "model"
    assert AutoModelForCausalLM.from_pretrained(model).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(model).chat_template


def test_a_finished_run_has_nothing_left_to_resume(smoke):
    folder, _ = smoke
    before = (folder / "report.html").stat().st_mtime_ns
    started = time.monotonic()
    again = rl_ft("run", "--out", folder, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done already") == 5
    assert (folder / "report.html").stat().st_mtime_ns == before
    assert time.monotonic() - started < 20


def test_a_folder_that_holds_a_run_is_not_taken_without_resume(smoke):
    folder, _ = smoke
    refused = rl_ft("run", "--recipe", "smoke", "--out", folder)
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--resume" in refused.stderr


# ---- Ctrl-C


def prepared_copy(done, folder):
    """The run as it was before `grpo`, with enough steps to be interrupted in."""
    folder.mkdir()
    for name in ("data", "model", "sft", ".done"):
        shutil.copytree(done / name, folder / name)
    shutil.copy(done / "manifest.json", folder)
    for marker in (folder / ".done").iterdir():
        if marker.name not in ("prepare", "sft"):
            marker.unlink()
    config = yaml.safe_load((done / "config.yaml").read_text())
    config["grpo"] |= {"max_steps": STEPS, "save_steps": 2, "learning_rate": 1e-3}
    config["evaluate"] |= {"controllers": ["fixed"], "baseline": "fixed", "seeds": 1}
    config["evaluate"]["num_train_scenarios"] = 0
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def checkpoints(folder):
    found = (folder / STAGE / "checkpoints").glob("checkpoint-*")
    return sorted(int(place.name.removeprefix("checkpoint-")) for place in found)


class Interrupted:
    """A run that got Ctrl-C as a terminal sends it: to the whole group of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        process = subprocess.Popen(
            command("run", "--out", folder, "--resume"),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 400
            while not checkpoints(folder) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            below = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGINT)
            self.stderr = process.communicate(timeout=180)[1]
        finally:
            process.kill()
        self.status = process.returncode
        self.left_over = psutil.wait_procs(below, timeout=20)[1]
        self.checkpoint = checkpoints(folder)[-1]
        self.steps = [step["step"] for step in read_metrics(folder, STAGE)]


@pytest.fixture(scope="module")
def interrupted(smoke, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted") / "run"
    prepared_copy(smoke[0], folder)
    return Interrupted(folder)


@pytest.fixture(scope="module")
def resumed(interrupted):
    checkpoint = interrupted.folder / STAGE / "checkpoints" / f"checkpoint-{interrupted.checkpoint}"
    weights = digest(read_folder(checkpoint))
    return weights, rl_ft("run", "--out", interrupted.folder, "--resume")


def test_ctrl_c_ends_with_the_command_that_goes_on(interrupted):
    assert interrupted.status == 130
    last = interrupted.stderr.splitlines()[-1]
    assert last.endswith(f"rl-ft run --out {interrupted.folder} --resume")
    assert "Traceback" not in interrupted.stderr


def test_ctrl_c_comes_before_the_end_and_is_in_the_manifest(interrupted):
    manifest = json.loads((interrupted.folder / "manifest.json").read_text())
    assert interrupted.checkpoint < STEPS
    assert "interrupted" in [start.get("ending") for start in manifest["starts"]]


def test_ctrl_c_leaves_no_process_behind(interrupted):
    assert interrupted.left_over == []


def test_a_resumed_run_is_finished(interrupted, resumed):
    _, done = resumed
    assert done.returncode == 0, done.stderr
    assert (interrupted.folder / "report.html").is_file()
    assert (interrupted.folder / STAGE / "model" / "config.json").is_file()


def test_a_resumed_run_gives_the_sampler_the_weights_of_the_checkpoint(interrupted, resumed):
    weights, _ = resumed
    log = " ".join((interrupted.folder / "run.log").read_text().split())
    said = re.findall(rf"from step (\d+) of {STEPS}, weights (\w+)", log)
    assert said[-1] == (str(interrupted.checkpoint), weights[:12])


def test_a_resumed_run_has_every_step_exactly_once(interrupted, resumed):
    steps = [step["step"] for step in read_metrics(interrupted.folder, STAGE)]
    assert steps == list(range(1, STEPS + 1))


def test_after_a_resume_trainer_and_sampler_agree(interrupted, resumed):
    for step in read_metrics(interrupted.folder, STAGE):
        assert step["values"]["mismatch/mean_abs_logp_diff"] < 1e-4


# ---- evaluate


@pytest.fixture(scope="module")
def judged(smoke, tmp_path_factory):
    """Two controllers and the trained model on one scenario, two seeds."""
    folder = tmp_path_factory.mktemp("judged") / "out"
    model = smoke[0] / STAGE / "model"
    done = rl_ft(
        *("evaluate", "--controller", "fixed", "--controller", "max_pressure"),
        *("--model", model, "--recipe", "smoke"),
        *("--scenario", "generated:1001", "--seeds", "2", "--out", folder),
    )
    assert done.returncode == 0, done.stderr
    return model, results_of(folder)["rows"], done.stdout


def test_evaluate_prints_a_table_of_all_policies(judged):
    _, _, table = judged
    for heading in ("median", "mean", "vs max_pressure", "gridlock", "arrived"):
        assert heading in table
    assert "max_pressure" in table


def test_evaluate_writes_one_row_per_policy_scenario_and_seed(judged):
    model, rows, _ = judged
    assert sorted((row["policy"], row["seed"]) for row in rows) == sorted(
        (policy, seed) for policy in ("fixed", "max_pressure", str(model)) for seed in (1, 2)
    )


def test_evaluate_counts_what_the_model_was_asked_and_how_it_answered(judged):
    model, rows, _ = judged
    for row in rows:
        if row["policy"] == str(model):
            assert row["decisions"] > 0
            assert row["fallbacks"] == row["invalid_answers"] <= row["decisions"]
        else:
            assert row["decisions"] == 0


def test_controllers_alone_are_compared_with_paired_seeds(tmp_path):
    done = rl_ft(
        *("evaluate", "--controller", "fixed", "--controller", "max_pressure"),
        *("--scenario", "generated:1001", "--seeds", "2", "--out", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    [found] = results_of(tmp_path / "out")["comparisons"]
    assert (found["policy"], found["versus"], found["n"]) == ("fixed", "max_pressure", 2)


def test_an_exported_model_drives_exactly_as_the_one_in_the_run(smoke, tmp_path):
    done = rl_ft("export", "--run", smoke[0], "--seeds", "1", "--out", tmp_path / "policy")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "policy" / "export.json").read_text())["comparison"]
    assert [row["mean_difference_s"] for row in found["differences"]] == [0.0]
    assert found["equal_episodes"] == 1
    assert "1 of 1 episodes are the same in every figure" in " ".join(done.stderr.split())


def test_a_folder_that_is_no_model_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "notes").mkdir()
    refused = rl_ft(
        *("evaluate", "--model", tmp_path / "notes", "--scenario", "generated:1001"),
        *("--out", tmp_path / "out"),
    )
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert str(tmp_path / "notes") in refused.stderr

"""A sweep as a user types it: two real trials, killed in the midst, resumed, the best one promoted.

Nearly all the time is what starting Ray Train and vLLM three times costs.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import yaml

from rl_ft.monitor import read_metrics
from rl_ft.run_folder import RunFolder
from rl_ft.sweep_folder import SweepFolder

pytestmark = [pytest.mark.e2e, pytest.mark.ray]

START = "max_pressure"
STAGE = f"grpo/{START}"
STEPS = 2
SPACE = f"""\
grpo.learning_rate: {{grid: [0.001, 0.002]}}
grpo.max_steps: {STEPS}
"""
SMALL = ("check.every_steps=1", "check.episode_s=120")


def rl_ft(*arguments):
    return [sys.executable, "-m", "rl_ft.cli", *map(str, arguments)]


def wait_until(found, process, timeout_s=900):
    end = time.monotonic() + timeout_s
    while not found():
        assert process.poll() is None, "the sweep ended before it was killed"
        assert time.monotonic() < end, "too late"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a sweep whose process was killed after the first checkpoint of trial 1."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "space.yaml").write_text(SPACE)
    asked = [word for setting in SMALL for word in ("--set", setting)]
    with (root / "killed.log").open("w") as log:
        process = subprocess.Popen(
            rl_ft(
                *("sweep", "--recipe", "smoke", "--space", root / "space.yaml", "--samples", "1"),
                *("--to-the-end", "--out", root / "sweep", *asked),
            ),
            stdout=log,
            stderr=log,
        )
        try:
            checkpoint = root / "sweep" / "trials" / "001" / STAGE / "checkpoints" / "checkpoint-1"
            wait_until(checkpoint.exists, process)
            below = psutil.Process(process.pid).children(recursive=True)
            # Ray's own agents look for their parent only now and then.
            below = [each for each in below if "Agent" not in each.name()]
        finally:
            process.kill()
            process.wait()
    return root, below


@pytest.fixture(scope="module")
def resumed(killed):
    """Gone on with to the end; then Ctrl-C once the full run has begun, which others take to its
    end. Its recipe is a small one."""
    root, _ = killed
    smoke = yaml.safe_load((root / "sweep" / "recipe.yaml").read_text()) | {"recipe": "whole"}
    smoke["prepare"]["dataset"] = str(root / "sweep" / "shared" / "prepare-1" / "data")
    (root / "whole.yaml").write_text(yaml.safe_dump(smoke))
    process = subprocess.Popen(
        rl_ft("sweep", "--out", root / "sweep", "--resume", "--promote", root / "whole.yaml"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        prepared = root / "sweep" / "promoted" / "whole" / ".done" / "prepare"
        with ThreadPoolExecutor() as reader:
            said = reader.submit(process.communicate)
            wait_until(prepared.exists, process)
            os.killpg(process.pid, signal.SIGINT)
            stdout, stderr = said.result(timeout=300)
    finally:
        process.kill()
    return SweepFolder.open(root / "sweep"), process.returncode, stdout, stderr


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def results(sweep):
    return json.loads((sweep.root / "results.json").read_text())


def test_a_killed_sweep_leaves_nothing_at_work(killed):
    _, below = killed
    assert psutil.wait_procs(below, timeout=30)[1] == []


def test_every_trial_is_finished_and_the_best_has_the_least_objective(resumed):
    sweep, *_ = resumed
    found = results(sweep)
    assert found["complete"]
    assert {row["state"] for row in found["trials"]} == {"finished"}
    by_objective = sorted(found["trials"], key=lambda row: row["result"]["objective_s"])
    assert found["best"] == by_objective[0]["trial"]


def test_a_trial_that_was_killed_goes_on_from_its_checkpoint(resumed):
    sweep, *_ = resumed
    folder = sweep.root / "trials" / "001"
    assert len(manifest(folder)["starts"]) == 2
    log = " ".join((folder / "run.log").read_text().split())
    assert re.findall(rf"from step (\d+) of {STEPS}", log) in (["0", "1"], ["0", "2"])
    assert [step["step"] for step in read_metrics(folder, STAGE)] == [1, 2]


def test_what_trials_share_is_made_once(resumed):
    sweep, *_ = resumed
    for stage, name in (("prepare", "prepare-1"), ("sft", "sft-1")):
        (start,) = manifest(sweep.shared_path(name))["starts"]
        assert start["ending"] == "finished"
        for trial in sweep.trials:
            folder = RunFolder(root=sweep.trial_path(trial), config=trial.config)
            assert folder.stage_done(stage)
    assert len({(sweep.trial_path(t) / "data").resolve() for t in sweep.trials}) == 1
    assert len({(sweep.trial_path(t) / "sft").resolve() for t in sweep.trials}) == 1


def test_trials_differ_by_what_was_tried(resumed):
    sweep, *_ = resumed
    rates = []
    for trial in sweep.trials:
        steps = read_metrics(sweep.trial_path(trial), STAGE)
        rates.append(steps[0]["values"]["learning_rate"])
    assert rates[1] == pytest.approx(2 * rates[0])


def test_the_result_is_how_the_model_drove_that_is_left_or_was_made_of_the_shared_start(resumed):
    sweep, *_ = resumed
    for row in results(sweep)["trials"]:
        assert "sft" in row["shared"]
        summary = json.loads((sweep.root / "trials" / row["trial"] / "metrics.json").read_text())
        found = summary[f"check/{START}"]
        left = "mean" if found["left"] in ("mean", "step 0") else "best"
        assert row["result"]["delay_s"] == found[f"{left}_delay_s"]
        assert [check["step"] for check in row["checks"]] == [0, 1, 2]


def test_table_and_picture_are_there(resumed):
    sweep, _, printed, _ = resumed
    assert "grpo.learning_rate" in printed
    assert "finished" in printed
    assert (sweep.root / "sweep.png").stat().st_size > 10_000


def test_the_best_trial_s_full_run_says_where_its_settings_came_from(resumed):
    sweep, *_ = resumed
    whole = sweep.root / "promoted" / "whole"
    found = results(sweep)
    (best,) = [row for row in found["trials"] if row["trial"] == found["best"]]
    origin = manifest(whole)["promoted_from"]
    assert (origin["sweep"], origin["trial"]) == (str(sweep.root), found["best"])
    assert origin["settings"] == best["settings"]
    assert origin["result"]["objective_s"] == best["result"]["objective_s"]
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["grpo"]["learning_rate"] == best["settings"]["grpo.learning_rate"]


def test_ctrl_c_in_the_full_run_ends_with_the_command_that_goes_on(resumed):
    sweep, status, _, stderr = resumed
    whole = sweep.root / "promoted" / "whole"
    assert status == 130
    assert stderr.splitlines()[-1].endswith(f"rl-ft run --out {whole} --resume")
    assert manifest(whole)["starts"][-1]["ending"] == "interrupted"

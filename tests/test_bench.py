"""The benchmarks run and print what they are for; their numbers are judged by people."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"

STEPS_S = ((9.0, 8.0), (2.0, 1.0), (4.0, 2.0), (3.0, 1.5))
"""Step and rollout; the first warms up."""


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def cells(output: str, row: str) -> list[str]:
    """What a printed table has in a row, behind its name."""
    (line,) = [line for line in output.splitlines() if row in line]
    return [cell.strip() for cell in re.split("[│┃]", line)[2:-1]]


@pytest.fixture(scope="module")
def branch() -> str:
    done = bench("branch.py", "--scenario", "generated:1", "--num", "2")
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as far as the benchmark reads it."""
    lines = [{"stage": "sft/max_pressure", "step": 1, "time_s": 1.0, "values": {"loss": 1.0}}]
    for step, (step_s, rollout_s) in enumerate(STEPS_S, start=1):
        values = {
            "time/step_s": step_s,
            "time/rollout_s": rollout_s,
            "time/generate_s": 0.6,
            "time/branch_s": 0.3,
            "time/sync_s": 0.1,
            "time/train_s": 0.5,
            "learner/backward_s": 0.2,
            "system/cpu_share": 0.7,
            "staleness/max": 0.0,
            "grad_norm": None,
        }
        lines.append({"stage": "grpo/max_pressure", "step": step, "time_s": step, "values": values})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_branch_compares_a_fork_with_simulating_only_and_with_a_new_process(branch):
    for row in ("World.branch", "running simulation, nothing tried", "new SUMO, saved state"):
        seconds, per_s, times_play, times_fork = map(float, cells(branch, row)[:4])
        assert min(seconds, per_s, times_play, times_fork) > 0
    assert float(cells(branch, "nothing tried")[2]) == 1
    assert float(cells(branch, "World.branch")[3]) == 1


def test_branch_tries_as_many_candidates_each_way_and_its_forks_are_exact(branch):
    assert "2 candidates" in branch
    assert cells(branch, "World.branch")[-1] == "2 of 2"
    assert cells(branch, "new SUMO, saved state")[-1].endswith("of 2")


def test_branch_says_how_many_candidates_a_scenario_has_room_for():
    done = bench("branch.py", "--scenario", "generated:1", "--num", "1000")
    assert done.returncode == 2
    assert "expected 1 to 49 for generated:1" in done.stderr


def test_step_prints_the_median_of_every_stage_and_its_share(run):
    done = bench("step.py", "--run", str(run))
    assert not done.returncode, done.stderr
    assert cells(done.stdout, "rollout") == ["1.500", "50%"]
    assert cells(done.stdout, "generate") == ["0.600", "20%"]
    assert cells(done.stdout, "backward") == ["0.200", "7%"]
    assert cells(done.stdout, "waiting") == ["0.900", "30%"]
    assert cells(done.stdout, "│ step ") == ["3.000", "100%"]
    assert cells(done.stdout, "idle share") == ["", "30%"]
    assert "grpo/max_pressure: 3 step(s)" in done.stdout


def test_step_wants_a_run_that_has_trained(tmp_path):
    done = bench("step.py", "--run", str(tmp_path))
    assert done.returncode == 1
    assert "expected a run folder" in done.stderr


def test_overlap_compares_steps_per_second_and_says_how_much_was_hidden(run, tmp_path_factory):
    """The other run is the same but for steps that are half as long and one version late."""
    ahead = tmp_path_factory.mktemp("ahead")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["stage"].startswith("grpo"):
            line["values"] |= {
                "time/step_s": line["values"]["time/step_s"] / 2,
                "time/train_s": 1.0,
                "staleness/max": 1.0,
            }
    (ahead / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = bench("overlap.py", "--runs", str(run), str(ahead))
    assert not done.returncode, done.stderr
    rows = [re.split("│", line)[1:-1] for line in done.stdout.splitlines() if "│" in line]
    in_turns, overlapping = [[cell.strip() for cell in row] for row in rows]
    assert in_turns == ["0", "0.333", "1.00", "3.00", "1.50", "0.50", "0%", "30%"]
    assert overlapping == ["1", "0.667", "2.00", "1.50", "1.50", "1.00", "100%", "30%"]


def test_overlap_wants_more_than_a_step_that_warms_up(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    done = bench("overlap.py", "--runs", str(run))
    assert done.returncode == 1
    assert "expected at least two steps" in done.stderr

"""The benchmarks run and print what they are for; their numbers are judged by people."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from grpo_case import model_folder

from envs import dialect
from envs.answers import answer_text, options
from envs.naming import retold
from envs.types import Action, Decision
from rl_ft.config import Config
from rl_ft.states import state_id
from rl_ft.worlds import Trial, WorldPool

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"

STEPS_S = ((9.0, 8.0), (2.0, 1.0), (4.0, 2.0), (3.0, 1.5))
"""Step and rollout; the first warms up."""


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / name), *arguments],
        capture_output=True,
        text=True,
        timeout=900,
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
            "system/processes_core_s": 4.5,
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


def test_branch_compares_forks_with_worlds_that_are_never_forked(branch):
    (line,) = [line for line in branch.splitlines() if line.startswith("all cores at once")]
    branched, pure, share, core_share = map(int, re.findall(r"\b(\d+)\b", line))
    assert min(branched, pure, share, core_share) > 0


def test_branch_says_how_many_candidates_a_scenario_has_room_for():
    done = bench("branch.py", "--scenario", "generated:1", "--num", "1000")
    assert done.returncode == 2
    assert "expected 1 to 49 for generated:1" in done.stderr


def test_chance_compares_shared_generators_with_one_per_lane():
    done = bench("chance.py", "--scenario", "resco:arterial4x4", "--num", "30")
    assert not done.returncode, done.stderr
    shared, own, chance = cells(done.stdout, "resco:arterial4x4")
    assert 0 < float(own) < float(shared)
    assert float(chance.rstrip("%")) / 100 == pytest.approx(
        1 - (float(own) / float(shared)) ** 2, abs=0.05
    )


def test_step_prints_the_median_of_every_stage_and_its_share(run):
    done = bench("step.py", "--run", str(run))
    assert not done.returncode, done.stderr
    assert cells(done.stdout, "rollout") == ["1.500", "50.0%"]
    assert cells(done.stdout, "generate") == ["0.600", "20.0%"]
    assert cells(done.stdout, "backward") == ["0.200", "6.7%"]
    assert cells(done.stdout, "waiting") == ["0.900", "30.0%"]
    assert cells(done.stdout, "│ step ") == ["3.000", "100.0%"]
    assert cells(done.stdout, "core-seconds of the run") == ["4.500", "150.0%"]
    assert cells(done.stdout, "busy core-seconds") == ["", "70.0%"]
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


@pytest.fixture
def modules(monkeypatch) -> None:
    """The benchmarks' own modules can be imported."""
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.fixture
def assignment(modules, tmp_path):
    """Two decisions of worlds that are gone, told backwards, for one plain step."""
    from assignment import Assignment

    from rl_ft.render import Renderer

    settings = {
        "scenarios": {"train": ["generated:1"]},
        "rollout": {"num_groups": 2, "behaviour": {"policy": 0}, "episode_s": 3600},
        "grpo": {"num_generations": 2, "max_completion_length": 4},
        "ray": {"torch_threads": 1},
    }
    config = Config.model_validate(settings)
    pool = WorldPool(config, config.scenarios.train, seed=3, num_worlds=2)
    for _ in range(3):
        decisions = [state for state in pool.states() if isinstance(state, Decision)]
        pool.settle([Trial(actions=options(d), executed=options(d)[0]) for d in decisions])
    pool.close()
    told = [retold(d, random.Random(1))[0] for d in decisions]
    model = str(model_folder(tmp_path))
    renderer = Renderer(model, max_prompt_length=512)
    chats = [dialect.messages(d, instructions=config.model.instructions) for d in told]
    return Assignment(
        config=config,
        model=model,
        told=tuple(told),
        prompt_ids=tuple(renderer.prompt_ids(chat) for chat in chats),
        pools=((3, 2),),
        num_steps=1,
    )


TRY = """
import json, pickle, sys
from pathlib import Path
from plain_step import Trials, saved_states
assignment, folder = pickle.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
states = saved_states(assignment, folder)
trials = Trials(assignment, states)
chats = [[{"role": "assistant", "content": text}] for text in json.loads(sys.argv[3])]
rewards = trials(chats, [0, 0, 1, 1])
print(json.dumps({"states": list(states), "rewards": rewards, "num": trials.num_processes}))
"""


def test_the_plain_way_meets_the_same_states_and_starts_sumo_for_every_legal_answer(
    assignment, tmp_path
):
    file = tmp_path / "assignment.pickle"
    file.write_bytes(pickle.dumps(assignment))
    first, last = (
        [answer_text(d, Action(phase=d.legal[i])) for d in assignment.told] for i in (0, -1)
    )
    answers = [first[0], last[0], first[1], "what?"]
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(file), str(tmp_path), json.dumps(answers)],
        cwd=BENCH,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["states"]) == {state_id(d) for d in assignment.told}
    assert found["num"] == 3
    assert found["rewards"][0] + found["rewards"][1] == pytest.approx(0)
    assert found["rewards"][2] == 0
    assert found["rewards"][3] == assignment.config.reward.format_invalid


def test_a_plain_step_is_timed_by_stage(assignment, tmp_path):
    file = tmp_path / "assignment.pickle"
    file.write_bytes(pickle.dumps(assignment))
    done = bench("plain_step.py", str(file))
    assert not done.returncode, done.stderr
    (step,) = json.loads(done.stdout.splitlines()[-1])
    assert step["step_s"] > step["generate_s"] + step["reward_s"] > 0


def test_whole_prints_both_ways_by_stage(modules):
    import whole
    from rich.console import Console

    ours = {"generate": 0.5, "branch": 1.0, "observe": 0.5, "train": 1.0, "sync": 0.1, "step": 2.5}
    plain = {"generate_s": 10.0, "reward_s": 60.0, "step_s": 100.0, "num_processes": 384}
    plain["core_s"] = 120.0
    steps = [{f"time/{name}_s": value for name, value in ours.items()}] * 3
    steps = [{**step, "system/processes_core_s": 4.0} for step in steps]
    console = Console(width=100, record=True)
    console.print(whole.show(Config(), steps, [plain, plain]))
    text = console.export_text()
    assert cells(text, "reward: branch") == ["0.50", "60.00", "120.0"]
    assert cells(text, "│ generate") == ["0.25", "10.00", "40.0"]
    assert cells(text, "train") == ["1.00", "30.00", "30.0"]
    assert cells(text, "whole step") == ["2.50", "100.00", "40.0"]
    assert cells(text, "core-seconds") == ["4.00", "120.00", "30.0"]
    assert cells(text, "processes started") == ["", "384", ""]


def test_growth_says_how_steep_it_is(modules):
    from growth import Growth

    sizes = (1, 2, 8)
    for exponent in (0.5, 1.0, 2.0):
        seconds = tuple(3 * size**exponent for size in sizes)
        growth = Growth(name="", sizes=sizes, seconds=seconds)
        assert math.isclose(growth.exponent, exponent)


@pytest.mark.vllm
def test_growth_prints_and_plots_every_axis(tmp_path):
    sizes = ("--worlds", "2,4", "--maps", "generated:1,generated:6", "--sizes", "2,4")
    done = bench("growth.py", "--out", str(tmp_path), *sizes, "--repeats", "1")
    assert not done.returncode, done.stderr
    for row in ("worlds", "junctions per map", "sampled", "trained on"):
        assert len(cells(done.stdout, row)) == 3
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"

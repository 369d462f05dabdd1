"""A whole GRPO step, ours against the plain way, with the same model on the same prompts.

Ours is the loop of `rl-ft grpo` behind a short supervised start: worlds that fork, vLLM, the packed
learner and weights that travel, all on Ray. Its seconds are those of its last steps, when instants
are told again and everything is warm; driving on to new instants is in them. The plain way is
`plain_step.py`: stock TRL's `GRPOTrainer` with Hugging Face's generate, and a reward function that
starts a new SUMO process from a saved state for every completion. It trains on the prompts of our
last step, in each of its steps on all of them; its first one is left out, and so is what it takes
to save the states. TRL's own vLLM mode is not measured: on the CPU build of vLLM it fails in its
first weight sync.

    python scripts/bench/whole.py [--scenario generated:1] [--groups 48] [--size 8]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from assignment import Assignment
from rich.console import Console
from rich.table import Table

from envs import dialect
from envs.reward import Reward
from envs.types import Decision
from rl_ft.asking import Asked
from rl_ft.config import Config
from rl_ft.sections import RolloutConfig
from rl_ft.states import state_id

START = "max_pressure"
STAGE = f"grpo/{START}"
NUM_WARM_UP = 12
"""Our steps before the measured ones: by then instants are told again."""
STATES = 400
"""Of the supervised start: enough for answers in the right format."""

ROWS = {
    "generate": ("time/generate_s", "generate_s"),
    "reward: branch, or new SUMO processes": ("time/branch_s", "reward_s"),
    "drive on and observe": ("time/observe_s", None),
    "train": ("time/train_s", "train_s"),
    "wait for weights": ("time/sync_s", None),
}
"""Where a stage's seconds are: in our metrics, and in those of the plain way."""
OF_EVERY_POOL = ("time/generate_s", "time/branch_s", "time/observe_s")
"""Sums over pools of worlds that work side by side."""


def configuration(arguments: argparse.Namespace) -> Config:
    """The defaults, on one scenario, with classical drivers: so the states can be met again.

    Such a world asks in every step; those that the policy drives mostly do not. So there are as
    many worlds as a step has new instants where each is told as often as it may be.
    """
    rollout = RolloutConfig()
    return Config.model_validate(
        {
            "scenarios": {"train": [arguments.scenario], "held_out": ["generated:1001"]},
            "prepare": {"num_states": STATES, "num_eval_states": 16, "teachers": [START]},
            "rollout": {
                "num_groups": arguments.groups,
                "num_worlds": math.ceil(arguments.groups / rollout.tellings),
                "behaviour": {"policy": 0, "max_pressure": 0.5, "max_wave": 0.5, "random": 0},
            },
            "grpo": {
                "num_generations": arguments.size,
                "max_steps": NUM_WARM_UP + arguments.steps,
            },
            # Nobody is to learn anything here, and no episode of a check belongs to a step.
            "check": {"every_steps": 0},
            "health": {"max_invalid_share": 1, "max_zero_variance_share": 1},
        }
    )


def ours(
    config: Config, root: Path, num_plain_steps: int
) -> tuple[list[dict[str, Any]], Assignment]:
    """Metrics of our measured steps, and what the plain way is to do on the last one's prompts."""
    from rl_ft.actors import start_actors
    from rl_ft.cluster import ray_session
    from rl_ft.monitor import MetricLog, read_metrics
    from rl_ft.pipeline import run_stage
    from rl_ft.render import Renderer
    from rl_ft.rollout import traffic_score
    from rl_ft.run import GrpoLoop
    from rl_ft.run_folder import RunFolder
    from rl_ft.worlds import shares

    folder = RunFolder.create(root, config, resume=False)
    told: list[Decision] = []
    traffic = traffic_score(config)

    def score(asked: Asked, *tried: Any) -> Sequence[Reward]:
        told.append(asked.telling.decision)
        return traffic(asked, *tried)

    with ray_session(config), MetricLog(root) as record:
        for stage in ("prepare", "sft"):
            run_stage(stage, config, folder)
        model = str(folder.path("sft", START))
        worlds, samplers = start_actors(config, model, folder.path("data"))
        loop = GrpoLoop(config, folder, START, worlds, samplers, record, score=score)
        asyncio.run(loop.run())
    renderer = Renderer(model, max_prompt_length=config.model.max_prompt_length)
    by_name: dict[tuple[str, tuple[int, ...]], Decision] = {}
    for decision in told:
        chat = dialect.messages(decision, instructions=config.model.instructions)
        by_name[state_id(decision), renderer.prompt_ids(chat)] = decision
    prompts = [
        (group.group_id, tuple(group.prompt_ids))
        for group in loop.lineage.groups(config.grpo.max_steps - 1)
    ]
    num_worlds = shares(config.rollout.num_worlds, config.ray.num_world_actors)
    assignment = Assignment(
        config=config,
        model=model,
        told=tuple(by_name[name] for name in prompts),
        prompt_ids=tuple(prompt_ids for _, prompt_ids in prompts),
        pools=tuple((config.seed * 1_000 + i, num) for i, num in enumerate(num_worlds)),
        num_steps=1 + num_plain_steps,
    )
    steps = [line["values"] for line in read_metrics(root, STAGE)]
    return steps[NUM_WARM_UP:], assignment


def plain(assignment: Assignment, folder: Path) -> list[dict[str, float]]:
    """The measured steps of the plain way."""
    file = folder / "assignment.pickle"
    file.write_bytes(pickle.dumps(assignment))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plain_step.py")), str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the plain way failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])[1:]


def show(
    config: Config, ours: Sequence[dict[str, Any]], plain: Sequence[dict[str, float]]
) -> Table:
    """Medians over the steps, by stage and whole."""
    for step in plain:
        step["train_s"] = step["step_s"] - step["generate_s"] - step["reward_s"]
    num_groups, size = config.rollout.num_groups, config.grpo.num_generations
    table = Table(
        title=f"{config.scenarios.train[0]}: {num_groups} groups x {size} answers, "
        f"{config.reward.horizon_s:g} s each",
        caption=f"medians over {len(ours)} of our steps and {len(plain)} plain ones",
    )
    table.add_column("seconds per step")
    for column in ("ours", "plain", "ratio"):
        table.add_column(column, justify="right")

    def median(steps: Sequence[dict[str, Any]], key: str | None) -> float | None:
        return None if key is None else statistics.median(step[key] for step in steps)

    def add(name: str, ours_s: float | None, plain_s: float | None) -> None:
        both = ours_s and plain_s
        cells = ["" if value is None else f"{value:.2f}" for value in (ours_s, plain_s)]
        table.add_row(name, *cells, f"{plain_s / ours_s:.1f}" if both else "")

    for name, (our_key, plain_key) in ROWS.items():
        parts = config.ray.num_world_actors if our_key in OF_EVERY_POOL else 1
        add(name, median(ours, our_key) / parts, median(plain, plain_key))
    table.add_section()
    add("whole step", median(ours, "time/step_s"), median(plain, "step_s"))
    add("core-seconds", median(ours, "system/processes_core_s"), median(plain, "core_s"))
    processes = statistics.median(step["num_processes"] for step in plain)
    table.add_row("SUMO processes started", "", f"{processes:.0f}", "")
    return table


def main() -> None:
    """Our run, then the plain one, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="resco:cologne1")
    parser.add_argument("--groups", type=int, default=48)
    parser.add_argument("--size", type=int, default=8, help="answers per group")
    parser.add_argument("--steps", type=int, default=8, help="of ours, measured")
    parser.add_argument("--plain-steps", type=int, default=2, help="of the plain way, measured")
    arguments = parser.parse_args()
    config = configuration(arguments)
    with tempfile.TemporaryDirectory() as place:
        steps, assignment = ours(config, Path(place, "run"), arguments.plain_steps)
        plain_steps = plain(assignment, Path(place))
    Console(width=100).print(show(config, steps, plain_steps))


if __name__ == "__main__":
    main()

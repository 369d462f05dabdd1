"""Where the seconds of one GRPO step go, and how busy the machine is meanwhile.

Reads the metrics of a run; without one it makes a short run first, by the command line, with the
recipe `smoke`. The first step of a stage warms up and is left out. Worlds work side by side, so
the parts of the rollout may add up to more than its wall time. The busy share is that of the whole
machine: what else ran on it counts; the core-seconds are the run's own.

    python scripts/bench/step.py [--run DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rl_ft.monitor import read_metrics

STAGES = {
    "time/sync_s": "sync: answers wait for weights",
    "time/rollout_s": "rollout",
    "time/observe_s": "  observe",
    "time/generate_s": "  generate",
    "time/branch_s": "  branch",
    "time/train_s": "train",
    "learner/forward_s": "  forward",
    "learner/backward_s": "  backward",
    "learner/publish_s": "  publish",
    "learner/other_s": "  optimiser, checkpoint, rest",
}
WALL = ("time/sync_s", "time/rollout_s", "time/train_s")
"""What a step waits for in turn. The learner hands over its weights before it has written its
checkpoint and metrics, so its end may overlap with the next rollout."""
SHORT_RUN = ("grpo.max_steps=8", "grpo.save_steps=8")
"""The recipe's own two steps would leave one to measure, and each of them writes a checkpoint."""


def main() -> None:
    """One table for each policy that the run trained."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run folder; default: a short run made now")
    arguments = parser.parse_args()
    if arguments.run is not None:
        show(arguments.run)
        return
    with tempfile.TemporaryDirectory() as place:
        root = Path(place) / "run"
        make(root, SHORT_RUN)
        show(root)


def make(root: Path, settings: Sequence[str]) -> None:
    """A run of the recipe `smoke` with some settings, and no episodes of checks in its steps."""
    options = [option for s in (*settings, "check.every_steps=0") for option in ("--set", s)]
    command = [sys.executable, "-m", "rl_ft.cli", "run", "--recipe", "smoke", *options]
    if status := subprocess.run([*command, "--out", str(root)], check=False).returncode:
        raise SystemExit(f"the run with {', '.join(settings)} ended with status {status}")


def show(root: Path) -> None:
    """Print the tables of a run folder."""
    console = Console(width=100)
    for stage in trained(root):
        steps = [line["values"] for line in read_metrics(root, stage)]
        console.print(_table(stage, steps[1:] or steps))


def trained(root: Path) -> list[str]:
    """The stages of the run that are GRPO, in order."""
    file = root / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    stages = dict.fromkeys(json.loads(line)["stage"] for line in lines)
    found = [stage for stage in stages if stage.split("/")[0] == "grpo"]
    if not found:
        raise SystemExit(f"{root}: expected a run folder with steps of grpo in metrics.jsonl")
    return found


def _table(stage: str, steps: Sequence[dict[str, Any]]) -> Table:
    step_s = _values(steps, "time/step_s")
    if not step_s:
        raise SystemExit(f"{stage}: no step has time/step_s")
    table = Table(title=f"{stage}: {len(steps)} step(s)", caption="medians over the steps")
    table.add_column("")
    for column in ("s", "share of the step"):
        table.add_column(column, justify="right")

    def add(name: str, seconds: float) -> None:
        table.add_row(name, f"{seconds:.3f}", f"{seconds / statistics.median(step_s):.1%}")

    for key, name in STAGES.items():
        if values := _values(steps, key):
            add(name, statistics.median(values))
    rests = [
        values["time/step_s"] - sum(values[key] for key in WALL)
        for values in steps
        if all(values.get(key) is not None for key in ("time/step_s", *WALL))
    ]
    if rests:
        add("waiting (negative: overlap)", statistics.median(rests))
    table.add_section()
    add("step", statistics.median(step_s))
    if busy := _values(steps, "system/cpu_share"):
        table.add_row("busy core-seconds / (cores x wall)", "", f"{statistics.mean(busy):.1%}")
    if core_s := _values(steps, "system/processes_core_s"):
        add("core-seconds of the run itself", statistics.median(core_s))
    return table


def _values(steps: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [values[key] for values in steps if values.get(key) is not None]


if __name__ == "__main__":
    main()

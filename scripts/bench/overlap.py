"""What it brings to collect groups while the learner trains, in steps per second.

Makes one short run per `rollout.max_staleness`, one after the other, by the command line; or reads
runs that are there. The first step of a stage warms up and is left out; of the others the sum
counts, not the median, since with an overlap neighbouring steps trade seconds. What is hidden is
the share of the shorter of rollout and training that took no time of its own; without an overlap it
is 0 but for the checkpoint that is written while the next rollout begins. On a machine whose cores
are all busy anyway nothing can be gained. The idle share is that of the whole machine: what else
ran on it counts as busy.

    python scripts/bench/overlap.py [--staleness 0,1] [--steps 20] [--runs DIR DIR ...]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from step import make, trained

from rl_ft.monitor import read_metrics

STEP = ("rollout.num_groups=24", "rollout.num_worlds=8", "grpo.num_generations=8")
"""The recipe's own steps are over before an overlap has begun."""


def main() -> None:
    """One row per run; the first is what the others are compared with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--staleness", default="0,1", help="bounds to compare, in versions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--runs", type=Path, nargs="+", help="run folders; default: made now")
    arguments = parser.parse_args()
    if arguments.runs:
        show(arguments.runs)
        return
    with tempfile.TemporaryDirectory() as place:
        roots = []
        for bound in arguments.staleness.split(","):
            roots.append(Path(place) / bound)
            # Without a fence on the way.
            ends = (f"grpo.max_steps={arguments.steps}", f"grpo.save_steps={arguments.steps}")
            ahead = f"rollout.max_staleness={int(bound)}"
            make(roots[-1], (*STEP, *ends, ahead, "evaluate.seeds=1"))
        show(roots)


def show(roots: Sequence[Path]) -> None:
    """Print the table of some run folders."""
    table = Table(title=f"{len(roots)} run(s), all steps but the first")
    columns = ("max. staleness", "steps/s", "ratio", "s per step", "rollout s", "train s", "hidden")
    for column in (*columns, "idle"):
        table.add_column(column, justify="right")
    first_rate = None
    for root in roots:
        means = _means(root)
        step_s, rollout_s, train_s = (
            means[f"time/{name}_s"] for name in ("step", "rollout", "train")
        )
        rate = 1 / step_s
        first_rate = first_rate or rate
        hidden_s = max(0.0, rollout_s + train_s - step_s)
        table.add_row(
            f"{means['staleness/max']:.0f}",
            f"{rate:.3f}",
            f"{rate / first_rate:.2f}",
            f"{step_s:.2f}",
            f"{rollout_s:.2f}",
            f"{train_s:.2f}",
            f"{hidden_s / min(rollout_s, train_s):.0%}",
            f"{1 - means['system/cpu_share']:.0%}",
        )
    Console(width=100).print(table)


def _means(root: Path) -> dict[str, float]:
    """Means over the steps of the run's first policy; of the staleness, the largest."""
    steps = [line["values"] for line in read_metrics(root, trained(root)[0])][1:]
    if not steps:
        raise SystemExit(f"{root}: expected at least two steps, of which the first warms up")
    names = ("time/step_s", "time/rollout_s", "time/train_s", "system/cpu_share")
    means = {name: statistics.mean(values[name] for values in steps) for name in names}
    return means | {"staleness/max": max(values["staleness/max"] for values in steps)}


if __name__ == "__main__":
    main()

"""What a sweep found: its trials from best to worst, as a table, as JSON and as a picture.

Only what finished or was stopped has a result; what failed is shown with its cause.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from rl_ft.plots import Checked, Tried, sweep_picture
from rl_ft.run_folder import write_atomically
from rl_ft.sweep_folder import SweepFolder
from rl_ft.trial import Outcome, objective_s, read_outcome

_ORDER = ("finished", "stopped", "unfinished", "failed")


def rank(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Finished trials before stopped ones, whose results are of an earlier step; then the rest."""

    def place(outcome: Outcome) -> tuple[int, float, int]:
        objective = math.inf if outcome.result is None else objective_s(outcome.result)
        return _ORDER.index(outcome.state), objective, outcome.trial.number

    return sorted(outcomes, key=place)


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The first one that has a result."""
    return next((outcome for outcome in rank(outcomes) if outcome.result is not None), None)


def write_results(sweep: SweepFolder) -> list[Outcome]:
    """Write `results.json` and `sweep.png` from the trials' folders; returns the ranking."""
    ranked = rank([read_outcome(sweep, trial) for trial in sweep.trials])
    found = best(ranked)
    results = {
        "complete": all(o.state != "unfinished" for o in ranked),
        "best": None if found is None else found.trial.name,
        "trials": [_row(outcome) for outcome in ranked],
    }
    write_atomically(sweep.root / "results.json", json.dumps(results, indent=1) + "\n")
    if any(outcome.checks for outcome in ranked):
        picture = sweep_picture([_tried(o) for o in ranked if o.checks], keys=sweep.swept_keys)
        (sweep.root / "sweep.png").write_bytes(picture)
    return ranked


def print_ranking(sweep: SweepFolder, ranked: Sequence[Outcome]) -> None:
    """The table as a person reads it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Trials by mean delay per vehicle in the closed loop")
    table.caption = "counts as: the delay, and what gridlocks and invalid answers add to it"
    table.add_column("trial")
    for heading in ("counts as", "delay", "gridlocks", "invalid", "step"):
        table.add_column(heading, justify="right")
    for key in sweep.swept_keys:
        table.add_column(key, justify="right")
    table.add_column("ending")
    for outcome in ranked:
        result = outcome.result
        measured = ("", "", "", "")
        if result is not None:
            share = f"{result.invalid_share:.1%}"
            objective = f"{objective_s(result):.1f} s"
            measured = (objective, f"{result.delay_s:.1f} s", str(result.gridlocks), share)
        settings = [str(outcome.trial.settings[key]) for key in sweep.swept_keys]
        ending = outcome.ending or outcome.state
        table.add_row(outcome.trial.name, *measured, str(outcome.step), *settings, ending)
    Console().print(table)


def _row(outcome: Outcome) -> dict[str, Any]:
    result = outcome.result
    measured = None
    if result is not None:
        measured = {
            "objective_s": objective_s(result),
            "delay_s": result.delay_s,
            "gridlocks": result.gridlocks,
            "invalid_share": result.invalid_share,
            "scenario_delay_s": dict(result.scenario_delay_s),
        }
    return {
        "trial": outcome.trial.name,
        "state": outcome.state,
        "ending": outcome.ending,
        "result": measured,
        "step": outcome.step,
        "settings": outcome.trial.settings,
        "shared": dict(outcome.trial.shared),
        "checks": [
            {"step": step, "delay_s": c.delay_s, "gridlocks": c.gridlocks}
            for step, c in sorted(outcome.checks.items())
        ],
    }


def _tried(outcome: Outcome) -> Tried:
    points = [
        Checked(step=step, delay_s=check.delay_s, gridlocks=check.gridlocks)
        for step, check in sorted(outcome.checks.items())
    ]
    result = outcome.result
    return Tried(
        name=outcome.trial.name,
        settings=outcome.trial.settings,
        checks=tuple(points),
        delay_s=None if result is None else result.delay_s,
        gridlocks=0 if result is None else result.gridlocks,
        is_finished=outcome.state == "finished",
    )

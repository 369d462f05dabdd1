"""Sweeps on disk without a simulation: planned for real, trials' folders as runs leave them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from envs.errors import UserError
from rl_ft.ending import noted_ending
from rl_ft.monitor import MetricLog, write_summary
from rl_ft.run_folder import RunFolder
from rl_ft.sweep_folder import SweepFolder, Trial
from rl_ft.trial import OnCheck, figures, read_outcome

START = "max_pressure"


def planned(root: Path, space: str, *overrides: str, num_samples: int = 1, **asked) -> SweepFolder:
    root.mkdir(parents=True, exist_ok=True)
    file = root / "space.yaml"
    file.write_text(space)
    settings = {"recipe": "smoke", "seed": None, "early_stop": True} | asked
    return SweepFolder.plan(
        root / "sweep", space_file=file, overrides=overrides, num_samples=num_samples, **settings
    )


def delays(name: str, value: float, gridlocks: float = 0, invalid_share: float = 0):
    return {
        f"{name}delay_s": value,
        f"{name}gridlocks": gridlocks,
        f"{name}invalid_share": invalid_share,
    }


def played(
    sweep: SweepFolder,
    trial: Trial,
    checks: Mapping[int, float],
    *,
    ending: str | None = "finished",
    left: Mapping[str, float] | None = None,
) -> None:
    """The folder of a trial that was checked to these delays and ended so."""
    folder = RunFolder.create(sweep.trial_path(trial), trial.config, resume=False)
    with MetricLog(folder.root) as record:
        for step, delay_s in checks.items():
            record.log(f"check/{START}", step, delays("check/", delay_s))
    if ending == "finished":
        folder.mark_done("grpo")
        left = left or delays("mean_", checks[max(checks)])
        write_summary(folder.root, f"check/{START}", {"left": "mean", **left})
    if ending is not None:
        folder.finish(ending)
    else:
        folder._lock.close()


def drive_towards(sweep: SweepFolder, trial: Trial, on_check: OnCheck) -> None:
    """Instead of a training: checks of as much delay as `prepare.warm_up_s`, which nobody shares.

    With 40 it fails, with 50 its process dies.
    """
    delay_s = trial.config.prepare.warm_up_s
    place = sweep.trial_path(trial)
    folder = RunFolder.create(place, trial.config, resume=(place / "config.yaml").is_file())
    if delay_s == 50:
        os._exit(7)
    with noted_ending(folder, again="", console=False), MetricLog(folder.root) as record:
        if delay_s == 40:
            raise UserError("no such net")
        for step in range(trial.config.grpo.max_steps):
            record.log(f"check/{START}", step, delays("check/", delay_s))
            on_check(figures(step, read_outcome(sweep, trial).checks[step]))
        folder.mark_done("grpo")
        left = {"left": "mean", **delays("mean_", delay_s - 1)}
        write_summary(folder.root, f"check/{START}", left)

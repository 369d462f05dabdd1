"""One trial of a sweep: an ordinary run in a folder of its own, and what it came to.

The folder is the record. What a trial measured, how it ended and where it goes on are read from
there, so nothing is lost with the process that worked on it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rl_ft.check import Check, read_checks, read_left
from rl_ft.cluster import in_thread
from rl_ft.ending import InterruptedRun, in_a_sentence, noted_ending
from rl_ft.pipeline import run_stage
from rl_ft.recipe import read_config
from rl_ft.run_folder import RunFolder
from rl_ft.sweep_folder import SweepFolder, Trial

log = logging.getLogger(__name__)

STAGES = ("prepare", "sft", "grpo")
MADE = {"prepare": ("data", "model"), "sft": ("sft",)}
"""What a stage leaves for the next one; its last part, where there are several, is the largest."""

STOPPED = "stopped"
"""How the ending of a trial begins that was behind the others."""

GRIDLOCK_S = 10_000.0
"""What a gridlock adds to the delay: no delay is as bad."""

POLL_S = 2.0

State = Literal["finished", "stopped", "failed", "unfinished"]
OnCheck = Callable[[dict[str, float]], None]


class TrialError(Exception):
    """A trial failed; the message is how its run folder says it ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a trial has come to so far."""

    trial: Trial
    state: State
    ending: str
    """In words; empty while it has not ended."""
    checks: Mapping[int, Check]
    """By step."""
    left: Check | None
    """How the model drives that it was left with, or if that is a start which others share what was
    made of it; None unless it is finished."""

    @property
    def step(self) -> int:
        """The last one that was checked."""
        return max(self.checks, default=0)

    @property
    def result(self) -> Check | None:
        """What counts: the model that is left, of a stopped trial its last check; None if none."""
        if self.state == "finished":
            return self.left
        return self.checks[self.step] if self.state == "stopped" and self.checks else None


def objective_s(check: Check) -> float:
    """What a sweep minimises: delay; gridlocks and invalid answers make it longer."""
    return check.charged_delay_s + GRIDLOCK_S * check.gridlocks


def run_trial(sweep: SweepFolder, trial: Trial, on_check: OnCheck) -> None:
    """Until GRPO is done, from wherever the folder is; `on_check` is told of every check.

    Raises:
        TrialError: the run failed; its folder says how.
    """
    place = sweep.trial_path(trial)
    folder = RunFolder.create(place, trial.config, resume=(place / "config.yaml").is_file())
    folder.note(sweep={"folder": str(sweep.root), "trial": trial.name, "settings": trial.settings})
    try:
        with noted_ending(folder, again=_again(sweep), console=False):
            work = in_thread(partial(_stages, sweep, trial, folder), f"trial {trial.name}")
            _report_checks(place, trial, work, on_check)
            work.result()
    except Exception as error:
        raise TrialError(in_a_sentence(error)) from error
    outcome = read_outcome(sweep, trial)
    if outcome.left is not None:
        on_check(figures(outcome.step, outcome.left))


def run_shared_stages(sweep: SweepFolder, trials: Sequence[Trial]) -> None:
    """Make what several trials have in common, unless it is there.

    Where that fails, so will every trial that needs it, with its cause; the others need not.
    """
    for stage in MADE:
        users = {t.shared[stage]: t for t in reversed(trials) if stage in t.shared}
        for name, trial in sorted(users.items()):
            place = sweep.shared_path(name)
            started = (place / "config.yaml").is_file()
            config = read_config(place / "config.yaml") if started else trial.config
            if started and RunFolder(root=place, config=config).stage_done(stage):
                continue
            folder = RunFolder.create(place, config, resume=started)
            try:
                with noted_ending(folder, again=_again(sweep), console=False):
                    for earlier in STAGES[: STAGES.index(stage) + 1]:
                        _stage(sweep, trial, folder, earlier, own=stage)
            except InterruptedRun:
                raise
            except Exception as error:
                log.error("%s: %s", place.relative_to(sweep.root), in_a_sentence(error))


def read_outcome(sweep: SweepFolder, trial: Trial) -> Outcome:
    """What the trial's folder says now."""
    root = sweep.trial_path(trial)
    if not (root / "manifest.json").is_file():
        return Outcome(trial=trial, state="unfinished", ending="", checks={}, left=None)
    folder = RunFolder(root=root, config=trial.config)
    ending = folder.ending or ""
    state: State = "failed"
    if folder.is_marked("grpo"):
        state = "finished"
    elif ending.startswith(STOPPED):
        state = "stopped"
    elif ending in ("", "interrupted"):
        state = "unfinished"
    return Outcome(
        trial=trial,
        state=state,
        ending=ending,
        checks=read_checks(root, trial.start),
        left=_left(root, trial) if state == "finished" else None,
    )


def note_ending(sweep: SweepFolder, trial: Trial, ending: str) -> None:
    """What the trial itself could not write: it was stopped, or its process is gone."""
    folder = RunFolder(root=sweep.trial_path(trial), config=trial.config)
    if (folder.root / "manifest.json").is_file() and folder.ending is None:
        folder.finish(ending)


def figures(step: int, check: Check) -> dict[str, float]:
    """What Tune is told of a check."""
    return {
        "step": step,
        "objective_s": objective_s(check),
        "delay_s": check.delay_s,
        "gridlocks": check.gridlocks,
        "invalid_share": check.invalid_share,
    }


def _stages(sweep: SweepFolder, trial: Trial, folder: RunFolder) -> None:
    for stage in STAGES:
        _stage(sweep, trial, folder, stage, own="grpo")


def _stage(sweep: SweepFolder, trial: Trial, folder: RunFolder, stage: str, *, own: str) -> None:
    """Do it, or take it from where it is shared; `own` is the one that this folder is for."""
    if folder.stage_done(stage):
        return
    if stage == own or stage not in trial.shared:
        run_stage(stage, folder.config, folder)
        return
    origin = sweep.shared_path(trial.shared[stage])
    made = RunFolder(root=origin, config=read_config(origin / "config.yaml"))
    if not made.stage_done(stage):
        raise TrialError(f"{origin.relative_to(sweep.root)}: {made.ending}")
    for name in MADE[stage]:
        link = folder.path(name)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(origin / name, link.parent))
    folder.mark_done(stage)


def _left(root: Path, trial: Trial) -> Check | None:
    # Of different settings for training, one start for all says nothing.
    return read_left(root, trial.start, but_the_start="sft" in trial.shared)


def _again(sweep: SweepFolder) -> str:
    return f"rl-ft sweep --out {sweep.root} --resume"


def _report_checks(place: Path, trial: Trial, work: Future[Any], on_check: OnCheck) -> None:
    """Every check that is not the last one: whoever stops a trial then has lost nothing."""
    reported = set[int]()
    while not work.done():
        wait([work], timeout=POLL_S)
        for step, check in read_checks(place, trial.start).items():
            if step not in reported and step < trial.config.grpo.max_steps:
                reported.add(step)
                on_check(figures(step, check))

"""The stages of the main job in order: which there are, what each needs, which are done.

A stage is a function of the configuration and the run folder; its module is imported when its
turn comes. How a stage works is its own module's business.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack

from envs.errors import UserError
from rl_ft.cluster import ray_session
from rl_ft.config import Config
from rl_ft.mirror import Copier
from rl_ft.progress import Progress
from rl_ft.run_folder import RunFolder

log = logging.getLogger(__name__)

ON_RAY = ("sft", "grpo", "evaluate")
"""Stages that open a Ray session when they run alone."""


def run_all(config: Config, folder: RunFolder) -> None:
    """Every stage from `prepare` to `report` that is not done yet, in one Ray session."""
    with ExitStack() as session:
        for stage in STAGES:
            if folder.stage_done(stage):
                log.info("%s: done already", stage)
                continue
            if stage in ON_RAY:
                session.enter_context(ray_session(config))
            run_stage(stage, config, folder)


def run_stage(stage: str, config: Config, folder: RunFolder) -> None:
    """One stage, whether or not it was done before; the stages before it must be done.

    The report is of what there is: it counts as done only where all the others are.
    """
    before = list(STAGES)[: list(STAGES).index(stage)]
    missing = [earlier for earlier in before if not folder.stage_done(earlier)]
    if missing and stage != "report":
        raise UserError(
            f"{stage} needs {missing[0]}, which is not done in {folder.root}: "
            f"run `rl-ft {missing[0]} --out {folder.root}` first, or all with `rl-ft run`"
        )
    copier = Copier(config.monitor.mirror, folder.root)
    log.info("%s: starting", stage)
    with Progress(stage):
        STAGES[stage](config, folder)
    if not missing:
        folder.mark_done(stage)
    copier.finish()
    log.info("%s: done", stage)


def _prepare(config: Config, folder: RunFolder) -> None:
    from rl_ft.prepare import prepare

    prepare(config, folder)


def _sft(config: Config, folder: RunFolder) -> None:
    from rl_ft.sft import train_sft

    with ray_session(config):
        train_sft(config, folder)


def _grpo(config: Config, folder: RunFolder) -> None:
    from rl_ft.run import train_grpo

    train_grpo(config, folder)


def _evaluate(config: Config, folder: RunFolder) -> None:
    from rl_ft.evaluate import evaluate_run

    evaluate_run(config, folder)


def _report(config: Config, folder: RunFolder) -> None:
    from rl_ft.report import write_report

    write_report(folder)


STAGES: dict[str, Callable[[Config, RunFolder], None]] = {
    "prepare": _prepare,
    "sft": _sft,
    "grpo": _grpo,
    "evaluate": _evaluate,
    "report": _report,
}

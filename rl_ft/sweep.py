"""Ray Tune over short runs: which trial drives best, without finishing the hopeless ones.

    sweep.yaml --> shared stages --> Tune: one process per trial, which is an ordinary run
                                       |  every check -> ASHA -> go on, or stop
                                       v
                     trials/NNN/ --> results.json, table, sweep.png --> the best one's full run

Tune says who runs when and who is stopped; what a trial is and came to is in its folder alone. So
a resumed sweep is Tune over the trials that are not done, and ASHA is told first what the others
reported. (`Tuner.restore` would forget that, Ray 2.60 does not keep the scheduler, and would insist
on the number of trials at once.)
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from envs.errors import UserError
from rl_ft.cluster import gpu_share, in_thread, ray_session, take_back
from rl_ft.config import Config
from rl_ft.ending import InterruptedRun, noted_ending
from rl_ft.monitor import run_log
from rl_ft.pipeline import run_all
from rl_ft.prepare import require_model
from rl_ft.progress import Progress
from rl_ft.ranking import best, print_ranking, write_results
from rl_ft.recipe import load_config
from rl_ft.run_folder import RunFolder, take_lock
from rl_ft.sweep_folder import SweepFolder, Trial, as_overrides
from rl_ft.trial import (
    STOPPED,
    OnCheck,
    Outcome,
    figures,
    note_ending,
    read_outcome,
    run_shared_stages,
    run_trial,
)

log = logging.getLogger(__name__)

CPUS_PER_TRIAL = 0.1
"""The trial's own process; its actors and its learner ask for theirs by themselves."""
POLL_S = 2.0
FREE_TIMEOUT_S = 60.0
"""How long the processes of a sweep that was killed may take to be gone."""

REDUCTION = 2
"""At each rung the worse half is stopped."""
FIRST_RUNG = 4
"""The first rung is this part of the shortest trial; each next one is `REDUCTION` times later."""


RunTrial = Callable[[SweepFolder, Trial, OnCheck], None]
"""See `run_trial`."""


class SweepError(Exception):
    """The sweep has no result; the message says why."""


def run_sweep(
    sweep: SweepFolder, *, concurrent: int | None, retry: bool, run: RunTrial = run_trial
) -> list[Outcome]:
    """All trials that are not done, `concurrent` at a time; returns the ranking.

    With `retry` those that failed before are tried again. `run` works in the trial's process.

    Raises:
        SweepError: every trial failed.
        UserError: the cluster is too small for one trial.
    """
    before = [read_outcome(sweep, trial) for trial in sweep.trials]
    again = ("unfinished", "failed") if retry else ("unfinished",)
    todo = [outcome.trial for outcome in before if outcome.state in again]
    if todo:
        for trial in todo:
            _await_free(sweep.trial_path(trial))
        try:
            with ray_session(_session_config(sweep, concurrent)):
                num = concurrent or _num_fitting(sweep.base)
                run_shared_stages(sweep, todo)
                log.info("sweep: %d trials to run, %d at a time", len(todo), num)
                _tune(sweep, todo, [o for o in before if o.trial not in todo], num, run)
        finally:
            write_results(sweep)
    ranked = write_results(sweep)
    print_ranking(sweep, ranked)
    if best(ranked) is None:
        causes = dict.fromkeys(outcome.ending for outcome in ranked)
        raise SweepError(f"no trial has a result: {'; '.join(causes)}")
    return ranked


@contextmanager
def sweeping(sweep: SweepFolder, *, again: str) -> Iterator[None]:
    """The only process that works in the folder, with its log.

    Raises:
        InterruptedRun: Ctrl-C; `again` is the command that goes on.
    """
    with sweep.lock(), run_log(sweep.root / "run.log"):
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise InterruptedRun(f"interrupted; to go on: {again}") from interrupt


def promoted_config(recipe: str, settings: Mapping[str, Any]) -> Config:
    """The full run's configuration.

    Raises:
        UserError: the settings do not fit the recipe, or its model is not there.
    """
    try:
        config = load_config(recipe, as_overrides(settings))
        require_model(config)
    except UserError as error:
        raise UserError(f"--promote {recipe}: {error}") from error
    return config


def promote(sweep: SweepFolder, outcome: Outcome, recipe: str) -> Path:
    """The whole run of a recipe with a trial's settings, or what is left of it; returns its folder.

    Its manifest says where the settings came from.
    """
    trial, result = outcome.trial, outcome.result
    assert result is not None
    place = sweep.root / "promoted" / Path(recipe).stem
    config = promoted_config(recipe, trial.settings)
    log.info("promoting trial %s, %s: %s", trial.name, result, trial.settings)
    folder = RunFolder.create(place, config, resume=(place / "config.yaml").is_file())
    folder.note(
        promoted_from={
            "sweep": str(sweep.root),
            "trial": trial.name,
            "settings": dict(trial.settings),
            "result": figures(outcome.step, result),
        }
    )
    with noted_ending(folder, again=f"rl-ft run --out {place} --resume", console=False):
        run_all(config, folder)
    return place


def cpus_wanted(config: Config) -> float:
    """What one trial holds of the cluster's CPUs at most."""
    return CPUS_PER_TRIAL + config.cpus_wanted


def num_fitting(wants: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many trials a cluster takes at once.

    Raises:
        UserError: none.
    """
    held = {name: amount for name, amount in wants.items() if amount}
    # A hair's breadth: shares of a GPU are binary fractions, 0.1 CPU is not.
    num = min(int(resources.get(name, 0.0) / amount + 1e-6) for name, amount in held.items())
    if num < 1:
        has = {name: resources.get(name, 0.0) for name in held}
        raise UserError(
            f"one trial wants {held} of the cluster, which has {has}: --set ray.num_cpus=... for a "
            "cluster of its own, or fewer ray.num_world_actors"
        )
    return num


def halving(trials: Sequence[Trial], done: Sequence[Outcome]) -> Any:
    """Tune's ASHA over optimiser steps, as if it had seen the trials that are done."""
    from ray.tune.schedulers import ASHAScheduler

    steps = [trial.config.grpo.max_steps for trial in trials]
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="objective_s",
        mode="min",
        grace_period=max(1, min(steps) // FIRST_RUNG),
        # Whoever comes to the end has nothing left to stop.
        max_t=max(steps) + 1,
        reduction_factor=REDUCTION,
    )
    for outcome in done:
        earlier = SimpleNamespace(trial_id=f"earlier {outcome.trial.name}")
        scheduler.on_trial_add(None, earlier)
        for step, check in sorted(outcome.checks.items()):
            scheduler.on_trial_result(None, earlier, figures(step, check))
    return scheduler


def _session_config(sweep: SweepFolder, concurrent: int | None) -> Config:
    """The recipe's; a private cluster has room for as many trials as were asked for."""
    base = sweep.base
    if concurrent is None:
        return base
    cpus = max(base.ray.num_cpus, math.ceil(concurrent * cpus_wanted(base)))
    return base.model_copy(update={"ray": base.ray.model_copy(update={"num_cpus": cpus})})


def _num_fitting(config: Config) -> int:
    import ray

    gpus = config.num_gpu_holders * gpu_share(config.num_gpu_holders)
    return num_fitting({"CPU": cpus_wanted(config), "GPU": gpus}, ray.cluster_resources())


def _tune(
    sweep: SweepFolder,
    todo: Sequence[Trial],
    done: Sequence[Outcome],
    num_concurrent: int,
    run: RunTrial,
) -> None:
    # Tune's own files and bars say less than the trials' folders.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    # Paths of a configuration are relative to where the sweep was started.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    # It misses the loggers.
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    from ray import tune

    def trial(point: dict[str, Any]) -> None:
        run(sweep, sweep.trials[point["trial"] - 1], tune.report)

    tunes_own = sweep.root / ".tune"
    shutil.rmtree(tunes_own, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": CPUS_PER_TRIAL}),
        param_space={"trial": tune.grid_search([t.number for t in todo])},
        tune_config=tune.TuneConfig(
            metric=None if sweep.early_stop else "objective_s",
            mode=None if sweep.early_stop else "min",
            scheduler=halving(sweep.trials, done) if sweep.early_stop else None,
            max_concurrent_trials=num_concurrent,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(tunes_own),
            callbacks=[_endings(sweep)],
            verbose=0,
        ),
    )
    # Not in the main thread, where Tune would take Ctrl-C for itself.
    work = in_thread(tuner.fit, "sweep")
    with Progress("sweep", total=len(sweep.trials), unit="trials") as progress:
        _follow(sweep, work, progress)
    for result in work.result():
        if result.error is not None:
            sentence = (str(result.error).splitlines() or ["no cause known"])[0]
            note_ending(sweep, sweep.trials[result.config["trial"] - 1], f"died: {sentence}")


def _follow(sweep: SweepFolder, work: Future[Any], progress: Progress) -> None:
    """Until Tune has ended, say how far the trials are."""
    outcomes = [read_outcome(sweep, trial) for trial in sweep.trials]
    while not work.done():
        wait([work], timeout=POLL_S)
        for i, known in enumerate(outcomes):
            if known.state not in ("finished", "stopped"):
                outcomes[i] = read_outcome(sweep, known.trial)
        over = [o for o in outcomes if o.state != "unfinished"]
        running = [o for o in outcomes if o.state == "unfinished" and o.checks]
        found = best(outcomes)
        num_failed = sum(outcome.state == "failed" for outcome in over)
        progress.update(
            len(over),
            best="none yet" if found is None else f"{found.result} (trial {found.trial.name})",
            running=", ".join(f"{o.trial.name} at step {o.step}" for o in running) or "starting",
            failed=str(num_failed),
        )


def _endings(sweep: SweepFolder) -> Any:
    """A callback of Tune that does at once what a killed trial cannot: note that it was stopped,
    and give back its room."""
    from ray import tune

    class Endings(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            ours = sweep.trials[trial.config["trial"] - 1]
            outcome = read_outcome(sweep, ours)
            if outcome.state == "unfinished":
                note_ending(sweep, ours, f"{STOPPED} at step {outcome.step}: others were better")
            take_back(f"{sweep.trial_path(ours).absolute()}/")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            ours = sweep.trials[trial.config["trial"] - 1]
            take_back(f"{sweep.trial_path(ours).absolute()}/")

    return Endings()


def _await_free(root: Path) -> None:
    """Until nobody works in a folder: the processes of a killed sweep need a moment to end."""
    if not root.is_dir():
        return
    end = time.monotonic() + FREE_TIMEOUT_S
    while True:
        try:
            take_lock(root, root).close()
            return
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)

"""How the policy in training drives: a greedy closed loop on validation scenarios, now and then.

What was checked is in the metrics as the stage `check/<start>`; the best version's weights are in
the stage's `best/`. Says which weights are the best and when more steps no longer pay; what is
done about it is `rl_ft.run`'s business. Nothing is trained on here.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from envs.errors import WorldError
from envs.scenario import expand
from rl_ft.closed_loop import Ask, Episode, Job, OnPlayed, play_controller, play_model
from rl_ft.config import Config
from rl_ft.monitor import MetricLog, read_metrics, write_summary
from rl_ft.progress import Progress
from rl_ft.run_folder import RunFolder
from rl_ft.snapshots import Snapshots

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

REFERENCE = "max_pressure"
INVALID_S = 100.0
"""What it adds to the delay if every answer is invalid: max-pressure drove, and its delay is no
result."""

Play = Callable[[OnPlayed], Iterator[Episode]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """How a policy drove the validation scenarios; delays are means over episodes."""

    delay_s: float
    gridlocks: int
    scenario_delay_s: Mapping[str, float]
    invalid_share: float = 0.0
    """Of the decisions, those in which the fallback controller had to choose."""

    @classmethod
    def of(cls, episodes: Iterable[Episode]) -> Check:
        """Whatever the order in which they ended."""
        played = sorted(episodes, key=lambda e: (e.job.scenario, e.job.seed))
        by_scenario: dict[str, list[float]] = {}
        for episode in played:
            by_scenario.setdefault(episode.job.scenario, []).append(episode.trips.delay_s)
        num_decisions = sum(episode.decisions for episode in played)
        return cls(
            delay_s=fmean(episode.trips.delay_s for episode in played),
            gridlocks=sum(episode.trips.gridlock for episode in played),
            scenario_delay_s={name: fmean(delays) for name, delays in by_scenario.items()},
            invalid_share=sum(episode.fallbacks for episode in played) / max(1, num_decisions),
        )

    @property
    def charged_delay_s(self) -> float:
        """The delay, and what invalid answers add to it."""
        return self.delay_s + INVALID_S * self.invalid_share

    def beats(self, other: Check, *, by_s: float) -> bool:
        """Fewer gridlocks; with as many, less `charged_delay_s` by more than `by_s`."""
        if self.gridlocks != other.gridlocks:
            return self.gridlocks < other.gridlocks
        return self.charged_delay_s < other.charged_delay_s - by_s

    def __str__(self) -> str:
        jams = f" with {self.gridlocks} gridlocks" if self.gridlocks else ""
        invalid = f", {self.invalid_share:.0%} invalid" if self.invalid_share >= 0.005 else ""
        return f"{self.delay_s:.1f} s{jams}{invalid}"


class Checks:
    """The checks of one start, also those before a resume; nothing at all if they are off.

    Example:
        if checks.is_due(50):
            await checks.look(50, weights, resumable_from=[20, 30, 40])
        if checks.on_plateau:
            ...
        better = await checks.choose(averaged=[40, 50])
    """

    def __init__(
        self, config: Config, folder: RunFolder, start: str, ask: Ask, record: MetricLog
    ) -> None:
        self._start = start
        self.stage = f"check/{start}"
        self._config, self._settings = config, config.check
        self._root, self._ask, self._record = folder.root, ask, record
        self._kept = Snapshots(folder.path("grpo", start, "best"))
        self._history: dict[int, Check] = {}
        self._reference: Check | None = None
        self._jobs = [
            Job(scenario=name, seed=seed, max_s=self._settings.episode_s)
            for name in expand(self._settings.scenarios)
            for seed in range(1, self._settings.seeds + 1)
        ]

    def rewind(self, version: int) -> None:
        """Forget what was checked after a version; it will be made anew."""
        self._record.rewind(self.stage, version)
        self._kept.rewind(version)
        self._history = read_checks(self._root, self._start)
        if lines := read_metrics(self._root, self.stage):
            self._reference = _read(lines[0]["values"], f"check/{REFERENCE}_")

    @property
    def best(self) -> int | None:
        """The version that no later one improved on; None before the first check."""
        return self._best_up_to(max(self._history, default=0))

    @property
    def on_plateau(self) -> bool:
        """The last `patience` checks were no improvement."""
        if not self._settings.patience or self.best is None:
            return False
        return sum(version > self.best for version in self._history) >= self._settings.patience

    @property
    def latest(self) -> str:
        """The last check in words; empty before the first."""
        if not self._history:
            return ""
        version = max(self._history)
        return f"{self._history[version]} at step {version} (max-pressure {self._reference})"

    def is_due(self, version: int) -> bool:
        """Whether it is time to check this version and that has not been done."""
        every = self._settings.every_steps
        return bool(every) and version % every == 0 and version not in self._history

    async def look(
        self,
        version: int,
        weights: Callable[[], Mapping[str, Tensor]],
        *,
        resumable_from: Collection[int],
    ) -> None:
        """Check the version that the sampler holds; the best one's weights stay.

        So do those that were the best up to each of `resumable_from`, the steps of the checkpoints.
        """
        started = time.perf_counter()
        if self._reference is None:
            self._reference = await self._play(f"{self.stage}: {REFERENCE}", self._drive_reference)
        check = await self._play(f"{self.stage} at step {version}", self._drive)
        self._history[version] = check
        if self.best == version:
            self._kept.add(version, weights())
        needed = {self.best, *map(self._best_up_to, (0, *resumable_from))}
        self._kept.keep_only([kept for kept in needed if kept is not None])
        # Last: what is in the record has its weights on disk.
        self._record.log(
            self.stage,
            version,
            _values(check, "check/")
            | _values(self._reference, f"check/{REFERENCE}_")
            | {"time/check_s": time.perf_counter() - started},
        )
        log.info("%s: %s; the best is step %d", self.stage, self.latest, self.best)

    async def choose(self, averaged: Sequence[int]) -> dict[str, Tensor] | None:
        """What to leave instead of the mean of some versions, which the sampler holds now.

        The weights of the best version if it beats that mean, else None; there must be a check.
        """
        best = self.best
        assert best is not None
        mean = self._history.get(averaged[0]) if len(averaged) == 1 else None
        mean = mean or await self._play(f"{self.stage} of the mean", self._drive)
        is_better = self._history[best].beats(mean, by_s=self._settings.min_improvement_s)
        log.info(
            "%s: the model is %s: the best check was %s at step %d, the mean of steps %s has %s",
            self.stage,
            f"that of step {best}" if is_better else "the mean",
            self._history[best],
            best,
            ", ".join(map(str, averaged)),
            mean,
        )
        left = {"left": f"step {best}" if is_better else "mean", "averaged": list(averaged)}
        found = _values(mean, "mean_") | _values(self._history[best], "best_")
        write_summary(self._root, self.stage, left | {"best_step": best} | found)
        return self._kept.get(best) if is_better else None

    def forget(self) -> None:
        """The weights that were kept are needed no more."""
        self._kept.clear()

    def _best_up_to(self, last: int) -> int | None:
        best: int | None = None
        for version in sorted(v for v in self._history if v <= last):
            if best is None or self._history[version].beats(
                self._history[best], by_s=self._settings.min_improvement_s
            ):
                best = version
        return best

    def _drive(self, on_played: OnPlayed) -> Iterator[Episode]:
        return play_model(
            self.stage,
            self._ask,
            self._jobs,
            self._config,
            num_worlds=self._settings.num_worlds,
            on_played=on_played,
        )

    def _drive_reference(self, on_played: OnPlayed) -> Iterator[Episode]:
        return play_controller(REFERENCE, self._jobs, self._config, on_played=on_played)

    async def _play(self, what: str, play: Play) -> Check:
        """In a thread, so that the loop can be interrupted: then the thread ends soon, too."""
        stopped = threading.Event()

        def work() -> Check:
            with Progress(what, total=len(self._jobs), unit="episodes") as progress:

                def on_played(share: float) -> None:
                    if stopped.is_set():
                        raise _Stopped
                    progress.add(share)

                return Check.of(play(on_played))

        def twice() -> Check:
            try:
                return work()
            except WorldError as error:
                log.warning("%s: a world failed, all is played again: %s", what, error)
                return work()

        try:
            return await asyncio.to_thread(twice)
        finally:
            stopped.set()


def read_checks(root: Path, start: str) -> dict[int, Check]:
    """The checks of a start by step, as far as its run has come."""
    lines = read_metrics(root, f"check/{start}")
    return {line["step"]: _read(line["values"], "check/") for line in lines}


def read_left(root: Path, start: str, *, but_the_start: bool = False) -> Check | None:
    """How the model drove that a start was left with; None before it is done, or unchecked.

    With `but_the_start`, where nothing drove better than the start itself and that was left: how
    the mean of what came after it did.
    """
    file = root / "metrics.json"
    summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = summary.get(f"check/{start}")
    if found is None:
        return None
    is_mean = found["left"] == "mean" or (but_the_start and found["left"] == "step 0")
    return _read(found, "mean_" if is_mean else "best_")


class _Stopped(Exception):  # noqa: N818 - nobody sees it
    """The loop that wanted to know has ended."""


def _values(check: Check, prefix: str) -> dict[str, float]:
    return {
        f"{prefix}delay_s": check.delay_s,
        f"{prefix}gridlocks": float(check.gridlocks),
        f"{prefix}invalid_share": check.invalid_share,
        **{f"{prefix}delay_s/{name}": d for name, d in check.scenario_delay_s.items()},
    }


def _read(values: Mapping[str, Any], prefix: str) -> Check:
    """What `_values` was made of."""
    each = f"{prefix}delay_s/"
    return Check(
        delay_s=values[f"{prefix}delay_s"],
        gridlocks=int(values[f"{prefix}gridlocks"]),
        scenario_delay_s={k.removeprefix(each): v for k, v in values.items() if k.startswith(each)},
        # Folders of before it was counted do not have it.
        invalid_share=values.get(f"{prefix}invalid_share", 0.0),
    )

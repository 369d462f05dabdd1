"""Who is told what a run measures, beside `metrics.jsonl`: TensorBoard, Ray's metrics, MLflow, W&B.

Nobody who watches may stop a run: a sink that fails is reported once and the run goes on. Only what
cannot work from the start is an error, when the stage begins.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from envs.errors import UserError
from rl_ft.recipe import flatten
from rl_ft.run_folder import run_id
from rl_ft.series import SERIES, STEP_BOUNDS_S

if TYPE_CHECKING:
    from rl_ft.config import Config

log = logging.getLogger(__name__)

REFRESH_S = 5.0
"""Ray forgets a gauge that was not set for about 20 s; a step may take longer."""
EXPERIMENT = "rl-ft"
MAX_UNDER_WAY = 20
"""Steps that MLflow may be behind."""
_FOREIGN = re.compile(r"[^\w.: -]")
"""What a name may not hold in MLflow; and slashes, because a folder of MLflow's keeps each metric
in a file of its name, and none may be the folder of another."""


class Sink(Protocol):
    """Takes a step's figures; `rl_ft.monitor.MetricLog` is one as well."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """What one step of a stage, such as `grpo/max_pressure`, measured."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """Nothing more comes; `failed` where an error ended the stage."""
        ...


class Sinks:
    """Several as one; the failure of one is its own."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []
        self._failed: set[str] = set()

    def add(self, sink: Sink) -> None:
        """It is told what comes from now on."""
        self._sinks.append(sink)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """See `Sink.log`; not-a-number and infinity are left out."""
        finite = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        for sink in self._sinks:
            try:
                sink.log(stage, step, finite)
            except Exception as error:
                self._report(sink, error)

    def close(self, *, failed: bool = False) -> None:
        """See `Sink.close`."""
        for sink in self._sinks:
            try:
                sink.close(failed=failed)
            except Exception as error:
                self._report(sink, error)

    def _report(self, sink: Sink, error: Exception) -> None:
        name = type(sink).__name__
        if name not in self._failed:
            self._failed.add(name)
            log.warning("%s takes no figures, the run goes on: %s", name, error)


class TensorBoardSink:
    """`tensorboard/` of the run folder."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary import Writer

        self._board = Writer(str(folder))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """On disk when it returns."""
        for key, value in values.items():
            self._board.add_scalar(f"{stage}/{key}", value, step)
        self._board.flush()

    def close(self, *, failed: bool = False) -> None:
        """Ends the file."""
        self._board.close()


class RaySink:
    """`rl_ft.series` through `ray.util.metrics`; needs a Ray session, which the sink must not
    outlive."""

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        self._run = run
        self._metrics: dict[str, Any] = {}
        for series in SERIES:
            kind = {"gauge": metrics.Gauge, "counter": metrics.Counter}.get(series.kind)
            tags = {"description": series.about, "tag_keys": series.labels}
            self._metrics[series.name] = (
                kind(series.name, **tags)
                if kind
                else metrics.Histogram(series.name, boundaries=STEP_BOUNDS_S, **tags)
            )
        self._latest: dict[tuple[str, tuple[str, ...]], tuple[float, dict[str, str]]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._refresher = threading.Thread(target=self._refresh, name="ray-metrics", daemon=True)
        self._refresher.start()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Gauges keep these values until the next step."""
        kind, _, start = stage.partition("/")
        values = {**values, "progress/step": float(step)}
        for series in SERIES:
            for key, of in series.of.items():
                if key not in values:
                    continue
                tags = {"stage": kind, "start": start, "run": self._run}
                if series.label is not None:
                    tags[series.label] = of
                self._record(series.kind, series.name, values[key], tags)

    def close(self, *, failed: bool = False) -> None:
        """Gauges vanish within half a minute; counters stay."""
        self._ended.set()
        self._refresher.join()

    def _record(self, kind: str, name: str, value: float, tags: dict[str, str]) -> None:
        metric = self._metrics[name]
        if kind == "histogram":
            metric.observe(value, tags)
        elif kind == "counter":
            if value > 0:
                metric.inc(value, tags)
        else:
            with self._lock:
                self._latest[name, tuple(tags.values())] = (value, tags)
            metric.set(value, tags)

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_S):
            with self._lock:
                latest = list(self._latest.items())
            for (name, _), (value, tags) in latest:
                self._metrics[name].set(value, tags)


class MlflowSink:
    """One MLflow run per run folder, in the experiment `rl-ft`; a resumed run goes on in it."""

    def __init__(self, uri: str, root: Path, config: Config) -> None:
        # Before the import: MLflow refuses folders without it.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        _installed("mlflow", "monitor.mlflow")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        note = root / "mlflow.json"
        try:
            self._client = MlflowClient(tracking_uri=uri)
            known = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
            if known.get("uri") == uri:
                self._run = known["run_id"]
                self._client.update_run(self._run, status="RUNNING")
            else:
                self._run = self._create(root, config)
                note.write_text(json.dumps({"uri": uri, "run_id": self._run}) + "\n", "utf-8")
        except MlflowException as error:
            raise UserError(
                f"monitor.mlflow is {uri}, where no run can be kept: "
                f"{str(error).splitlines()[0]}; expected the URI of a server that answers, or a "
                "folder; or leave it out"
            ) from error
        self._under_way: list[Any] = []

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Handed over; another thread sends it. Raises what an earlier one failed with."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        batch = [
            Metric(f"{stage}/{_FOREIGN.sub('.', key)}", value, now_ms, step)
            for key, value in values.items()
        ]
        self._under_way.append(self._client.log_batch(self._run, metrics=batch, synchronous=False))
        if len(self._under_way) > MAX_UNDER_WAY:
            self._under_way.pop(0).wait()

    def close(self, *, failed: bool = False) -> None:
        """Waits for what is under way."""
        try:
            for future in self._under_way:
                future.wait()
        finally:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _create(self, root: Path, config: Config) -> str:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        run = self._client.create_run(experiment, run_name=root.name)
        params = [Param(key, str(value)[:500]) for key, value in _settings(config).items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(run.info.run_id, params=params[first : first + 100])
        return run.info.run_id


class WandbSink:
    """One run of Weights & Biases per run folder; a resumed run goes on in it."""

    def __init__(self, project: str, root: Path, config: Config) -> None:
        wandb = _installed("wandb", "monitor.wandb")
        root.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                id=run_id(root),
                name=root.name,
                dir=str(root),
                # Offline every stage leaves a part of its own; `wandb sync` joins them by the id.
                resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
                config=_settings(config),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise UserError(
                f"monitor.wandb is {project}, but Weights & Biases refuses: {error}; expected a "
                "login (`wandb login`) or WANDB_MODE=offline"
            ) from error
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Handed over; a process of W&B's sends it. Every stage counts its own steps."""
        clock = f"{stage}/step"
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(clock)
            self._run.define_metric(f"{stage}/*", step_metric=clock)
        self._run.log({**{f"{stage}/{key}": v for key, v in values.items()}, clock: step})

    def close(self, *, failed: bool = False) -> None:
        """Waits for what is under way."""
        self._run.finish(exit_code=int(failed))


@contextmanager
def open_sinks(config: Config, root: Path) -> Iterator[Sinks]:
    """Whoever else is to watch the run in folder `root`, for a stage; in a Ray session.

    Raises:
        UserError: what was asked for is not installed, or refuses.
    """
    sinks = Sinks()
    failed = True
    try:
        if config.exports_ray_metrics:
            sinks.add(RaySink(root.name))
        if config.monitor.mlflow is not None:
            sinks.add(MlflowSink(config.monitor.mlflow, root, config))
        if config.monitor.wandb is not None:
            sinks.add(WandbSink(config.monitor.wandb, root, config))
        yield sinks
        failed = False
    finally:
        sinks.close(failed=failed)


def _installed(module: str, key: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{key} is set, but the package {module} cannot be imported ({error}): install it by "
            f"`scripts/setup.sh cpu,resco,{module}` (gpu instead of cpu on a GPU machine), or "
            f"leave {key} out"
        ) from error


def _settings(config: Config) -> dict[str, Any]:
    """Every leaf of the configuration by its dotted name."""
    return flatten(config.model_dump(mode="json"))

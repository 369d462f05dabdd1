"""The Ray session of a run: a private local cluster, or one that is named."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from rl_ft.config import Config
from rl_ft.progress import Progress

Result = TypeVar("Result")

OBJECT_STORE_BYTES = 2**30
"""Of a private cluster: groups and weights of a laptop's run are far smaller."""


def gpu_share(num_holders: int) -> float:
    """GPUs for each of so many that work at once, in the running session: a whole one where there
    are enough, else an equal part of one; 0 without any."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus == 0:
        return 0.0
    return 1.0 if gpus >= num_holders else 1.0 / num_holders


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connected to Ray inside; a session that is already open is used and left open."""
    # Under `uv run`, Ray would start its workers through uv, in another environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    settings = config.ray
    if settings.address is None:
        # Nobody collects a private cluster's metrics, and the thread that exports them can crash
        # its process (Ray 2.60: a segmentation fault in TemporalMetricStorage::buildMetrics).
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
        with Progress("starting Ray"):
            ray.init(
                address="local",
                num_cpus=settings.num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                configure_logging=False,
            )
    else:
        ray.init(address=settings.address, log_to_driver=False, configure_logging=False)
    try:
        yield
    finally:
        ray.shutdown()


def in_thread(work: Callable[[], Result], name: str) -> Future[Result]:
    """Do what blocks, such as a Ray Train fit, beside the main thread.

    In the main thread Ray Train takes Ctrl-C for itself, for good, and ends with status 0.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future

"""The Ray session of a run: a private local cluster, or one that is named."""

from __future__ import annotations

import math
import os
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.interrupt import late_interrupt
from rl_ft.progress import Progress

if TYPE_CHECKING:
    from ray.util.scheduling_strategies import (
        NodeAffinitySchedulingStrategy,
        PlacementGroupSchedulingStrategy,
    )

Result = TypeVar("Result")

RESERVE_S = 300.0
"""How long a cluster may take to make room; a launcher may be starting nodes."""

ROOM_ATTEMPTS = 10
"""How often Ray Train looks for room for its workers, a minute each; by default for ever."""

OBJECT_STORE_BYTES = 2**30
"""Of a private cluster: groups and weights of a laptop's run are far smaller."""


def gpu_share(num_holders: int) -> float:
    """GPUs for each of so many that work at once, in the running session: a whole one where there
    are enough, else the part of one that as few as possible share; 0 without any."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus == 0:
        return 0.0
    return 1.0 / math.ceil(num_holders / gpus)


def engine_gpus(num_engines: int, size: int, *, num_others: int = 0) -> float:
    """GPUs for each of so many engines of `size` processes, while so many others want one each.

    Raises:
        UserError: there are GPUs, but too few for engines of several processes.
    """
    num_holders = num_engines * size + num_others
    share = gpu_share(num_holders)
    if size > 1 and 0 < share < 1:
        raise UserError(
            f"generation.tensor_parallel_size is {size}, whose processes share no GPU: expected "
            f"{num_holders} GPUs (engines: {num_engines}, others: {num_others}), but the cluster "
            "has fewer: lower it or ray.num_generators, or add nodes"
        )
    return size * share


def require_whole_gpus(num_holders: int) -> None:
    """What NCCL wants: it connects no two processes on one GPU.

    Raises:
        UserError: the running session has fewer.
    """
    if gpu_share(num_holders) < 1:
        raise UserError(
            "ray.weight_transport=nccl: expected a GPU for every learner and every process of an "
            f"engine, {num_holders} in all, but the cluster has fewer; object_store lets them share"
        )


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connected to Ray inside; a session that is already open is used and left open.

    In a Ray job, and without `ray.address`, that is the cluster that runs the job.
    """
    # Under `uv run`, Ray would start its workers through uv, in another environment.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    settings = config.ray
    if not config.joins_a_cluster:
        if not config.exports_ray_metrics:
            # The thread that exports them can crash its process (Ray 2.60: a segmentation fault in
            # TemporalMetricStorage::buildMetrics), and hardly anybody collects a private cluster's.
            os.environ.setdefault("RAY_enable_metrics_collection", "0")
        # A process for every training that looks out for nodes that a cloud is about to take away.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        with Progress("starting Ray"), late_interrupt():
            ray.init(
                address="local",
                num_cpus=settings.num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                configure_logging=False,
            )
    else:
        ray.init(address=settings.address or "auto", log_to_driver=False, configure_logging=False)
    try:
        yield
    finally:
        ray.shutdown()


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """For what must be where its driver is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Places:
    """Room for actors, reserved together: on few nodes (PACK) or on many (SPREAD).

    Example:
        places = Places([{"CPU": 0.5}] * 4, strategy="SPREAD")
        Worker.options(num_cpus=0.5, scheduling_strategy=places[0]).remote()

    `holder` is the folder of whose run they are.

    Raises:
        UserError: the cluster did not have as much within `RESERVE_S`.
    """

    def __init__(
        self, bundles: Sequence[dict[str, float]], *, strategy: str, holder: str = ""
    ) -> None:
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        name = f"{holder}#{uuid.uuid4().hex}"
        self._group = placement_group(list(bundles), strategy=strategy, name=name)
        self._num_taken = len(bundles)
        if not self._group.wait(RESERVE_S):
            remove_placement_group(self._group)
            wanted = Counter[str]()
            for bundle in bundles:
                wanted.update(bundle)
            free = ray.available_resources()
            named = ", ".join(
                f"{amount:g} {kind} (free: {free.get(kind, 0):g})"
                for kind, amount in wanted.items()
            )
            raise UserError(
                f"the cluster had no room for {named} within {RESERVE_S:g} s: wait for other jobs, "
                "add nodes, or lower ray.num_world_actors, ray.num_generators and cpus_per_*"
            )

    def __getitem__(self, index: int) -> PlacementGroupSchedulingStrategy:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=index
        )

    def release(self) -> None:
        """One of the places is needed no more; with the last one the room is given back."""
        from ray.util.placement_group import remove_placement_group

        self._num_taken -= 1
        if not self._num_taken:
            remove_placement_group(self._group)


def take_back(folder: str) -> None:
    """Give the room back that runs in a folder hold: they were killed, and Ray keeps it for them as
    long as the session lives."""
    from ray.util import get_placement_group, placement_group_table, remove_placement_group

    for group in placement_group_table().values():
        if group["name"].startswith(folder) and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))


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

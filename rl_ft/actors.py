"""The Ray actors: plain classes, given resources on the last lines.

World actors drive simulations, generators own a vLLM engine each, the buffer stands between
them and the learner. The adapters at the top make generators look like what `rl_ft.rollout` and
`rl_ft.closed_loop` ask for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from envs import dialect
from envs.scenario import expand
from envs.types import Decision
from rl_ft.admission import Admission
from rl_ft.asking import Render
from rl_ft.buffer import GroupBuffer
from rl_ft.cluster import Places, engine_gpus, on_this_node, require_whole_gpus
from rl_ft.config import Config
from rl_ft.crew import Post, RemoteWorlds, Samplers
from rl_ft.dataset import read_states
from rl_ft.link import transfer_limit_s
from rl_ft.lookup import LookupPool
from rl_ft.meeting import Offer
from rl_ft.monitor import GIB, LoadSampler
from rl_ft.series import ENGINE, WORLDS
from rl_ft.sinks import REFRESH_S
from rl_ft.types import Completion, RolloutGroup, WeightsRef
from rl_ft.worlds import WorldPool, shares

log = logging.getLogger(__name__)

SEEDS_APART = 1_000_003


class RemoteGenerate:
    """`rl_ft.rollout.Generate` over the generators.

    With `after`, such as weights that are on their way, nothing is sampled before that is done;
    `waited_s` is how long each call waited for it. `busy_s` is how long at least one call was with
    the sampler.
    """

    def __init__(
        self, samplers: Samplers, config: Config, *, after: Awaitable[object] | None = None
    ) -> None:
        self._samplers = samplers
        self.waited_s: list[float] = []
        self.busy_s = 0.0
        self._num_under_way = 0
        self._busy_since = 0.0
        self._after = after
        self._max_tokens = config.grpo.max_completion_length
        self._seeded = config.generation.reproducible

    async def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        seed: int,
        greedy: Sequence[Sequence[int]] = (),
    ) -> list[list[Completion]]:
        """Sample; the seed counts only where the configuration asks for identical runs."""
        if self._after is not None:
            started = time.perf_counter()
            await self._after
            self.waited_s.append(time.perf_counter() - started)
        with self._under_way():
            return await self._samplers.generate(
                [tuple(prompt) for prompt in prompts],
                num_samples=num_samples,
                max_tokens=self._max_tokens,
                seed=seed if self._seeded else None,
                greedy=[tuple(prompt) for prompt in greedy],
            )

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        if not self._num_under_way:
            self._busy_since = time.perf_counter()
        self._num_under_way += 1
        try:
            yield
        finally:
            self._num_under_way -= 1
            if not self._num_under_way:
                self.busy_s += time.perf_counter() - self._busy_since


class RemoteAsk:
    """`rl_ft.closed_loop.Ask` over the generators: the most likely answers, each generator's share
    in one batch."""

    def __init__(self, samplers: Samplers, render: Render, config: Config) -> None:
        self._samplers, self._render = samplers, render
        self._instructions = config.model.instructions
        self._max_tokens = config.grpo.max_completion_length

    def __call__(self, decisions: Sequence[Decision]) -> list[Completion]:
        """Waits for the answers, in a thread without an event loop."""
        if not decisions:
            return []
        prompts = [
            self._render.prompt_ids(dialect.messages(d, instructions=self._instructions))
            for d in decisions
        ]
        size = math.ceil(len(prompts) / len(self._samplers.posts))
        shares = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return asyncio.run(self._answers(shares))

    async def _answers(self, shares: Sequence[Sequence[Sequence[int]]]) -> list[Completion]:
        greedy = {"num_samples": 1, "temperature": 0.0, "max_tokens": self._max_tokens}
        parts = await asyncio.gather(*(self._samplers.generate(s, **greedy) for s in shares))
        return [completions[0] for part in parts for completions in part]


class WorldService(WorldPool):
    """Worlds behind an actor, which says how busy it and its simulations are."""

    def __init__(self, config: Config, scenarios: Sequence[str], **settings: Any) -> None:
        super().__init__(config, scenarios, **settings)
        if config.exports_ray_metrics:
            threading.Thread(target=_export_load, name="load", daemon=True).start()


class GeneratorService:
    """The sampler behind an actor: it fetches published weights by itself, or is sent them."""

    def __init__(self, model_path: str, config: Config, seed: int, seat: int = 0) -> None:
        from rl_ft.generation import Generator

        self._seat, self._name = seat, uuid.uuid4().hex
        self._limit_s = transfer_limit_s(config)
        self._group: tuple[object, ...] = ()
        self._generator = Generator(model_path, config=config, seed=seed)
        if config.generation.tensor_parallel_size > 1:
            threading.Thread(target=self._end_with_the_engine, name="death", daemon=True).start()
        if config.monitor.engine and config.exports_ray_metrics:
            work = partial(_export_engine, self._generator.engine_figures)
            threading.Thread(target=work, name="engine", daemon=True).start()

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[Completion]]:
        """See `Generator.generate`."""
        return self._generator.generate(prompts, **settings)

    def load(self, ref: WeightsRef) -> bool:
        """Answer with a published version from now on; whether it was sent rather than fetched."""
        from rl_ft.weights import fetch

        if ref.offer is not None and self._receive(ref.offer, ref.version):
            return True
        self._generator.load_weights(fetch(ref, ray.get), ref.version)
        return False

    def _receive(self, offer: Offer, version: int) -> bool:
        """Whether the learner itself has sent the version, to this engine and all others."""
        limit_s, name = self._limit_s, self._name
        try:
            place = ray.get(offer.meeting.join.remote(version, self._seat, name, limit_s))
        except RayActorError:  # the learner is gone, and with it what it owned
            return False
        if place is None:
            return False
        group = (offer.group, *place.members)
        # A broadcast by NCCL need not notice that another one has died.
        watchdog = threading.Timer(limit_s, os._exit, (1,))
        watchdog.daemon = True
        watchdog.start()
        try:
            came = self._generator.receive_weights(
                offer, place, version, seat=self._seat, anew=group != self._group
            )
        except Exception:
            log.exception("version %d did not come, and this engine is lost", version)
            os._exit(1)
        finally:
            watchdog.cancel()
        # By another name the sender knows that this one is not in the group any more.
        self._group, self._name = (group, name) if came else ((), uuid.uuid4().hex)
        return came

    def load_folder(self, model_path: str) -> None:
        """Answer with the weights of a model folder of the same architecture, as version 0."""
        from rl_ft.weights import read_folder

        self._generator.load_weights(read_folder(model_path), 0)

    def check_parity(
        self, model_path: str, prompts: Sequence[Sequence[int]], max_tokens: int, bound: float
    ) -> Any:
        """The gate before training: a non-zero change must arrive, and the original come back."""
        from rl_ft import parity
        from rl_ft.weights import read_folder

        return parity.check(
            self._generator,
            read_folder(model_path),
            model_path,
            prompts,
            max_tokens=max_tokens,
            bound=bound,
        )

    def diagnose(
        self,
        model_path: str,
        new: WeightsRef,
        old: WeightsRef,
        groups: Sequence[RolloutGroup],
        bound: float,
    ) -> str:
        """Why what was sampled after loading `new` over `old` does not fit the trainer."""
        from rl_ft import parity
        from rl_ft.weights import fetch

        if self._generator.version != new.version:
            self.load(new)
        return parity.diagnose(
            self._generator,
            model_path,
            new=fetch(new, ray.get),
            old=fetch(old, ray.get),
            sampled=[(group.prompt_ids, group.completions[0]) for group in groups],
            bound=bound,
        )

    def pid(self) -> int:
        """Process id."""
        return os.getpid()

    def _end_with_the_engine(self) -> None:
        # An engine that lost a process fails every call; what dies is replaced (`rl_ft.crew`).
        # At once: in some seconds vLLM would fail the call that waits, which ends the run.
        self._generator.await_death()
        os._exit(1)


class BufferService(GroupBuffer):
    """The buffer behind an actor; it owns the published tensors, which outlive the learner."""

    async def keep(self, ref: WeightsRef) -> None:
        """Put the tensors that came with a reference into the object store, and publish it."""
        await self.publish(replace(ref, payload=ray.put(ref.payload)))


def start_actors(
    config: Config, model_path: str, data: Path
) -> tuple[list[RemoteWorlds], Samplers]:
    """World actors and generators, with the resources the configuration declares."""
    if config.ray.weight_transport == "nccl":
        require_whole_gpus(config.num_gpu_holders)
    generators = start_generators(config, model_path, num_others=config.ray.num_learners)
    return start_worlds(config, data), generators


def start_buffer(admission: Admission) -> Any:
    """On the driver's own node: what it holds must not be lost with another one."""
    return BufferActor.options(scheduling_strategy=on_this_node()).remote(admission)


def start_generators(config: Config, model_path: str, *, num_others: int = 0) -> Samplers:
    """As many as `ray.num_generators`; so many others want a GPU each meanwhile."""
    settings, generation = config.ray, config.generation
    num, size = settings.num_generators, generation.tensor_parallel_size
    num_cpus = config.cpus_per_engine
    num_gpus = engine_gpus(num, size, num_others=num_others)
    if 0 < num_gpus < 1:
        # Of a GPU that it shares, an engine takes its part of the memory.
        share = generation.gpu_memory_utilization * num_gpus
        generation = generation.model_copy(update={"gpu_memory_utilization": share})
        config = config.model_copy(update={"generation": generation})
    bundle = {"CPU": num_cpus, **({"GPU": num_gpus} if num_gpus else {})}
    places = Places([bundle] * num, strategy=settings.placement_strategy, holder=model_path)
    options = [
        GeneratorActor.options(num_cpus=num_cpus, num_gpus=num_gpus, scheduling_strategy=places[i])
        for i in range(num)
    ]
    starts = [
        lambda _, seat=seat: options[seat].remote(model_path, config, config.seed, seat)
        for seat in range(num)
    ]
    return Samplers(
        starts,
        max_failures=settings.max_failures,
        call_timeout_s=generation.call_timeout_s,
        release=places.release,
    )


def start_worlds(config: Config, data: Path) -> list[RemoteWorlds]:
    """World actors that share `rollout.num_worlds` simulations of the training scenarios; with
    `rollout.offline` actors that share the decision states of the dataset in `data`."""
    settings = config.ray
    if config.rollout.offline:
        states = sorted(read_states(data), key=lambda state: state.id)
        num = min(settings.num_world_actors, config.rollout.num_worlds, len(states))
        kind, works = LookupActor, [(states[i::num],) for i in range(num)]
    else:
        scenarios = expand(config.scenarios.train)
        kind, works = WorldActor, [(config, scenarios)] * settings.num_world_actors
    bundle = {"CPU": settings.cpus_per_world_actor}
    bundles = [bundle] * len(works)
    places = Places(bundles, strategy=settings.placement_strategy, holder=str(data))
    num_worlds = shares(config.rollout.num_worlds, len(works))

    def team(i: int) -> RemoteWorlds:
        options = kind.options(
            num_cpus=settings.cpus_per_world_actor, scheduling_strategy=places[i]
        )

        def start(num_before: int) -> Any:
            # A successor that began with the same seed would drive the same episodes again.
            seed = (config.seed + num_before * SEEDS_APART) * 1_000 + i
            return options.remote(*works[i], seed=seed, num_worlds=num_worlds[i])

        return RemoteWorlds(
            Post(f"world actor {i}", start, max_failures=settings.max_failures),
            num_worlds=num_worlds[i],
            call_timeout_s=config.rollout.call_timeout_s,
            release=places.release,
        )

    return [team(i) for i in range(len(works))]


def _export_load() -> None:
    """Keep telling Ray's metrics how busy this process and what it started are."""
    from ray.util.metrics import Gauge

    cores, memory = (Gauge(name, description=about) for name, about in WORLDS.items())
    sampler = LoadSampler()
    while True:
        time.sleep(REFRESH_S)
        load = sampler.sample()
        cores.set(load["system/processes_cores"])
        memory.set(load["system/processes_memory_gib"] * GIB)


def _export_engine(figures: Callable[[], Mapping[str, float]]) -> None:
    """Keep telling Ray's metrics what vLLM counts."""
    from ray.util.metrics import Counter, Gauge

    kinds = {"counter": Counter, "gauge": Gauge}
    metrics = {key: kinds[s.kind](s.name, description=s.about) for key, s in ENGINE.items()}
    before = dict.fromkeys(ENGINE, 0.0)
    while True:
        time.sleep(REFRESH_S)
        for key, value in figures().items():
            if ENGINE[key].kind == "gauge":
                metrics[key].set(value)
            elif value > before[key]:
                metrics[key].inc(value - before[key])
                before[key] = value


WorldActor = ray.remote(WorldService)
LookupActor = ray.remote(LookupPool)
GeneratorActor = ray.remote(GeneratorService)
BufferActor = ray.remote(num_cpus=0)(BufferService)

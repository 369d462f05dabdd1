"""The Ray actors: plain classes, given resources on the last lines.

World actors drive simulations, the generator owns the vLLM engine, the buffer stands between
them and the learner. The adapters at the top make an actor look like what `rl_ft.rollout` asks
for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from envs import dialect
from envs.scenario import expand
from envs.types import Decision
from rl_ft.asking import Render
from rl_ft.buffer import GroupBuffer
from rl_ft.cluster import gpu_share
from rl_ft.config import Config
from rl_ft.dataset import read_states
from rl_ft.lookup import LookupPool
from rl_ft.parity import MismatchGate, ParityError
from rl_ft.types import Completion, RolloutGroup, WeightsRef
from rl_ft.worlds import Order, State, Tried, WorldPool, shares

LEARNER_AND_GENERATOR = 2
"""What works on GPUs while GRPO trains."""


class RemoteWorlds:
    """`rl_ft.rollout.Worlds` over a world actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def states(self) -> list[State]:
        """See `WorldPool.states`."""
        return await self.actor.states.remote()

    async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
        """See `WorldPool.settle`."""
        return await self.actor.settle.remote(list(orders))


class RemoteGenerate:
    """`rl_ft.rollout.Generate` over the generator actor.

    With `after`, such as weights that are on their way, nothing is sampled before that is done;
    `waited_s` is how long each call waited for it.
    """

    def __init__(
        self, actor: Any, config: Config, *, after: Awaitable[object] | None = None
    ) -> None:
        self.actor = actor
        self.waited_s: list[float] = []
        self._after = after
        self._max_tokens = config.grpo.max_completion_length
        self._temperature = config.grpo.temperature
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
        return await self.actor.generate.remote(
            [tuple(prompt) for prompt in prompts],
            num_samples=num_samples,
            temperature=self._temperature,
            max_tokens=self._max_tokens,
            seed=seed if self._seeded else None,
            greedy=[tuple(prompt) for prompt in greedy],
        )


class RemoteAsk:
    """`rl_ft.closed_loop.Ask` over the generator actor: its most likely answers, in one batch."""

    def __init__(self, actor: Any, render: Render, config: Config) -> None:
        self._actor, self._render = actor, render
        self._instructions = config.model.instructions
        self._max_tokens = config.grpo.max_completion_length

    def __call__(self, decisions: Sequence[Decision]) -> list[Completion]:
        """Waits for the answers."""
        if not decisions:
            return []
        prompts = [
            self._render.prompt_ids(dialect.messages(d, instructions=self._instructions))
            for d in decisions
        ]
        answers = self._actor.generate.remote(
            prompts, num_samples=1, temperature=0.0, max_tokens=self._max_tokens
        )
        return [completions[0] for completions in ray.get(answers)]


class GeneratorService:
    """The sampler behind an actor: it fetches published weights by itself."""

    def __init__(self, model_path: str, config: Config, seed: int) -> None:
        from rl_ft.generation import Generator

        self._generator = Generator(model_path, config=config, seed=seed)

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[Completion]]:
        """See `Generator.generate`."""
        return self._generator.generate(prompts, **settings)

    def load(self, ref: WeightsRef) -> int:
        """Answer with a published version from now on; returns it."""
        from rl_ft.weights import fetch

        self._generator.load_weights(fetch(ref, ray.get), ref.version)
        return self._generator.version

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


class BufferService(GroupBuffer):
    """The buffer behind an actor; it owns the published tensors, which outlive the learner."""

    async def keep(self, ref: WeightsRef) -> None:
        """Put the tensors that came with a reference into the object store, and publish it."""
        await self.publish(replace(ref, payload=ray.put(ref.payload)))


class LearnerLink:
    """What the learner is given: picklable callables around the buffer.

    `fetch` waits for groups, but never for a driver that is gone.
    """

    WAIT_S = 3600.0
    """Before a step's groups there may be a check in the closed loop."""

    def __init__(self, buffer: Any, gate: MismatchGate) -> None:
        self._buffer = buffer
        self._gate = gate

    def check(self, step: int, mismatch: float, staleness: int) -> None:
        """The gate before every update; the loop finds the cause of a breach."""
        try:
            self._gate.observe(step, mismatch, staleness)
        except ParityError as breach:
            ray.get(self._buffer.refuse.remote(step, breach.detail))
            raise

    def fetch(self, step: int) -> tuple[RolloutGroup, ...]:
        """The groups of an optimiser step.

        Raises:
            TrainingEnded: there is to be no such step.
        """
        groups = ray.get(self._buffer.get_groups.remote(step, self.WAIT_S))
        if groups is None:
            raise TimeoutError(f"no groups for step {step} within {self.WAIT_S:g} s")
        return groups

    def publish(self, state_dict: dict[str, Any], version: int) -> None:
        """A new version of the weights."""
        from rl_ft.weights import publish

        ray.get(self._buffer.keep.remote(publish(state_dict, version, lambda arrays: arrays)))

    def report(self, step: int, values: dict[str, float]) -> None:
        """Metrics of a finished step."""
        ray.get(self._buffer.report.remote(step, values))

    def await_record(self, step: int) -> None:
        """Until the metrics of a finished step are on disk."""
        if not ray.get(self._buffer.recorded.remote(step, self.WAIT_S)):
            raise TimeoutError(f"step {step} was not recorded within {self.WAIT_S:g} s")


def start_actors(config: Config, model_path: str, data: Path) -> tuple[list[Any], Any]:
    """World actors and the generator, with the resources the configuration declares."""
    worlds = start_worlds(config, data)
    return worlds, start_generator(config, model_path, num_gpus=gpu_share(LEARNER_AND_GENERATOR))


def start_generator(config: Config, model_path: str, *, num_gpus: float) -> Any:
    """The generator; of a GPU that it shares it uses its part of the memory."""
    if 0 < num_gpus < 1:
        share = config.generation.gpu_memory_utilization * num_gpus
        generation = config.generation.model_copy(update={"gpu_memory_utilization": share})
        config = config.model_copy(update={"generation": generation})
    options = GeneratorActor.options(num_cpus=config.ray.cpus_per_generator, num_gpus=num_gpus)
    return options.remote(model_path, config, config.seed)


def start_worlds(config: Config, data: Path) -> list[Any]:
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
    num_worlds = shares(config.rollout.num_worlds, len(works))
    return [
        kind.options(num_cpus=settings.cpus_per_world_actor).remote(
            *work, seed=config.seed * 1_000 + i, num_worlds=share
        )
        for i, (work, share) in enumerate(zip(works, num_worlds, strict=True))
    ]


WorldActor = ray.remote(WorldPool)
LookupActor = ray.remote(LookupPool)
GeneratorActor = ray.remote(GeneratorService)
BufferActor = ray.remote(num_cpus=0)(BufferService)

"""Asking the generator actor: never before the weights that are on their way have arrived."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from decision_case import decision, lane, observation

from envs.dialect import observation_text
from rl_ft import actors
from rl_ft.actors import RemoteAsk, RemoteGenerate
from rl_ft.config import Config
from rl_ft.crew import Samplers
from rl_ft.weights import WeightsError

LATE_S = 0.05


class Handle:
    """Where Ray's actor class would be: notes what it was started with."""

    def options(self, **resources):
        self.resources = resources
        return self

    def remote(self, model_path, config, seed, seat):
        self.memory = config.generation.gpu_memory_utilization
        return self


class Room:
    """Where a reservation would be: notes what was wanted."""

    def __init__(self, bundles, *, strategy, holder):
        self.wanted = bundles

    def __getitem__(self, index):
        return index

    def release(self):
        pass


@pytest.mark.parametrize(("gpus", "share", "memory"), [(0, 0.0, 0.8), (1, 0.5, 0.4), (2, 1.0, 0.8)])
def test_a_generator_takes_its_part_of_a_gpu_and_of_its_memory(monkeypatch, gpus, share, memory):
    monkeypatch.setattr(actors, "GeneratorActor", handle := Handle())
    monkeypatch.setattr(actors, "Places", Room)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus})
    config = Config.model_validate({"generation": {"gpu_memory_utilization": 0.8}})
    actors.start_generators(config, "model", num_others=1)
    assert handle.resources["num_gpus"] == share
    assert handle.memory == pytest.approx(memory)


class Generator:
    """Where an actor's handle would be: notes when it was asked."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.generate = SimpleNamespace(remote=self._generate)

    async def _generate(self, prompts, **settings):
        self.events.append("asked")
        return [[] for _ in prompts]

    async def load(self) -> None:
        await asyncio.sleep(LATE_S)
        self.events.append("loaded")

    async def fail(self) -> None:
        await asyncio.sleep(LATE_S)
        raise WeightsError("arrived altered")


async def ask(generator: Generator, arrival) -> RemoteGenerate:
    samplers = Samplers([lambda _: generator], max_failures=0, call_timeout_s=10)
    remote = RemoteGenerate(samplers, Config(), after=asyncio.ensure_future(arrival))
    await asyncio.gather(*(remote([(1,)], num_samples=2, seed=i) for i in range(2)))
    return remote


def test_what_samples_waits_for_the_weights_and_says_how_long():
    generator = Generator()
    remote = asyncio.run(ask(generator, generator.load()))
    assert generator.events == ["loaded", "asked", "asked"]
    assert len(remote.waited_s) == 2
    assert min(remote.waited_s) >= 0.9 * LATE_S


def test_nothing_is_sampled_with_weights_that_did_not_arrive():
    generator = Generator()
    with pytest.raises(WeightsError, match="arrived altered"):
        asyncio.run(ask(generator, generator.fail()))
    assert generator.events == []


class Echo:
    """Answers with what it was asked, and remembers how much that was."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.generate = SimpleNamespace(remote=self._generate)

    async def _generate(self, prompts, **settings):
        self.asked.append(len(prompts))
        return [[prompt] for prompt in prompts]


@pytest.mark.parametrize(("num", "shares"), [(5, [3, 2]), (1, [1])])
def test_several_generators_share_the_questions_and_answers_keep_their_order(num, shares):
    echoes = [Echo(), Echo()]
    starts = [lambda _, echo=echo: echo for echo in echoes]
    samplers = Samplers(starts, max_failures=0, call_timeout_s=10)
    render = SimpleNamespace(prompt_ids=lambda messages: messages[-1]["content"])
    decisions = [decision(observation(lane(queue=i))) for i in range(num)]
    answers = RemoteAsk(samplers, render, Config())(decisions)
    assert answers == [observation_text(each) for each in decisions]
    assert [size for echo in echoes for size in echo.asked] == shares

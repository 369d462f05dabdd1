"""What more world actors and more nodes give, and what 1,000 worlds and 64 samplers would send.

First: groups per second for 1 to 8 world actors that share as many simulations, on 1 to 3 nodes of
a cluster on this machine, in turns with the same pools driven by threads without Ray. Answers come
from a list, so no sampler and no learner compete for the cores. Then, from the sizes of the
messages of that very run and from what it cost the driver to handle a group: bytes and messages per
step of a large run, and which part is full first.

    python scripts/bench/scale.py
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from envs.scenario import expand
from rl_ft.asking import Render
from rl_ft.config import Config
from rl_ft.recall import Recall
from rl_ft.rollout import Worlds, collect_groups
from rl_ft.types import Completion
from rl_ft.worlds import Order, State, Tried, WorldPool, shares

ANSWERS = ('{"phase": "A"}', '{"phase": "B"}', '{"phase": "C"}', '{"phase": "D"}')
NODES_ACTORS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (3, 3), (3, 6))
LARGE_WORLDS, LARGE_SAMPLERS, LARGE_PARAMETERS = 1_000, 64, 4_000_000_000
LARGE_STEP_S = 20.0
"""What a step of the large run may take: with fewer samplers busy it would not be worth 64."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What one way of driving the same simulations achieved."""

    groups: int
    wall_s: float
    driver_s: float
    """Of the driver's thread: render, parse, score. Ray's own threads come on top."""

    @property
    def per_s(self) -> float:
        return self.groups / self.wall_s


class Listed:
    """A sampler that answers at once, from a list."""

    def __init__(self, render: Render) -> None:
        self._render = render

    async def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        seed: int,
        greedy: Sequence[Sequence[int]] = (),
    ) -> list[list[Completion]]:
        rng = random.Random(seed)
        counts = [num_samples] * len(prompts) + [1] * len(greedy)
        return [[self._say(rng) for _ in range(count)] for count in counts]

    def _say(self, rng: random.Random) -> Completion:
        text = rng.choice(ANSWERS)
        ids = self._render.answer_ids(text)
        return Completion(
            token_ids=ids,
            logprobs=(-0.5,) * len(ids),
            text=text,
            finish_reason="stop",
            weights_version=0,
        )


class Local:
    """A pool in this process behind the calls of a remote one, in a thread of its own."""

    def __init__(self, pool: WorldPool, threads: ThreadPoolExecutor) -> None:
        self._pool, self._threads = pool, threads

    async def states(self) -> list[State]:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._pool.states)

    async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._pool.settle, orders)


class Way:
    """One way to drive the simulations, round by round."""

    def __init__(self, teams: Sequence[Worlds], render: Render, config: Config) -> None:
        self._teams, self._render, self._config = teams, render, config
        self._recalls = [Recall(seed=i, num_waiting=0) for i in range(len(teams))]
        self.rates: list[Rate] = []

    async def collect(self, number: int) -> None:
        """Groups of all teams at once, and what they took."""
        quotas = shares(self._config.rollout.num_groups, len(self._teams))
        generate = Listed(self._render)
        started, driver_s = time.perf_counter(), time.thread_time()
        parts = await asyncio.gather(
            *(
                collect_groups(
                    team,
                    generate,
                    self._render,
                    self._config,
                    quota=quota,
                    seed=number * 1_000 + i * 100,
                    recall=recall,
                )
                for i, (team, quota, recall) in enumerate(
                    zip(self._teams, quotas, self._recalls, strict=True)
                )
            )
        )
        self.rates.append(
            Rate(
                groups=sum(len(part.groups) for part in parts),
                wall_s=time.perf_counter() - started,
                driver_s=time.thread_time() - driver_s,
            )
        )


async def in_turns(ways: Sequence[Way], rounds: int) -> None:
    """The ways one after the other, in every round the other way round; the first warms up."""
    for number in range(rounds + 1):
        for way in ways[:: 1 if number % 2 else -1]:
            await way.collect(number)
    for way in ways:
        del way.rates[0]


@contextmanager
def nodes(num: int, num_cpus: int) -> Iterator[None]:
    """A cluster of so many nodes, each with its own raylet and object store, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": num_cpus, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=settings)
    try:
        for _ in range(num - 1):
            cluster.add_node(**settings)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def compare(
    config: Config, render: Render, rounds: int
) -> tuple[list[Rate], list[Rate], dict[str, float]]:
    """Rates by round over world actors and over the same pools in threads of this process, which is
    what the simulations alone allow; and the bytes of one message of each kind."""
    from rl_ft.actors import start_worlds

    num = config.ray.num_world_actors
    cities = expand(config.scenarios.train)
    with ExitStack() as stack:
        remote = start_worlds(config, Path())
        pools = [
            WorldPool(config, cities, seed=1_000 + i, num_worlds=part)
            for i, part in enumerate(shares(config.rollout.num_worlds, num))
        ]
        for opened in (*remote, *pools):
            stack.callback(opened.close)
        threads = stack.enter_context(ThreadPoolExecutor(num))
        ray = Way(remote, render, config)
        plain = Way([Local(pool, threads) for pool in pools], render, config)

        async def every() -> dict[str, float]:
            await in_turns((ray, plain), rounds)
            return await message_bytes(remote[0], render, config)

        return ray.rates, plain.rates, asyncio.run(every())


async def message_bytes(team: Worlds, render: Render, config: Config) -> dict[str, float]:
    """Mean bytes per instant as Ray serialises them: what travels between driver and others."""
    from ray import cloudpickle

    seen: dict[str, list[float]] = {}

    def note(kind: str, value: object, count: int) -> None:
        seen.setdefault(kind, []).append(len(cloudpickle.dumps(value)) / max(1, count))

    class Noted:
        async def states(self) -> list[State]:
            states = await team.states()
            note("state", states, len(states))
            return states

        async def settle(self, orders: Sequence[Order | None]) -> list[Tried | None]:
            note("order", orders, len(orders))
            tried = await team.settle(orders)
            note("outcome", tried, len(tried))
            return tried

    listed = Listed(render)

    async def generate(prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[Completion]]:
        note("prompt", (prompts, settings), len(prompts) + len(settings.get("greedy", ())))
        answers = await listed(prompts, **settings)
        note("answers", answers, len(answers))
        return answers

    found = await collect_groups(
        Noted(), generate, render, config, quota=16, seed=9, recall=Recall(seed=9, num_waiting=0)
    )
    note("group", found.groups, len(found.groups))
    return {kind: sum(values) / len(values) for kind, values in seen.items()}


def settings(num_actors: int, num_worlds: int, groups: int) -> Config:
    """The laptop recipe with so many actors, told once: every group is simulated."""
    return Config.model_validate(
        {
            "scenarios": {"train": ["generated:1-8"]},
            "rollout": {"num_worlds": num_worlds, "num_groups": groups, "tellings": 1},
            "ray": {
                "num_world_actors": num_actors,
                "cpus_per_world_actor": 0.25,
                "placement_strategy": "SPREAD",
                "num_cpus": 16,
            },
        }
    )


def large_run(sizes: dict[str, float], driver_s: float, console: Console) -> None:
    """Bytes and messages of a step in which every world has been asked once."""
    asked = LARGE_WORLDS
    weights = 2 * LARGE_PARAMETERS
    rows = [
        ("worlds -> driver: states", asked * sizes["state"], asked / 16),
        ("driver -> samplers: prompts", asked * sizes["prompt"], LARGE_SAMPLERS),
        ("samplers -> driver: answers", asked * sizes["answers"], LARGE_SAMPLERS),
        ("driver -> worlds: orders", asked * sizes["order"], asked / 16),
        ("worlds -> driver: outcomes", asked * sizes["outcome"], asked / 16),
        ("driver -> buffer -> learner: groups", 2 * asked * sizes["group"], 2),
        ("learner -> object store: weights", weights, 1),
        ("object store -> nodes of 8 samplers: weights", weights * LARGE_SAMPLERS / 8, 8),
        ("the same as an adapter with 1 % of them", weights * LARGE_SAMPLERS / 8 / 100, 8),
    ]
    table = Table(title=f"on paper: {LARGE_WORLDS} worlds in 63 actors, {LARGE_SAMPLERS} samplers")
    for column in ("per step", "MB", "messages", f"MB/s at {LARGE_STEP_S:g} s a step"):
        table.add_column(column, justify="left" if column == "per step" else "right")
    for name, size, messages in rows:
        table.add_row(
            name, f"{size / 1e6:,.1f}", f"{messages:.0f}", f"{size / 1e6 / LARGE_STEP_S:,.1f}"
        )
    console.print(table)
    busy = asked * driver_s / LARGE_STEP_S
    console.print(
        f"driver: {1e3 * driver_s:.2f} ms of one thread per group, so {asked * driver_s:.1f} s per "
        f"step of {asked} groups: {busy:.0%} of its core at {LARGE_STEP_S:g} s a step, full at "
        f"{asked / busy:,.0f} worlds. Full weights of {LARGE_PARAMETERS / 1e9:g} B parameters in "
        f"bfloat16 want {8 * weights * LARGE_SAMPLERS / 8 / LARGE_STEP_S / 1e9:.0f} Gbit/s out of "
        "the learner's node unless nodes pass them on."
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=24, help="simulations, shared by the actors")
    parser.add_argument("--groups", type=int, default=48, help="per round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ways", default=" ".join(f"{n}x{a}" for n, a in NODES_ACTORS))
    arguments = parser.parse_args()
    from rl_ft.render import Renderer
    from rl_ft.sections import TinyModelConfig
    from rl_ft.tiny import build_tiny

    console = Console(width=120)
    table = Table(title=f"{arguments.worlds} simulations on {os.cpu_count()} cores")
    for column in ("nodes", "world actors", "groups/s", "without Ray", "Ray's share of the time"):
        table.add_column(column, justify="right")
    sizes: dict[str, float] = {}
    costs: list[float] = []
    with tempfile.TemporaryDirectory() as place:
        folder = build_tiny(Path(place, "model"), config=TinyModelConfig(), seed=1)
        render = Renderer(str(folder), max_prompt_length=512)
        for num_nodes, num_actors in (map(int, way.split("x")) for way in arguments.ways.split()):
            config = settings(num_actors, arguments.worlds, arguments.groups)
            with nodes(num_nodes, num_cpus=16):
                rates, plain, sizes = compare(config, render, arguments.rounds)
            costs += [rate.driver_s / rate.groups for rate in rates]
            lost = [1 - mine.per_s / bound.per_s for mine, bound in zip(rates, plain, strict=True)]
            table.add_row(
                str(num_nodes),
                str(num_actors),
                f"{statistics.median(rate.per_s for rate in rates):.1f}",
                f"{statistics.median(rate.per_s for rate in plain):.1f}",
                f"{statistics.median(lost):.0%}",
            )
    table.caption = "medians; shares within a round"
    console.print(table)
    for kind, size in sizes.items():
        console.print(f"{kind}: {size / 1e3:.1f} kB per instant")
    large_run(sizes, statistics.median(costs), console)


if __name__ == "__main__":
    main()

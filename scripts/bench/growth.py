"""How the wall time of a step's parts grows: with worlds, junctions per map, and answers per group.

Worlds and junctions: one round of pools of worlds, one pool per core at a time: every world drives
on to a decision, tries all its legal phases there and goes on. Answers per group: what the sampler
takes for 16 prompts, and what the packed forward and backward take for as many groups. An exponent
is the slope of a line through the logarithms: 1 is linear, less is better than linear.

    python scripts/bench/growth.py --out DIR
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from learner import ANSWER_TOKENS, ready_groups
from rich.console import Console
from rich.table import Table

from envs.answers import options
from envs.types import Decision
from rl_ft.config import Config
from rl_ft.sections import TinyModelConfig
from rl_ft.worlds import Order, State, Trial, WorldPool

NUM_WORLDS = (4, 8, 16, 32, 64)
MAPS = (
    "resco:cologne1",
    "generated:6",
    "resco:cologne3",
    "resco:ingolstadt7",
    "resco:cologne8",
    "resco:grid4x4",
    "resco:ingolstadt21",
)
"""By number of junctions; the generated one is an arterial of two."""
GROUP_SIZES = (2, 4, 8, 16, 32)
NUM_GROUPS = 16
WORLDS_PER_POOL = 2
WARM_UP_S = 300.0
VOCABULARY = 300


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Seconds by size, of one thing that there can be more of."""

    name: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Slope of the least-squares line of log(seconds) over log(size)."""
        return statistics.linear_regression(
            [math.log(size) for size in self.sizes], [math.log(s) for s in self.seconds]
        ).slope


def interleaved(calls: Sequence[Callable[[], object]], repeats: int) -> tuple[float, ...]:
    """Median seconds of each; in turns, so that a busy moment falls on all. The first turn warms
    up and is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats + 1):
        for call, times in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return tuple(statistics.median(times[1:]) for times in seconds)


def by_worlds(sizes: Sequence[int], repeats: int) -> Growth:
    """One junction, more and more worlds of it."""
    with ExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        pools = [_pool(MAPS[0], seed, stack) for seed in range(max(sizes) // WORLDS_PER_POOL)]
        calls = [
            lambda size=size: list(executor.map(_round, pools[: size // WORLDS_PER_POOL]))
            for size in sizes
        ]
        return Growth(name="worlds", sizes=tuple(sizes), seconds=interleaved(calls, repeats))


def by_junctions(maps: Sequence[str], repeats: int) -> Growth:
    """As many worlds, of larger and larger maps."""
    with ExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(os.cpu_count()))
        num_pools = os.cpu_count() or 1
        pools = [[_pool(name, seed, stack) for seed in range(num_pools)] for name in maps]
        calls = [lambda found=found: list(executor.map(_round, found)) for found in pools]
        seconds = interleaved(calls, repeats)
        return Growth(
            name="junctions per map",
            sizes=tuple(_num_junctions(name) for name in maps),
            seconds=seconds,
        )


def by_group_size(sizes: Sequence[int], repeats: int) -> list[Growth]:
    """More and more answers to as many prompts: sampled, and trained on."""
    with tempfile.TemporaryDirectory() as place:
        from rl_ft.tiny import build_tiny

        folder = build_tiny(Path(place, "model"), config=TinyModelConfig(), seed=1)
        ways = {
            "answers, sampled": _sampling(folder),
            "answers, trained on": _training(folder),
        }
        return [
            Growth(
                name=name,
                sizes=tuple(sizes),
                seconds=interleaved([lambda n=n, way=way: way(n) for n in sizes], repeats),
            )
            for name, way in ways.items()
        ]


def _pool(scenario: str, seed: int, stack: ExitStack) -> WorldPool:
    """Worlds from the beginning of the scenario, driven by classical controllers."""
    rollout = {
        "behaviour": {"policy": 0},
        "episode_s": 3600,
        "warm_up_s": WARM_UP_S,
        "max_pause": 0,
    }
    config = Config.model_validate({"rollout": rollout})
    pool = WorldPool(config, [scenario], seed=seed, num_worlds=WORLDS_PER_POOL)
    stack.callback(pool.close)
    return pool


def _round(pool: WorldPool) -> None:
    def order(state: State) -> Order:
        if not isinstance(state, Decision):
            raise SystemExit(f"a world failed: {state}")
        return Trial(actions=options(state), executed=None)

    pool.settle([order(state) for state in pool.states()])


def _num_junctions(name: str) -> int:
    from envs.scenario import load_scenario
    from envs.world import World

    with World() as world:
        return len(world.reset(load_scenario(name), seed=1))


def _sampling(folder: Path) -> Callable[[int], object]:
    from rl_ft.generation import Generator

    generator = Generator(str(folder), config=Config(), seed=1)
    rng = random.Random(0)

    def sample(group_size: int) -> object:
        # New prompts every time: an old prompt would be in the prefix cache.
        prompts = [[rng.randrange(5, VOCABULARY) for _ in range(120)] for _ in range(NUM_GROUPS)]
        return generator.generate(prompts, num_samples=group_size, max_tokens=ANSWER_TOKENS)

    return sample


def _training(folder: Path) -> Callable[[int], object]:
    from rl_ft.batch import collate
    from rl_ft.learner import load_model
    from rl_ft.packing import logps_and_entropies, pack

    model, tokenizer = load_model(folder, Config())

    def train(group_size: int) -> object:
        groups = ready_groups(NUM_GROUPS, group_size, VOCABULARY)
        batch = collate(groups, pad_token_id=tokenizer.pad_token_id)
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        packed = pack(*(batch[name] for name in names), group_size=group_size)
        logps, _ = logps_and_entropies(model, packed, temperature=1.0)
        return logps.sum().backward()

    return train


def show(found: Sequence[Growth]) -> Table:
    """Seconds at every size, and the exponent."""
    table = Table(title="wall time, s")
    for column in ("", "sizes", "seconds", "exponent"):
        table.add_column(column, justify="right" if column == "exponent" else "left")
    for growth in found:
        table.add_row(
            growth.name,
            " ".join(f"{size:>5}" for size in growth.sizes),
            " ".join(f"{seconds:>5.2f}" for seconds in growth.seconds),
            f"{growth.exponent:.2f}",
        )
    return table


def plot(found: Sequence[Growth], file: Path) -> None:
    """One panel each, logarithmic both ways, beside what linear growth would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.5), squeeze=False)
    for axes, growth in zip(panels[0], found, strict=True):
        axes.loglog(growth.sizes, growth.seconds, "o-", label=f"exponent {growth.exponent:.2f}")
        linear = [growth.seconds[0] * size / growth.sizes[0] for size in growth.sizes]
        axes.loglog(growth.sizes, linear, ":", color="grey", label="linear")
        axes.set_xticks(growth.sizes, [str(size) for size in growth.sizes])
        axes.minorticks_off()
        axes.set_xlabel(growth.name)
        axes.legend()
    panels[0][0].set_ylabel("wall time, s")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of growth.png")
    parser.add_argument("--worlds", type=_numbers, default=NUM_WORLDS)
    parser.add_argument("--maps", type=lambda text: text.split(","), default=MAPS)
    parser.add_argument("--sizes", type=_numbers, default=GROUP_SIZES, help="answers per group")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    found = [
        by_worlds(arguments.worlds, arguments.repeats),
        by_junctions(arguments.maps, arguments.repeats),
        *by_group_size(arguments.sizes, arguments.repeats),
    ]
    Console(width=130).print(show(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(found, arguments.out / "growth.png")
    print(arguments.out / "growth.png")


if __name__ == "__main__":
    main()

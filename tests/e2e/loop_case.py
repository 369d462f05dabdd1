"""The real loop on a prepared start: one generator for all, worlds and learner of its own each."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray

from envs.answers import options
from envs.reward import Reward
from rl_ft.actors import GeneratorService, start_worlds
from rl_ft.asking import Asked
from rl_ft.config import Config
from rl_ft.crew import RemoteWorlds, Samplers
from rl_ft.monitor import MetricLog, read_metrics
from rl_ft.recipe import load_config
from rl_ft.run import GrpoLoop
from rl_ft.run_folder import RunFolder
from rl_ft.types import WeightsRef
from rl_ft.weights import digest, read_folder
from rl_ft.worlds import Tried

START = "max_pressure"
STAGE = f"grpo/{START}"
CHECKS = f"check/{START}"
BASE = (
    "model.tiny.hidden_size=64",
    "model.tiny.intermediate_size=128",
    "model.tiny.num_attention_heads=2",
    "model.tiny.num_key_value_heads=2",
    "prepare.num_states=64",
    "prepare.num_eval_states=8",
    "prepare.states_per_episode=20",
    "sft.num_train_epochs=20",
    "sft.learning_rate=0.005",
    "sft.label_noise=0.7",
    "reward.horizon_s=20",
    "rollout.num_worlds=4",
    "rollout.num_groups=8",
    "rollout.call_timeout_s=60",
    "generation.reproducible=true",
    "generation.gpu_memory_utilization=0.4",
    "grpo.num_generations=8",
    "grpo.groups_per_micro_batch=32",
    "grpo.min_entropy=0",
    "grpo.target_coef=0",
    "check.every_steps=0",
    "health.max_failed_share=1",
    "ray.torch_threads=1",
)


def loop_config(*overrides: str) -> Config:
    return load_config("smoke", [*BASE, *overrides])


class WatchedGenerator(GeneratorService):
    """The generator, remembering what it loaded; its sync can be broken without a sound."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._loaded: list[tuple[int, str]] = []
        self._last_loaded: int | None = None

    def load(self, ref: WeightsRef) -> int:
        self._loaded.append((ref.version, ref.digest))
        if self._last_loaded is not None and ref.version > self._last_loaded:
            self._generator.version = ref.version
            return ref.version
        return super().load(ref)

    def take_loaded(self) -> list[tuple[int, str]]:
        taken, self._loaded = self._loaded, []
        return taken

    def break_after(self, version: int | None) -> None:
        """Versions after this one are not loaded; None mends the sync."""
        self._last_loaded = version


@dataclass(frozen=True, kw_only=True)
class LoopRun:
    """What a loop left behind."""

    root: Path
    steps: list[dict[str, Any]]
    checks: list[dict[str, Any]]
    loaded: list[tuple[int, str]]
    """Version and digest of everything the generator was told to load."""
    error: Exception | None

    def values(self, name: str) -> list[float]:
        return [step["values"][name] for step in self.steps]

    @property
    def step_numbers(self) -> list[int]:
        return [step["step"] for step in self.steps]

    @property
    def final_digest(self) -> str:
        return digest(read_folder(self.root / STAGE / "model"))


def run_loop(
    prepared: Path,
    root: Path,
    generator: Any,
    *overrides: str,
    others: Sequence[Any] = (),
    score: Any = None,
    meanwhile: Callable[[Path, Sequence[RemoteWorlds]], None] | None = None,
) -> LoopRun:
    """One GRPO training in a folder of its own; `meanwhile(root, worlds)` runs in a thread.

    `others` are generators that sample beside the first.
    In a folder that holds one already, it goes on.
    """
    config = loop_config(*overrides)
    root.mkdir(parents=True, exist_ok=True)
    for name in ("sft", "data"):
        if not (root / name).exists():
            (root / name).symlink_to(prepared / name)
    worlds = start_worlds(config, root / "data")
    ray.get(generator.take_loaded.remote())
    error = None
    thread = threading.Thread(target=meanwhile, args=(root, worlds)) if meanwhile else None
    try:
        with MetricLog(root) as record:
            folder = RunFolder(root=root, config=config)
            starts = [lambda _, actor=actor: actor for actor in (generator, *others)]
            samplers = Samplers(starts, max_failures=0, call_timeout_s=300)
            loop = GrpoLoop(config, folder, START, worlds, samplers, record, score=score)
            if thread:
                thread.start()
            try:
                asyncio.run(loop.run())
            except Exception as stopped:
                error = stopped
    finally:
        if thread:
            thread.join(timeout=60)
        for team in worlds:
            team.close()
    return LoopRun(
        root=root,
        steps=read_metrics(root, STAGE),
        checks=read_metrics(root, CHECKS),
        loaded=ray.get(generator.take_loaded.remote()),
        error=error,
    )


def first_legal(asked: Asked, kinds: Sequence[str], _: Tried) -> list[Reward]:
    """Toy reward: 1 for exactly the first legal phase, 0 for another, less for a bad format."""
    right = options(asked.telling.decision)[0]
    return [
        Reward(
            traffic=float(action == right and kind == "strict"),
            format=-float(kind != "strict"),
            cost_veh_s=None,
        )
        for action, kind in zip(asked.chosen(), kinds, strict=True)
    ]


def wait_for(found: Callable[[], Any], timeout_s: float = 300.0) -> Any:
    """The first true value of `found`; starting a learner takes minutes on a busy machine."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.1)
    raise TimeoutError(f"{found} stayed false for {timeout_s:g} s")


def num_logged(root: Path) -> int:
    """Steps of the loop that are in its metrics."""
    return len(read_metrics(root, STAGE))


def world_pids() -> list[int]:
    """Processes of simulations below this one."""
    return _pids_below(lambda command: "envs.world_process" in command)


def train_worker_pids() -> list[int]:
    """Processes of Ray Train workers below this one."""
    return _pids_below(lambda command: command[0].startswith("ray::RayTrainWorker"))


def _pids_below(is_wanted: Callable[[list[str]], bool]) -> list[int]:
    found = []
    for process in psutil.Process().children(recursive=True):
        # One that has ended by now, such as a branch, has no command line.
        with contextlib.suppress(psutil.Error, IndexError):
            if is_wanted(process.cmdline()):
                found.append(process.pid)
    return found

"""Whatever is killed, and whenever: the run goes on, and what it ends with is accounted for."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from loop_case import STAGE, START, WatchedGenerator, loop_config, train_worker_pids
from test_loop import measured

from rl_ft.actors import start_worlds
from rl_ft.checkpoints import checkpoint_steps
from rl_ft.crew import Samplers
from rl_ft.mirror import Mirror
from rl_ft.monitor import MetricLog, read_metrics
from rl_ft.run import GrpoLoop
from rl_ft.run_folder import RunFolder

pytestmark = pytest.mark.e2e

# ---- the driver

MORTAL = Path(__file__).with_name("mortal_driver.py")
SETTINGS = (
    "grpo.max_steps=8",
    "grpo.save_steps=2",
    # What a step changes is seen, and within what rows of the version before may differ by.
    "grpo.learning_rate=0.003",
    "grpo.target_coef=0.3",
    "rollout.max_staleness=1",
    "rollout.tellings=3",
    "rollout.retell_after_steps=1",
    "rollout.num_worlds=6",
    "ray.num_world_actors=2",
)
DEATHS = (("checkpoint", 6), ("sync", 5))
"""One after the other, in one run; once there are two checkpoints the newer one is damaged."""


def copy_of(root: Path) -> str:
    return f"file://{root}-copy"


def train(root: Path, *moment: object) -> int:
    command = [sys.executable, str(MORTAL), str(root), *map(str, moment), "--", *SETTINGS]
    command.append(f"monitor.mirror={copy_of(root)}")
    with (root / "out.log").open("a") as out:
        return subprocess.run(command, stdout=out, stderr=out, timeout=900).returncode


def start(prepared: Path, root: Path) -> Path:
    root.mkdir()
    for name in ("sft", "data"):
        (root / name).symlink_to(prepared / name)
    return root


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """A run that nothing happens to."""
    root = start(prepared, tmp_path_factory.mktemp("whole") / "run")
    assert train(root) == 0, (root / "out.log").read_text()[-3000:]
    return root


@pytest.fixture(scope="module")
def killed(prepared, tmp_path_factory):
    """The same, killed twice, and its folder lost the last time; how every start ended."""
    root = start(prepared, tmp_path_factory.mktemp("killed") / "run")
    checkpoints = root / STAGE / "checkpoints"
    endings = []
    for moment in (*DEATHS, ()):
        steps = checkpoint_steps(checkpoints)
        if len(steps) > 1 and not (root / "damaged").exists():
            with (checkpoints / f"checkpoint-{steps[-1]}" / "model.safetensors").open("r+b") as f:
                f.seek(-8, os.SEEK_END)
                f.write(b"12345678")
            (root / "damaged").touch()
        if not moment:
            shutil.rmtree(root)
            Mirror(copy_of(root)).pull(root)
        endings.append(train(root, *moment))
    return root, endings


def test_a_driver_that_is_killed_is_killed_at_its_moment(killed):
    root, endings = killed
    assert endings == [-signal.SIGKILL] * len(DEATHS) + [0], (root / "out.log").read_text()[-3000:]


def test_a_damaged_checkpoint_was_passed_over(killed):
    root, _ = killed
    assert (root / "damaged").exists()
    assert "is passed over for the one before" in (root / "out.log").read_text()


def test_a_run_whose_folder_was_lost_went_on_from_a_copy(killed):
    root, endings = killed
    assert not (root / "sft").is_symlink()
    assert endings[-1] == 0


def test_a_run_that_was_killed_measures_what_one_does_that_was_not(whole, killed):
    one, other = (measured(read_metrics(root, STAGE)) for root in (whole, killed[0]))
    counted = [name for name in one[0] if name.startswith("buffer/")]
    for values in (*one, *other):
        # Counted since the start of the program.
        for name in counted:
            del values[name]
    assert len(one) == 8
    # Half of the steps were sampled ahead of the learner.
    assert max(values["staleness/max"] for values in one) == 1
    assert other == one


def test_a_run_that_was_killed_leaves_the_same_weights(whole, killed):
    def weights(root: Path) -> bytes:
        return (root / STAGE / "model" / "model.safetensors").read_bytes()

    assert weights(killed[0]) == weights(whole)


# ---- everything else, while the driver lives

NUM_STEPS = 6
VICTIMS = {
    2: "envs.world_process",
    3: "ray::WorldService",
    4: "ray::WatchedGenerator",
    5: "ray::RayTrainWorker",
}
"""Who is killed at which step, and what its process is called."""
FATES = (
    {2: "idle", 3: "busy", 4: "sync", 5: "checkpoint"},
    {2: "busy", 3: "idle", 4: "busy", 5: "sync"},
)
"""At which moment of its step, one training each."""


class Fate:
    """Kills the victim of each step at its moment, and knows whom it has killed."""

    def __init__(self, moments: dict[int, str]) -> None:
        self.moments = moments
        self.killed: dict[int, str] = {}
        self._doomed: dict[int, int] = {}

    def name(self, step: int, loop: DoomedLoop) -> None:
        """Find the victim of a step, as long as it answers."""
        if step not in VICTIMS or step in self.killed:
            return
        worlds = loop._worlds[0].post.actor
        self._doomed[step] = {
            2: lambda: ray.get(worlds.pids.remote())[-1],
            3: lambda: psutil.Process(ray.get(worlds.pids.remote())[0]).ppid(),
            4: lambda: ray.get(loop._samplers.posts[0].actor.pid.remote()),
            5: lambda: train_worker_pids()[0],
        }[step]()

    def strike(self, moment: str, step: int) -> None:
        if self.moments.get(step) != moment or step not in self._doomed or step in self.killed:
            return
        process = psutil.Process(self._doomed[step])
        self.killed[step] = " ".join(process.cmdline())
        process.kill()

    def strike_while_it_writes(self, step: int, checkpoints: Path) -> None:
        """The learner, in the middle of its checkpoint."""

        def wait() -> None:
            while not any(checkpoints.glob(".incomplete/*/*")):
                time.sleep(0.001)
            self.strike("checkpoint", step)

        threading.Thread(target=wait, daemon=True).start()


class DoomedLoop(GrpoLoop):
    """Tells a fate where it is."""

    fate: Fate

    async def _collect(self, step, *rest):
        self.fate.name(step, self)
        asyncio.get_running_loop().call_later(0.1, self.fate.strike, "busy", step)
        await super()._collect(step, *rest)
        self.fate.strike("idle", step)

    async def _remember(self, version):
        await super()._remember(version)
        # The learner trained step `version - 1`, and waits for this to write its checkpoint.
        if VICTIMS.get(version - 1) == VICTIMS[5]:
            self.fate.strike_while_it_writes(version - 1, self._folder.path(STAGE, "checkpoints"))
        else:
            self.fate.strike("checkpoint", version - 1)


class DoomedSamplers(Samplers):
    """Tells it when weights are on their way."""

    fate: Fate

    async def load(self, ref):
        asyncio.get_running_loop().call_later(0.005, self.fate.strike, "sync", ref.version - 1)
        await super().load(ref)


@pytest.fixture(scope="module", params=FATES, ids=["first", "second"])
def doomed(request, prepared, generator, tmp_path_factory):
    """One training in which all of them are killed, one step after the other."""
    fate = Fate(request.param)
    config = loop_config(
        f"grpo.max_steps={NUM_STEPS}",
        "grpo.save_steps=1",
        "grpo.learning_rate=0.002",
        "rollout.behaviour.policy=0",
        "ray.num_world_actors=2",
    )
    root = start(prepared, tmp_path_factory.mktemp("doomed") / "run")
    model = str(prepared / "sft" / START)
    engine = ray.remote(WatchedGenerator).options(num_cpus=0)
    samplers = DoomedSamplers(
        [lambda _: engine.remote(model, config, config.seed)], max_failures=1, call_timeout_s=300
    )
    samplers.fate = fate
    worlds = start_worlds(config, root / "data")
    error = None
    try:
        with MetricLog(root) as record:
            folder = RunFolder(root=root, config=config)
            loop = DoomedLoop(config, folder, START, worlds, samplers, record)
            loop.fate = fate
            asyncio.run(loop.run())
    except Exception as stopped:
        error = stopped
    finally:
        for team in worlds:
            team.close()
        samplers.close()
    return fate, error, read_metrics(root, STAGE), root


def test_every_victim_was_killed_once(doomed):
    fate, *_ = doomed
    assert fate.killed.keys() == VICTIMS.keys()
    for step, name in fate.killed.items():
        assert VICTIMS[step] in name


def test_the_run_goes_on_to_its_last_step(doomed):
    _, error, steps, root = doomed
    assert error is None
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert (root / STAGE / "model" / "model.safetensors").is_file()


def test_every_group_is_accounted_for(doomed):
    last = doomed[2][-1]["values"]
    submitted, trained, dropped, in_flight = (
        last[f"buffer/{what}_groups"] for what in ("submitted", "trained", "dropped", "in_flight")
    )
    assert submitted == trained + dropped + in_flight


def test_trainer_and_sampler_agree_throughout(doomed):
    assert max(step["values"]["mismatch/mean_abs_logp_diff"] for step in doomed[2]) < 1e-4


def test_worlds_that_were_killed_are_counted_and_nothing_else_is(doomed):
    failed = [step["values"]["health/failed_share"] > 0 for step in doomed[2]]
    # A death is noticed when the world is asked next: in its own step or in the one after.
    assert 1 <= sum(failed) <= 2
    assert not failed[0]
    assert not failed[-1]

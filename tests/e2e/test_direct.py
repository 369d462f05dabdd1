"""A learner that broadcasts its weights to two engines: to the bit what the object store brings,
and whoever dies of the three, and whenever, the others go on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import ray
import torch
from loop_case import STAGE, START, loop_config, num_logged, train_worker_pids, wait_for

from rl_ft.actors import GeneratorService, start_worlds
from rl_ft.crew import Samplers
from rl_ft.monitor import MetricLog, read_metrics
from rl_ft.run import GrpoLoop
from rl_ft.run_folder import RunFolder
from rl_ft.weights import digest, read_folder

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="by gloo, between CPUs"),
]

NUM_STEPS = 7
SETTINGS = (
    f"grpo.max_steps={NUM_STEPS}",
    "grpo.save_steps=2",
    "grpo.learning_rate=0.003",
    "ray.num_generators=2",
)
IDLE, WITHIN, LEARNER = 1, 3, 5
"""After which step an engine is killed, at which version the other one, after which step the
learner."""


class SentGenerator(GeneratorService):
    """Writes down how every version came to it, and dies within one of them if so ordered."""

    def __init__(self, *args):
        super().__init__(*args)
        self._record = self._dies_at = None
        receive = self._generator.receive_weights

        def receive_or_die(offer, place, version, **settings):
            if version == self._dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return receive(offer, place, version, **settings)

        self._generator.receive_weights = receive_or_die

    def order(self, record, dies_at):
        self._record, self._dies_at = record, dies_at

    def _receive(self, offer, version):
        sent = super()._receive(offer, version)
        with Path(self._record).open("a") as file:
            file.write(json.dumps([self._seat, version, sent]) + "\n")
        return sent


@pytest.fixture(scope="module")
def engines(prepared, ray_cluster):
    """How to start one in each of two seats; the first of each is there already."""
    import test_direct

    # Workers do not have this folder on their path.
    ray.cloudpickle.register_pickle_by_value(test_direct)
    engine = ray.remote(SentGenerator).options(num_cpus=0)
    config = loop_config(*SETTINGS, "ray.weight_transport=gloo")
    arguments = str(prepared / "sft" / START), config, config.seed
    first = [engine.remote(*arguments, seat) for seat in (0, 1)]

    def start(seat, record, dies_at):
        def begin(num_before):
            actor = engine.remote(*arguments, seat) if num_before else first[seat]
            actor.order.remote(record, None if num_before else dies_at)
            return actor

        return begin

    yield start
    for actor in first:
        ray.kill(actor)


class Run:
    def __init__(self, prepared, engines, root, transport, *, meanwhile=None, dies_at=None):
        self.root, self.error = root, None
        self.received = root / "received.jsonl"
        root.mkdir()
        for name in ("sft", "data"):
            (root / name).symlink_to(prepared / name)
        config = loop_config(*SETTINGS, f"ray.weight_transport={transport}")
        orders = ((0, None), (1, dies_at))
        starts = [engines(seat, str(self.received), dies) for seat, dies in orders]
        samplers = Samplers(starts, max_failures=2, call_timeout_s=300)
        worlds = start_worlds(config, root / "data")
        thread = threading.Thread(target=meanwhile, args=(root, samplers)) if meanwhile else None
        try:
            with MetricLog(root) as record:
                folder = RunFolder(root=root, config=config)
                loop = GrpoLoop(config, folder, START, worlds, samplers, record)
                if thread:
                    thread.start()
                asyncio.run(loop.run())
        except Exception as stopped:
            self.error = stopped
        finally:
            if thread:
                thread.join(timeout=60)
            for team in worlds:
                team.close()
        if dies_at:
            samplers.close()
        self.steps = read_metrics(root, STAGE)

    def how(self, version: int) -> list[bool]:
        """Whether each engine was sent a version; False: it fetched it."""
        lines = map(json.loads, self.received.read_text().splitlines())
        return [sent for _, number, sent in lines if number == version]

    def mismatch(self) -> float:
        return max(step["values"]["mismatch/mean_abs_logp_diff"] for step in self.steps)

    def digest(self) -> str:
        return digest(read_folder(self.root / STAGE / "model"))


@pytest.fixture(scope="module")
def fetched(prepared, engines, tmp_path_factory):
    return Run(prepared, engines, tmp_path_factory.mktemp("fetched") / "run", "object_store")


@pytest.fixture(scope="module")
def sent(prepared, engines, tmp_path_factory):
    return Run(prepared, engines, tmp_path_factory.mktemp("sent") / "run", "gloo")


@pytest.fixture(scope="module")
def troubled(prepared, engines, fetched, sent, tmp_path_factory):
    """The last one: it needs the engines of the others up."""
    killed = []

    def strike(root, samplers):
        wait_for(lambda: num_logged(root) >= IDLE, 300)
        killed.append(ray.get(samplers.posts[0].actor.pid.remote()))
        os.kill(killed[-1], signal.SIGKILL)
        wait_for(lambda: num_logged(root) >= LEARNER, 300)
        killed.append(train_worker_pids()[0])
        os.kill(killed[-1], signal.SIGKILL)

    root = tmp_path_factory.mktemp("troubled") / "run"
    run = Run(prepared, engines, root, "gloo", meanwhile=strike, dies_at=WITHIN)
    assert len(killed) == 2
    return run


def test_every_version_is_sent_to_every_engine(sent):
    assert sent.error is None
    assert [sent.how(version) for version in range(NUM_STEPS + 1)] == [[True] * 2] * (NUM_STEPS + 1)


def test_what_is_sent_trains_to_the_bits_of_what_is_fetched(sent, fetched):
    assert fetched.error is None
    assert not fetched.received.exists()
    assert sent.digest() == fetched.digest()
    assert sent.mismatch() < 1e-4


def test_a_run_in_which_engines_and_learner_die_ends_with_the_same_weights(troubled, sent):
    assert troubled.error is None
    assert [step["step"] for step in troubled.steps] == list(range(1, NUM_STEPS + 1))
    assert troubled.digest() == sent.digest()


def test_who_missed_a_version_fetches_it_and_is_then_sent_weights_again(troubled):
    # Of the seat whose engine died, the next one.
    assert troubled.how(WITHIN)[:2] == [False, False]
    assert troubled.how(WITHIN + 1)[:2] == [True, True]
    assert troubled.how(NUM_STEPS)[-2:] == [True, True]
    assert troubled.mismatch() < 1e-4

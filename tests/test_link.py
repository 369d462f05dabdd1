"""A learner's sender and two engines, as actors: NCCL where there are three GPUs, else gloo."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket

import pytest
import ray
import torch

from rl_ft import link
from rl_ft.actors import GeneratorActor
from rl_ft.config import Config
from rl_ft.crew import Samplers
from rl_ft.link import MAX_MISSED, Sender, reserved_port
from rl_ft.sections import TinyModelConfig
from rl_ft.tiny import build_tiny
from rl_ft.weights import publish, read_folder

pytestmark = [pytest.mark.vllm, pytest.mark.ray]

SIZE = TinyModelConfig(
    hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2
)
WAIT_S = 300.0


class SendingLearner:
    """Publishes as `rl_ft.link.LearnerLink` does, without a buffer."""

    def __init__(self, folder, transport, config):
        device = "cuda" if transport == "nccl" else "cpu"
        self._tensors = {k: v.to(device) for k, v in read_folder(folder).items()}
        self._sender = Sender(transport, config)

    def offer(self, version):
        self._offer = self._sender.offer(self._tensors, version)
        return self._offer

    def send(self, version):
        self._sender.send(self._tensors, version, self._offer)


@pytest.fixture
def alone(ray_cluster, monkeypatch):
    """A sender to an engine that never comes, and one tensor."""
    monkeypatch.setattr(link, "GATHER_S", 0.2)
    monkeypatch.setattr(link, "POLL_S", 0.1)
    return Sender("gloo", Config()), {"weight": torch.ones(2)}


def test_nobody_waits_for_a_loop_that_has_ended(alone):
    sender, tensors = alone
    for version in range(2 * MAX_MISSED):
        offer = sender.offer(tensors, version)
        assert offer is not None
        sender.send(tensors, version, offer, is_wanted=lambda: False)


def test_what_nobody_comes_for_is_offered_so_often_and_no_more(alone):
    sender, tensors = alone
    for version in range(MAX_MISSED + 1):
        sender.send(tensors, version, sender.offer(tensors, version))
    assert sender.offer(tensors, MAX_MISSED + 1) is None


def test_a_reserved_port_is_for_the_server_that_it_was_reserved_for():
    with reserved_port("127.0.0.1") as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True)
        store.set("name", "value")
        assert store.get("name") == b"value"


@pytest.mark.parametrize("transport", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
def test_two_engines_answer_with_what_a_learner_sends(ray_cluster, tmp_path, transport):
    on_gpu = transport == "nccl"
    if on_gpu and torch.cuda.device_count() < 3:
        pytest.skip("NCCL wants a GPU for the learner and for each engine")
    if not on_gpu and torch.cuda.is_available():
        pytest.skip("where there are GPUs, two engines would share one")
    start, learnt = (
        str(build_tiny(tmp_path / str(seed), config=SIZE, seed=seed)) for seed in (1, 2)
    )
    config = Config.model_validate(
        {
            "model": {"max_prompt_length": 200},
            "generation": {"max_model_len": 256, "kv_cache_gib": 0.25},
            "ray": {"weight_transport": transport, "num_generators": 2},
        }
    )
    engine = GeneratorActor.options(num_cpus=0, num_gpus=int(on_gpu))
    starts = [lambda _, seat=seat: engine.remote(start, config, 1, seat) for seat in (0, 1)]
    samplers = Samplers(starts, max_failures=0, call_timeout_s=WAIT_S)
    import test_link

    # Workers do not have this folder on their path.
    ray.cloudpickle.register_pickle_by_value(test_link)
    learner = ray.remote(SendingLearner).options(num_cpus=0, num_gpus=int(on_gpu))
    learner = learner.remote(learnt, transport, config)

    def answers(post):
        rng = random.Random(0)
        asked = [[rng.randrange(300, 700) for _ in range(90)] for _ in range(6)]
        settings = {"num_samples": 1, "max_tokens": 6, "temperature": 0.0}
        rows = ray.get(post.actor.generate.remote(asked, **settings))
        return [(row[0].token_ids, row[0].logprobs, row[0].weights_version) for row in rows]

    try:
        # The tensors that wait in the object store are not what is sent: what answers was sent.
        for version in (1, 2):
            ref = publish(read_folder(start), version, ray.put)
            offer = ray.get(learner.offer.remote(version))
            sending = learner.send.remote(version)
            asyncio.run(samplers.load(dataclasses.replace(ref, offer=offer)))
            ray.get(sending, timeout=WAIT_S)
        sent = [answers(post) for post in samplers.posts]
        asyncio.run(samplers.load_folder(learnt))
        for post, came in zip(samplers.posts, sent, strict=True):
            assert [(*row[:2], 2) for row in answers(post)] == came
        asyncio.run(samplers.load_folder(start))
        assert [row[:2] for row in answers(samplers.posts[0])] != [row[:2] for row in sent[0]]
    finally:
        ray.kill(learner)
        samplers.close()

"""Weights that a learner broadcasts to the engines, by gloo: what arrives, and what if it does not.

NCCL differs in what carries the tensors, and is tested where there are GPUs for it.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import weakref
from functools import partial

import pytest
import torch
from port_case import free_port

from rl_ft.config import Config
from rl_ft.generation import Generator
from rl_ft.meeting import Offer, Place
from rl_ft.sections import TinyModelConfig
from rl_ft.transfer import WAIT_S, TransferError, checksum, in_time, offer_of, open_group
from rl_ft.weights import read_folder

SIZE = TinyModelConfig(
    hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2
)
LIMIT_S = 60.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_a_checksum_sees_any_bit(dtype):
    ones = torch.ones(3, 5, dtype=dtype)
    other = ones.clone()
    other.view(torch.uint8)[1, 2] ^= 1
    assert checksum(ones) == checksum(ones.clone())
    assert checksum(ones) != checksum(other)


def test_a_checksum_does_not_depend_on_how_a_tensor_lies_in_memory():
    tensor = torch.randn(4, 6)
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)


def test_what_hangs_ends_with_its_name():
    with pytest.raises(TransferError, match=r"not done within 0\.05 s"):
        in_time(threading.Event().wait, 0.05)


def test_what_fails_in_time_fails_as_itself():
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        in_time(fail, LIMIT_S)


def test_what_failed_holds_nothing_afterwards():
    class Group:
        pass

    group = Group()
    is_there = weakref.ref(group)

    def fail(group: Group) -> None:
        raise KeyError("mine")

    with contextlib.suppress(KeyError):
        in_time(partial(fail, group), LIMIT_S)
    del group
    assert is_there() is None


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def engine(folder, request):
    if torch.cuda.is_available():
        pytest.skip("where there are GPUs, they are sent weights by NCCL")
    config = Config.model_validate(
        {
            "model": {"max_prompt_length": 200},
            "generation": {
                "max_model_len": 256,
                "kv_cache_gib": 0.25,
                "tensor_parallel_size": request.param,
            },
            "ray": {"weight_transport": "gloo", "cpus_per_generator": 0.5},
        }
    )
    engine = Generator(folder, config=config, seed=1)
    yield engine
    engine.close()


def answers(engine: Generator) -> list[object]:
    rng = random.Random(0)
    prompts = [[rng.randrange(300, 700) for _ in range(90)] for _ in range(6)]
    rows = engine.generate(prompts, num_samples=1, max_tokens=6, temperature=0.0)
    return [(row[0].token_ids, row[0].logprobs) for row in rows]


def offer(tensors: dict[str, torch.Tensor]) -> Offer:
    return offer_of(tensors, meeting=None, group="one")


@contextlib.contextmanager
def at_once():
    """Not after gloo has waited for as long as it does."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < WAIT_S / 2


class Learner:
    """A sender in a thread of this process, to one engine."""

    def __init__(self, engine: Generator) -> None:
        self.num = engine._num_processes
        self.place = Place(members=("a",), host="127.0.0.1", port=free_port())
        self.group = None

    def begin(self, tensors: dict[str, torch.Tensor], *, last: bool = False) -> threading.Thread:
        """Send what there is, and if it is the `last` leave the group."""
        thread = threading.Thread(target=self._send, args=(tensors, last), daemon=True)
        thread.start()
        return thread

    def _send(self, tensors: dict[str, torch.Tensor], last: bool) -> None:
        if self.group is None:
            self.group = open_group("gloo", self.place.host, self.place.port, self.num)
        self.group.send(tensors)
        if last:
            self.group.close()


@pytest.mark.vllm
def test_an_engine_answers_with_what_it_was_sent_one_version_after_the_other(
    engine, folder, changed
):
    weights = read_folder(folder)
    wanted = []
    for version, tensors in enumerate((weights, changed)):
        engine.load_weights(tensors, version)
        wanted.append(answers(engine))
    assert wanted[0] != wanted[1]
    learner = Learner(engine)
    for version, tensors in enumerate((weights, changed, weights)):
        thread = learner.begin(tensors)
        assert engine.receive_weights(
            offer(tensors), learner.place, version, seat=0, anew=version == 0
        )
        thread.join(LIMIT_S)
        assert answers(engine) == wanted[version % 2]
        assert engine.version == version


@pytest.mark.vllm
def test_what_came_and_was_not_sent_is_not_taken(engine, folder, changed, caplog):
    name = "model.norm.weight"
    learner = Learner(engine)
    learner.begin({**changed, name: changed[name] + 1})
    assert not engine.receive_weights(offer(changed), learner.place, 7, seat=0, anew=True)
    assert f"altered: 1 of {len(changed)} tensors, {name} first" in caplog.text
    assert engine.version != 7


@pytest.mark.vllm
def test_an_engine_that_was_sent_half_a_version_can_load_a_whole_one(engine, folder, changed):
    if engine._num_processes > 1:
        pytest.skip("an engine of several processes does not survive it")
    engine.load_weights(read_folder(folder), 9)
    wanted = answers(engine)
    learner = Learner(engine)
    learner.begin(dict(list(changed.items())[: len(changed) // 2]), last=True)
    with at_once():
        assert not engine.receive_weights(offer(changed), learner.place, 10, seat=0, anew=True)
    engine.load_weights(read_folder(folder), 11)
    assert answers(engine) == wanted
    learner = Learner(engine)
    learner.begin(changed)
    assert engine.receive_weights(offer(changed), learner.place, 12, seat=0, anew=True)
    assert answers(engine) != wanted


@pytest.mark.vllm
def test_an_engine_whose_sender_ends_does_not_wait_for_it(engine, changed):
    learner = Learner(engine)
    learner.begin({}, last=True)
    several = pytest.raises(RuntimeError, match=r"(?i)clos|reset|peer")
    with at_once(), several if engine._num_processes > 1 else contextlib.nullcontext():
        assert not engine.receive_weights(offer(changed), learner.place, 8, seat=0, anew=True)
    assert engine.version != 8

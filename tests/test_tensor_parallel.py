"""One engine in two processes: the answers of one, and nothing that outlives it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time

import psutil
import pytest
import ray
import torch
from pydantic import ValidationError

from envs.errors import UserError
from rl_ft.cluster import engine_gpus
from rl_ft.config import Config
from rl_ft.generation import Generator
from rl_ft.sections import TinyModelConfig
from rl_ft.weights import publish, read_folder

# More than what vLLM sends to a process in one piece (16 MiB).
SIZE = TinyModelConfig(
    hidden_size=512, intermediate_size=1536, num_attention_heads=4, num_key_value_heads=4
)
GONE_S = 20.0


def config(size: int) -> Config:
    return Config.model_validate(
        {
            "model": {"max_prompt_length": 200},
            "generation": {
                "max_model_len": 256,
                "max_num_seqs": 64,
                "kv_cache_gib": 0.25,
                "tensor_parallel_size": size,
                "gpu_memory_utilization": 0.3,
            },
            "ray": {"cpus_per_generator": 0.5},
        }
    )


def prompts(number: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(300, 700) for _ in range(rng.randrange(40, 120))] for _ in range(number)]


def engine_processes(pid: int) -> list[psutil.Process]:
    # By vLLM's title, or by how they were started where they could not be given one.
    found = [(p, " ".join(p.cmdline())) for p in psutil.Process(pid).children()]
    return [process for process, line in found if "VLLM" in line or "spawn_main" in line]


def are_gone(processes: list[psutil.Process]) -> bool:
    psutil.wait_procs(processes, timeout=GONE_S)
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


@pytest.fixture(scope="module")
def engines(folder):
    """Of one process and of two."""
    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        pytest.skip("two processes of an engine want a GPU each")
    one, two = (Generator(folder, config=config(size), seed=1) for size in (1, 2))
    yield one, two
    workers = two._llm.llm_engine.model_executor.workers
    processes = [psutil.Process(worker.proc.pid) for worker in workers]
    assert len(processes) == 2
    two.close()
    one.close()
    assert are_gone(processes)


def assert_equal_answers(one: Generator, two: Generator) -> None:
    greedy, same = (
        engine.generate(prompts(6), num_samples=1, max_tokens=6, temperature=0.0)
        for engine in (one, two)
    )
    for [a], [b] in zip(greedy, same, strict=True):
        assert (a.token_ids, a.weights_version) == (b.token_ids, b.weights_version)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.vllm
def test_two_processes_answer_as_one_before_and_after_new_weights(engines, folder, changed):
    assert_equal_answers(*engines)
    before = engines[1].generate(prompts(6), num_samples=1, max_tokens=6, temperature=0.0)
    for weights, version in ((changed, 1), (read_folder(folder), 2)):
        for engine in engines:
            engine.load_weights(weights, version)
        assert_equal_answers(*engines)
        after = engines[1].generate(prompts(6), num_samples=1, max_tokens=6, temperature=0.0)
        tokens = [[[c.token_ids for c in row] for row in rows] for rows in (before, after)]
        assert (tokens[0] == tokens[1]) == (version == 2)


@pytest.mark.vllm
def test_two_processes_pass_the_gate_before_training(engines, folder):
    from rl_ft.parity import check

    weights = read_folder(folder)
    report = check(engines[1], weights, folder, prompts(6), max_tokens=4, bound=1e-4)
    assert report.visible_change > 4e-4


@pytest.mark.vllm
@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="written for a cluster without GPUs")
def test_a_generator_that_loses_a_process_is_replaced_and_leaves_none_behind(
    ray_cluster, folder, changed
):
    from rl_ft.actors import start_generators

    samplers = start_generators(config(2), folder)

    def answers() -> list[object]:
        asked = samplers.generate(prompts(3), num_samples=1, max_tokens=4, temperature=0.0)
        return asyncio.run(asked)

    def processes() -> list[psutil.Process]:
        until, found = time.monotonic() + GONE_S, []
        while len(found) != 2:
            assert time.monotonic() < until, found
            pid = asyncio.run(samplers.posts[0].insist("pid", timeout_s=300))
            with contextlib.suppress(psutil.NoSuchProcess):
                found = engine_processes(pid)
        return found

    asyncio.run(samplers.load(publish(changed, 1, ray.put)))
    before, first = answers(), processes()
    first[1].kill()
    assert answers() == before
    second = processes()
    assert are_gone(first)
    samplers.close()
    assert are_gone(second)


@pytest.mark.parametrize(
    ("gpus", "num_others", "each"), [(0, 1, 0.0), (4, 0, 2.0), (5, 1, 2.0), (8, 1, 2.0)]
)
def test_an_engine_asks_for_a_whole_gpu_for_each_of_its_processes(
    monkeypatch, gpus, num_others, each
):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": gpus})
    assert engine_gpus(2, 2, num_others=num_others) == each


def test_an_engine_of_several_processes_shares_no_gpu(monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": 4})
    with pytest.raises(UserError, match=r"tensor_parallel_size is 2.*expected 5 GPUs"):
        engine_gpus(2, 2, num_others=1)


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads"])
def test_every_process_has_as_many_heads(name):
    heads = {"num_attention_heads": 6, "num_key_value_heads": 6, name: 3}
    with pytest.raises(ValidationError, match=rf"{name} is 3.*the 2 processes"):
        Config.model_validate({"model": {"tiny": heads}, "generation": {"tensor_parallel_size": 2}})


def test_every_process_of_a_generator_counts_among_the_cpus():
    wide = {"generation": {"tensor_parallel_size": 2}, "ray": {"num_generators": 2}}
    with pytest.raises(ValidationError, match="want 6 CPUs"):
        Config.model_validate(wide)

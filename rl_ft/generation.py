"""The sampler: a vLLM engine in this process that turns prompt ids into Completions.

A plain synchronous class: it knows neither Ray nor traffic. One call is one batch. Weights change
only between calls, completely or not at all, and every completion carries their version.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from rl_ft.config import Config
from rl_ft.meeting import Offer, Place
from rl_ft.render import Renderer
from rl_ft.series import ENGINE
from rl_ft.types import Completion
from rl_ft.weights import check_complete, checkpoint_shapes

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput

log = logging.getLogger(__name__)

CPU_BLOCK_SIZE = 32
"""Tokens per block of the prefix cache; the default of 128 would share nothing of a short prompt
among its samples, which then costs three to four times as much."""


class Generator:
    """Samples from one version of the policy at a time.

    Example:
        generator = Generator("run/sft/model", config=config, seed=1)
        [[first, *others]] = generator.generate([prompt_ids], num_samples=8, max_tokens=16)
        generator.load_weights(model.state_dict(), version=1)
    """

    def __init__(self, model_path: str, *, config: Config, seed: int) -> None:
        self._shapes = checkpoint_shapes(model_path)
        self._renderer = Renderer(model_path, max_prompt_length=config.model.max_prompt_length)
        self._reproducible = config.generation.reproducible
        self._seed = seed
        self._num_processes = config.generation.tensor_parallel_size
        self._num_calls = 0
        self.version = 0
        _set_environment()
        import torch

        cuda = torch.cuda.is_available()
        if not cuda:
            # Else vLLM compiles a small function, and ends where there is no C++ compiler.
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        from vllm import LLM

        self._llm = LLM(
            model=str(model_path),
            seed=seed,
            # The tokenizer is rl_ft.render's; the engine sees ids only.
            skip_tokenizer_init=True,
            # Not the model's own top_p and the like: the log-probs feed a ratio.
            generation_config="vllm",
            disable_log_stats=not (config.monitor.engine and config.exports_ray_metrics),
            **_engine_settings(config, cuda=cuda),
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        temperature: float = 1.0,
        max_tokens: int,
        seed: int | None = None,
        greedy: Sequence[Sequence[int]] = (),
    ) -> list[list[Completion]]:
        """`num_samples` answers to each prompt, in the prompts' order; temperature 0 is greedy.
        Then the most likely answer to each prompt of `greedy`, whatever the temperature.

        With a seed (or `generation.reproducible`), a prompt's answers do not depend on what else is
        in the batch. Log-probs are the model's own, at temperature 1.
        """
        if temperature == 0 and num_samples > 1:
            raise ValueError(f"greedy answers are all the same, but {num_samples} were asked for")
        self._num_calls += 1
        if seed is None and self._reproducible:
            seed = hash((self._seed, self._num_calls))
        asked = [*prompts, *greedy]
        if not asked:
            return []
        ways = [(num_samples, temperature)] * len(prompts) + [(1, 0.0)] * len(greedy)
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in asked],
            [
                self._params(*way, max_tokens, request_seed)
                for way, request_seed in zip(ways, _request_seeds(asked, seed), strict=True)
            ],
            use_tqdm=False,
        )
        return [self._completions(output.outputs) for output in outputs]

    def load_weights(self, state_dict: Mapping[str, Tensor], version: int) -> None:
        """Answer with these weights from the next call on; refuses an incomplete set."""
        check_complete({name: tuple(t.shape) for name, t in state_dict.items()}, self._shapes)
        self._reload(state_dict)
        self.reset_prefix_cache()
        self.version = version

    def receive_weights(
        self, offer: Offer, place: Place, version: int, *, seat: int, anew: bool
    ) -> bool:
        """Answer with what a learner broadcasts to the engines in all seats (`rl_ft.transfer`);
        `anew` makes the group of them first. False if it did not come, not all of it, or altered:
        load it before anything is asked.

        Raises:
            RuntimeError: it did not come, and an engine of several processes does not survive that.
        """
        check_complete(dict(zip(offer.names, offer.shapes, strict=True)), self._shapes)
        try:
            self._receive(offer, place, seat=seat, anew=anew)
        except Exception:
            if self._num_processes > 1:
                raise
            log.warning("version %d did not come", version, exc_info=True)
            self._llm.collective_rpc("abandon_weight_update")
            return False
        sent = dict(zip(offer.names, offer.sums, strict=True))
        for came in self._llm.collective_rpc("received_sums"):
            if wrong := [name for name in sent if came.get(name) != sent[name]]:
                log.error(
                    "version %d arrived altered: %d of %d tensors, %s first",
                    *(version, len(wrong), len(sent), wrong[0]),
                )
                return False
        self.reset_prefix_cache()
        self.version = version
        return True

    def _receive(self, offer: Offer, place: Place, *, seat: int, anew: bool) -> None:
        if anew:
            group = {
                "master_address": place.host,
                "master_port": place.port,
                "rank_offset": 1 + seat * self._num_processes,
                "world_size": 1 + len(place.members) * self._num_processes,
                "packed": True,
            }
            self._llm.collective_rpc("shutdown_weight_transfer_engine")
            self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": group})
        coming = {
            "names": list(offer.names),
            "dtype_names": list(offer.dtypes),
            "shapes": [list(shape) for shape in offer.shapes],
        }
        self._llm.collective_rpc("start_weight_update")
        self._llm.collective_rpc("update_weights", kwargs={"update_info": coming})
        self._llm.collective_rpc("finish_weight_update")

    def reset_prefix_cache(self) -> None:
        """Forget the keys and values of earlier prompts: they belong to the weights they saw."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("the engine kept its prefix cache: a request is still running")

    def await_death(self) -> None:
        """Until a process of an engine of several has ended, which by itself none does."""
        wait([worker.proc.sentinel for worker in self._llm.llm_engine.model_executor.workers])

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def engine_figures(self) -> dict[str, float]:
        """What vLLM counts, by its own names: running requests, tokens so far, the share of the
        key-value cache. From any thread; empty unless `monitor.engine` is set."""
        if not self._llm.llm_engine.log_stats:
            return {}
        return {
            metric.name.removeprefix("vllm:"): float(metric.value)
            for metric in self._llm.get_metrics()
            if metric.name.removeprefix("vllm:") in ENGINE
        }

    def _reload(self, state_dict: Mapping[str, Tensor]) -> None:
        # The full state dict, the head included: a dropped tied head would keep its old values.
        # Each process of the engine is sent all of it and takes its part; this returns after all.
        self._llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": list(state_dict.items())}
        )

    def _params(
        self, num_samples: int, temperature: float, max_tokens: int, seed: int | None
    ) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            n=num_samples,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed,
            stop_token_ids=[self._renderer.eos_id],
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completions(self, outputs: Sequence[CompletionOutput]) -> list[Completion]:
        texts = self._renderer.decode_batch([output.token_ids for output in outputs])
        return [
            Completion(
                token_ids=tuple(output.token_ids),
                logprobs=tuple(
                    position[token].logprob
                    for token, position in zip(output.token_ids, output.logprobs, strict=True)
                ),
                text=text,
                finish_reason=output.finish_reason,
                weights_version=self.version,
            )
            for output, text in zip(outputs, texts, strict=True)
        ]


def _request_seeds(prompts: Sequence[Sequence[int]], seed: int | None) -> list[int | None]:
    """A seed per request, from the prompt's content: its place in the batch must not matter."""
    if seed is None:
        return [None] * len(prompts)
    seen: Counter[bytes] = Counter()
    seeds: list[int | None] = []
    for prompt in prompts:
        key = repr((seed, tuple(prompt))).encode()
        digest = hashlib.sha256(key + seen[key].to_bytes(4, "little")).digest()
        seeds.append(int.from_bytes(digest[:6], "little"))
        seen[key] += 1
    return seeds


def _set_environment() -> None:
    """What vLLM reads from the environment at its import; in this process and what it starts."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Binding threads to cores stalls for seconds as soon as anything else runs.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    # The processes of an engine of several are not forked off one that has threads.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    for name, value in (("OMP_NUM_THREADS", "1"), ("VLLM_LOGGING_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)


def _engine_settings(config: Config, *, cuda: bool) -> dict[str, object]:
    generation = config.generation
    settings: dict[str, object] = {
        "max_model_len": generation.max_model_len,
        "max_num_seqs": generation.max_num_seqs,
        "tensor_parallel_size": generation.tensor_parallel_size,
    }
    if config.ray.broadcasts:
        settings |= {
            "weight_transfer_config": {"backend": f"rl_ft_{config.ray.weight_transport}"},
            "worker_extension_cls": "rl_ft.receiving.Receiver",
        }
    if generation.tensor_parallel_size > 1:
        # In a Ray actor with a placement group vLLM would start actors of its own, elsewhere.
        settings["distributed_executor_backend"] = "mp"
    if cuda:
        settings |= {
            "dtype": config.model.dtype,
            "gpu_memory_utilization": generation.gpu_memory_utilization,
        }
    else:
        settings |= {
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": int(generation.kv_cache_gib * 2**30),
        }
    if generation.reproducible or not cuda:
        # A seeded request whose prompt is cut in chunks crashes the engine.
        settings |= {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, generation.max_model_len),
        }
    return settings

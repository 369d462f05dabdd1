"""What our generator costs beside plain `LLM.generate` on the same prompts.

Every side has a process of its own with the same prompts, samples and tokens: vLLM with its
defaults, vLLM with our settings, our `Generator` in process, and the same behind a Ray actor. They
take turns, so that a busy moment falls on all; together they need about 8 GB. A share is what
offline vLLM takes, with its defaults or with our settings, over what the side takes. Answers are
cut at `--tokens`; an untrained model hardly ever ends one earlier, so all sides do the same work.
Also printed: what one greedy call costs, which the closed loop pays at every decision.

    python scripts/bench/generate.py --prompts 48 --samples 8
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

SIDES = {
    "plain": "LLM.generate, vLLM's defaults",
    "tuned": "LLM.generate, our engine settings",
    "class": "Generator, in process",
    "seeded": "Generator, in process, seeded",
    "actor": "Generator, Ray actor",
}
GREEDY_PROMPTS = (4, 16, 48)
MARK = "turn:"
"""Begins a line that is meant for the parent; libraries print too."""

Call = Callable[[Sequence[Sequence[int]], int, float], None]
"""prompts, samples, temperature."""


def main() -> None:
    """Run every side in turn, then print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="a model folder; default: a fresh tiny model")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = arguments.model or _tiny(Path(folder) / "tiny")
        sides = {side: stack.enter_context(_Side(side, arguments, model)) for side in SIDES}
        rounds = [
            {side: process.turn() for side, process in sides.items()}
            for _ in range(arguments.repeats + 1)
        ]
    # The first round warms up.
    _print(rounds[1:], arguments)


def serve(arguments: argparse.Namespace) -> None:
    """One turn per line read: seconds of a sampling call and of greedy calls, as JSON."""
    call, close = _open(arguments)
    rng = random.Random(0)

    def seconds(num_prompts: int, num_samples: int, temperature: float) -> float:
        # New prompts every time: an old prompt would be in the prefix cache.
        prompts = [
            [rng.randrange(5, 600) for _ in range(arguments.prompt_tokens)]
            for _ in range(num_prompts)
        ]
        start = time.perf_counter()
        call(prompts, num_samples, temperature)
        return time.perf_counter() - start

    try:
        for _ in sys.stdin:
            turn = {
                "sample": seconds(arguments.prompts, arguments.samples, 1.0),
                **{f"greedy {n}": seconds(n, 1, 0.0) for n in GREEDY_PROMPTS},
            }
            print(MARK, json.dumps(turn), flush=True)
    finally:
        close()


def _open(arguments: argparse.Namespace) -> tuple[Call, Callable[[], None]]:
    """The side's way to generate, and how to end it."""
    from rl_ft.config import Config

    config = Config()
    if arguments.side in ("plain", "tuned"):
        return _open_llm(arguments, config)
    if arguments.side == "actor":
        return _open_actor(arguments, config)
    from rl_ft.generation import Generator

    generator = Generator(arguments.model, config=config, seed=1)
    seed = 7 if arguments.side == "seeded" else None

    def call(prompts: Sequence[Sequence[int]], num_samples: int, temperature: float) -> None:
        generator.generate(
            prompts,
            num_samples=num_samples,
            temperature=temperature,
            max_tokens=arguments.tokens,
            seed=seed,
        )

    return call, generator.close


def _open_llm(arguments: argparse.Namespace, config: Any) -> tuple[Call, Callable[[], None]]:
    """vLLM as its manual shows it: eager and in process like ours, the rest default or tuned."""
    from rl_ft import generation

    generation._set_environment()
    import torch
    from vllm import LLM, SamplingParams

    cuda = torch.cuda.is_available()
    settings = generation._engine_settings(config, cuda=cuda)
    if arguments.side == "plain":
        kept = ("dtype", "max_model_len", "enforce_eager", "kv_cache_memory_bytes")
        settings = {name: settings[name] for name in kept if name in settings}
    llm = LLM(model=arguments.model, **settings)

    def call(prompts: Sequence[Sequence[int]], num_samples: int, temperature: float) -> None:
        params = SamplingParams(
            n=num_samples, temperature=temperature, max_tokens=arguments.tokens, logprobs=0
        )
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        for output in llm.generate(requests, params, use_tqdm=False):
            assert len(output.outputs) == num_samples

    return call, llm.llm_engine.engine_core.shutdown


def _open_actor(arguments: argparse.Namespace, config: Any) -> tuple[Call, Callable[[], None]]:
    import ray

    from rl_ft.actors import GeneratorActor

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    actor = GeneratorActor.options(num_cpus=1).remote(arguments.model, config, 1)

    def call(prompts: Sequence[Sequence[int]], num_samples: int, temperature: float) -> None:
        reference = actor.generate.remote(
            [tuple(prompt) for prompt in prompts],
            num_samples=num_samples,
            temperature=temperature,
            max_tokens=arguments.tokens,
        )
        ray.get(reference)

    return call, ray.shutdown


class _Side:
    """A side's process."""

    def __init__(self, side: str, arguments: argparse.Namespace, model: str) -> None:
        self._name = SIDES[side]
        command = [sys.executable, __file__, "--side", side, "--model", model]
        for name in ("prompts", "prompt_tokens", "samples", "tokens", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed on the way out
        self._process = subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def turn(self) -> dict[str, float]:
        """Its next seconds, by what was asked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        self._errors.seek(0)
        raise SystemExit(f"{self._name} failed:\n{self._errors.read()[-3000:]}")

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        # Nothing more to read ends it.
        self._process.communicate()
        self._errors.close()


def _tiny(folder: Path) -> str:
    from rl_ft.sections import TinyModelConfig
    from rl_ft.tiny import build_tiny

    return str(build_tiny(folder, config=TinyModelConfig(), seed=1))


def _print(rounds: Sequence[dict[str, dict[str, float]]], arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{arguments.prompts} prompts x {arguments.prompt_tokens} tokens x "
        f"{arguments.samples} samples x {arguments.tokens} tokens, {arguments.threads} thread(s)",
        caption=f"medians over {len(rounds)} rounds; shares within a round",
    )
    table.add_column("")
    greedy = [f"greedy {n}" for n in GREEDY_PROMPTS]
    for column in ("s", "of defaults", "of our settings", *(f"{name}, ms" for name in greedy)):
        table.add_column(column, justify="right")

    def median(side: str, what: str) -> float:
        return statistics.median(turns[side][what] for turns in rounds)

    def share(side: str, of: str) -> float:
        return statistics.median(t[of]["sample"] / t[side]["sample"] for t in rounds)

    for side, name in SIDES.items():
        table.add_row(
            name,
            f"{median(side, 'sample'):.3f}",
            f"{share(side, 'plain'):.0%}",
            f"{share(side, 'tuned'):.0%}",
            *(f"{1e3 * median(side, what):.0f}" for what in greedy),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""A small real model and ragged groups of completions that it could have sampled.

Shared by the tests of packing, batch, trainer and learner.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from port_case import free_port

from rl_ft.config import Config
from rl_ft.sections import TinyModelConfig
from rl_ft.types import Completion, RolloutGroup

TINY = TinyModelConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    head_dim=16,
    num_attention_heads=2,
    num_key_value_heads=1,
)
GROUP_SIZE = 4


def config(**grpo) -> Config:
    """The defaults with a small group and these changes to `grpo`."""
    settings = {
        "num_generations": GROUP_SIZE,
        "groups_per_micro_batch": 100,
        "max_steps": 1,
        "warmup_steps": 0,
        "max_grad_norm": 1e9,
        "lr_scheduler_type": "constant",
        "max_completion_length": 9,
        "target_coef": 0.0,
        **grpo,
    }
    return Config.model_validate(
        {
            "grpo": settings,
            "rollout": {"counterfactuals": False},
            "ray": {"torch_threads": 1},
        }
    )


def completion(rng: random.Random, length: int) -> Completion:
    return Completion(
        token_ids=tuple(rng.randrange(5, 200) for _ in range(length)),
        logprobs=tuple(rng.uniform(-7.5, -6.0) for _ in range(length)),
        text="",
        finish_reason="stop",
        weights_version=0,
    )


def ragged_groups(
    num_groups: int = 5, *, seed: int = 0, masked: Sequence[tuple[int, int]] = ()
) -> list[RolloutGroup]:
    """Prompts of 3 to 20 tokens, completions of 1 to 9; `masked` names (group, row) that failed."""
    rng = random.Random(seed)
    groups = []
    for number in range(num_groups):
        prompt = tuple(rng.randrange(5, 200) for _ in range(rng.randint(3, 20)))
        valid = tuple((number, row) not in masked for row in range(GROUP_SIZE))
        advantages = tuple(rng.gauss(0, 1) if ok else 0.0 for ok in valid)
        groups.append(
            RolloutGroup(
                group_id=f"group {number}",
                prompt_ids=prompt,
                completions=tuple(completion(rng, rng.randint(1, 9)) for _ in valid),
                rewards=advantages,
                advantages=advantages,
                valid=valid,
                canonical=(True,) * GROUP_SIZE,
                times_given=(1,) * GROUP_SIZE,
            )
        )
    return groups


def model_folder(parent: Path) -> Path:
    """A small model whose weights are large enough for log-probs to differ between tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from rl_ft.tiny import build_tiny

    folder = build_tiny(parent / "model", config=TINY, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def in_two_ranks(function: Callable[..., None], *args: object) -> None:
    """Call `function(rank, *args)` in two processes that gloo connects.

    Forked, since importing TRL twice more would cost more than all that is tested in them; from a
    process that did nothing else, since an engine that was built in this one left its group behind.
    """
    import multiprocessing

    import torch

    multiprocessing.set_forkserver_preload([function.__module__])
    torch.multiprocessing.start_processes(
        _rank, args=(free_port(), function, args), nprocs=2, start_method="forkserver"
    )


def _rank(rank: int, port: int, function: Callable[..., None], args: tuple[object, ...]) -> None:
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    function(rank, *args)
    torch.distributed.destroy_process_group()

"""One optimiser step of the learner against stock TRL on the same batch, same process, same model.

Stock TRL repeats the prompt for every completion; the learner packs a group into one row. Both run
their own `train()`; the seconds are those of a whole step, the best of the measured ones. Tokens
are those of the answers, which the loss is over; memory is the most that PyTorch held on the GPU.

    python scripts/bench/learner.py [--groups 16] [--sizes 8,16] [--threads 1] [--steps 3]
    python scripts/bench/learner.py --model 4b --peak-tflops 989     # on a GPU, with random weights
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from rl_ft.config import Config
from rl_ft.sections import TinyModelConfig
from rl_ft.types import Completion, RolloutGroup

SHAPES: dict[str, dict[str, int]] = {
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
"""Qwen2.5-0.5B's and Qwen3-4B's dimensions, in Qwen3's architecture."""
VOCABULARY = 151_936
ANSWER_TOKENS = 6
PROMPT_TOKENS = (105, 135)


def ready_groups(num_groups: int, group_size: int, vocabulary: int) -> list[RolloutGroup]:
    """Random prompts of about 120 tokens with answers of 6: cost does not depend on content."""
    rng = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(5, vocabulary) for _ in range(length))

    groups = []
    for number in range(num_groups):
        advantages = tuple(rng.gauss(0, 1) for _ in range(group_size))
        completions = tuple(
            Completion(
                token_ids=tokens(ANSWER_TOKENS),
                logprobs=(-6.8,) * ANSWER_TOKENS,
                text="",
                finish_reason="stop",
                weights_version=0,
            )
            for _ in range(group_size)
        )
        groups.append(
            RolloutGroup(
                group_id=str(number),
                prompt_ids=tokens(rng.randint(*PROMPT_TOKENS)),
                completions=completions,
                rewards=advantages,
                advantages=advantages,
                valid=(True,) * group_size,
                canonical=(True,) * group_size,
                times_given=(1,) * group_size,
            )
        )
    return groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One way to train, on one batch."""

    step_s: float
    """Of the best step."""
    loss: float
    """Of the first one."""
    metrics: dict[str, float]
    """The learner's own, of the best step."""
    memory_gib: float
    """Most that was held on the GPU; 0 without one."""
    num_parameters: int


def build_model(size: str, folder: Path) -> Path:
    """A model folder with random weights and the tiny tokenizer."""
    from rl_ft.tiny import build_tiny, build_tokenizer

    if size == "tiny":
        return build_tiny(folder, config=TinyModelConfig(), seed=1)
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(1)
    shape = Qwen3Config(**SHAPES[size], vocab_size=VOCABULARY, tie_word_embeddings=True)
    Qwen3ForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def measure(kind: str, folder: Path, config: Config, groups: Sequence[RolloutGroup]) -> Measured:
    """Train as `kind` does, packed or stock."""
    import torch
    from transformers import TrainerCallback
    from transformers.trainer_utils import SaveStrategy

    from rl_ft.learner import build_trainer, load_model
    from rl_ft.trainer import GRPOTrainer

    clock: list[float] = []
    metrics: list[dict[str, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            clock.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            clock.append(time.perf_counter())

    model, tokenizer = load_model(folder, config)
    trainer = build_trainer(
        model=model,
        tokenizer=tokenizer,
        config=config,
        output_dir=folder.parent / kind,
        fetch=lambda _: groups,
        publish=lambda *_: None,
        on_metrics=lambda _, values: metrics.append(values),
        num_groups=len(groups),
    )
    if kind == "stock":
        # The same trainer, with TRL's own forward in place of the packed one.
        stock_forward = GRPOTrainer._get_per_token_logps_and_entropies.__get__(trainer)

        def forward(*args: object, **kwargs: object) -> tuple:
            logps, entropies, aux = stock_forward(*args, **kwargs)
            trainer._forward = (logps, entropies)
            return logps, entropies, aux

        trainer._get_per_token_logps_and_entropies = forward
    trainer.add_callback(Clock())
    trainer.args.save_strategy = SaveStrategy.NO
    gc.collect()  # a trainer before this one is a cycle
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    steps = [end - begin for begin, end in zip(clock[::2], clock[1::2], strict=True)]
    best = min(range(len(steps)), key=steps.__getitem__)
    return Measured(
        step_s=steps[best],
        loss=metrics[0]["loss"],
        metrics=metrics[best],
        memory_gib=torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        num_parameters=sum(p.numel() for p in model.parameters()),
    )


def cells(
    way: Measured, groups: Sequence[RolloutGroup], *, peak_tflops: float, packed: bool
) -> list[str]:
    """Step, tokens, parts, memory, and the share of the card's rate that was reached.

    Forward and backward take six operations per parameter and token that goes through the model
    (Kaplan et al. 2020): every answer, and the prompt once if packed, else once for each.
    """
    answered = sum(len(c.token_ids) for group in groups for c in group.completions)
    prompts = sum(
        len(group.prompt_ids) * (1 if packed else len(group.completions)) for group in groups
    )
    rate = 6 * way.num_parameters * (answered + prompts) / way.step_s
    return [
        f"{way.step_s:.2f}",
        f"{answered / way.step_s:.0f}",
        f"{way.metrics['learner/forward_s']:.2f}",
        f"{way.metrics['learner/backward_s']:.2f}",
        f"{way.memory_gib:.1f}" if way.memory_gib else "-",
        f"{rate / (peak_tflops * 1e12):.1%}" if peak_tflops else "-",
    ]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--sizes", default="8,16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", choices=("tiny", *SHAPES), default="tiny")
    parser.add_argument(
        "--peak-tflops", type=float, default=0.0, help="the card's dense bf16 rate, for the share"
    )
    parser.add_argument("--groups-per-micro-batch", type=int, default=8)
    arguments = parser.parse_args()

    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {arguments.threads} thread(s)"
    table = Table(title=f"{arguments.model}, {arguments.groups} groups, {device}")
    for column in ("G", "way", "step s", "tokens/s", "forward s", "backward s"):
        table.add_column(column, justify="right")
    for column in ("GiB", "share of peak", "ratio", "loss diff"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as place:
        folder = build_model(arguments.model, Path(place, "model"))
        for size in map(int, arguments.sizes.split(",")):
            grpo = {
                "num_generations": size,
                "max_steps": arguments.steps,
                "groups_per_micro_batch": arguments.groups_per_micro_batch,
                # Stock TRL knows none.
                "target_coef": 0.0,
            }
            dtype = "float32" if arguments.model == "tiny" else "bfloat16"
            config = Config.model_validate({"grpo": grpo, "model": {"dtype": dtype}})
            groups = ready_groups(arguments.groups, size, vocabulary=300)
            found = {kind: measure(kind, folder, config, groups) for kind in ("stock", "packed")}
            for kind, way in found.items():
                table.add_row(
                    str(size),
                    kind,
                    *cells(way, groups, peak_tflops=arguments.peak_tflops, packed=kind == "packed"),
                    f"{found['stock'].step_s / way.step_s:.1f}",
                    f"{abs(found['stock'].loss - way.loss):.1e}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()

"""One optimiser step of the learner against stock TRL on the same batch, same process, same model.

Stock TRL repeats the prompt for every completion; the learner packs a group into one row. Both run
their own `train()`; the seconds are those of a whole step, the best of the measured ones.

    python scripts/bench/learner.py [--groups 16] [--sizes 8,16] [--threads 1] [--steps 3]
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console
from rich.table import Table

from rl_ft.config import Config, TinyModelConfig
from rl_ft.types import Completion, RolloutGroup

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


def measure(
    kind: str, folder: Path, config: Config, groups: Sequence[RolloutGroup]
) -> tuple[float, float, dict[str, float]]:
    """Seconds of the best step, loss of the first one, and the learner's own timing."""
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
    trainer.train()
    steps = [end - begin for begin, end in zip(clock[::2], clock[1::2], strict=True)]
    best = min(range(len(steps)), key=steps.__getitem__)
    return steps[best], metrics[0]["loss"], metrics[best]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--sizes", default="8,16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--groups-per-micro-batch", type=int, default=8)
    arguments = parser.parse_args()

    import torch
    from transformers.utils.logging import disable_progress_bar

    from rl_ft.tiny import build_tiny

    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    table = Table(title=f"{arguments.groups} groups, {arguments.threads} thread(s), CPU")
    for column in (
        "G",
        "stock TRL s",
        "learner s",
        "ratio",
        "forward s",
        "backward s",
        "loss diff",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as place:
        folder = build_tiny(Path(place, "model"), config=TinyModelConfig(), seed=1)
        for size in map(int, arguments.sizes.split(",")):
            grpo = {
                "num_generations": size,
                "max_steps": arguments.steps,
                "groups_per_micro_batch": arguments.groups_per_micro_batch,
                # Stock TRL knows none.
                "surprise_coef": 0.0,
            }
            config = Config.model_validate({"grpo": grpo})
            groups = ready_groups(arguments.groups, size, vocabulary=300)
            packed = measure("packed", folder, config, groups)
            stock = measure("stock", folder, config, groups)
            table.add_row(
                str(size),
                f"{stock[0]:.2f}",
                f"{packed[0]:.2f}",
                f"{stock[0] / packed[0]:.1f}",
                f"{packed[2]['learner/forward_s']:.2f}",
                f"{packed[2]['learner/backward_s']:.2f}",
                f"{abs(stock[1] - packed[1]):.1e}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()

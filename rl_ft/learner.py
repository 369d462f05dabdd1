"""The learner: builds the trainer from the configuration and runs it under Ray Train.

One optimiser step = one weights version. Checkpoints hold the whole trainer state (weights,
optimiser, schedule, random state), appear whole or not at all, and a restarted worker goes on from
the newest. Groups come in and weights go out through plain callables; where they lead is not the
learner's business. TRL is imported only when a trainer is built.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from envs.errors import UserError
from rl_ft.buffer import TrainingEnded
from rl_ft.checkpoints import latest_checkpoint
from rl_ft.cluster import ROOM_ATTEMPTS, gpu_share, on_this_node
from rl_ft.config import Config

if TYPE_CHECKING:
    from ray.train import Result
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import GRPOConfig

    from rl_ft.sections import RayConfig
    from rl_ft.trainer import BeforeUpdate, Fetch, OnMetrics, PackedGRPOTrainer, Publish

log = logging.getLogger(__name__)

START_S = 1800.0
"""What a learner may take to load a large model and publish it."""
STOP_S = 120.0
"""What one that hangs may take to be gone."""
POLL_S = 0.5

SHARED_WITH_TRL = (
    "max_steps",
    "num_generations",
    "max_completion_length",
    "learning_rate",
    "warmup_steps",
    "lr_scheduler_type",
    "adam_beta2",
    "weight_decay",
    "max_grad_norm",
    "loss_type",
    "importance_sampling_level",
    "epsilon",
    "epsilon_high",
    "beta",
    "entropy_coef",
    "gradient_checkpointing",
    "save_steps",
)
"""Fields of `config.grpo` that are handed to TRL under the same name."""

POINTER_FILE = "checkpoint.json"
"""All that a Ray checkpoint holds: where the trainer's own checkpoint is."""


class TrainConfig(TypedDict):
    """What the worker needs; travels through Ray, so it holds plain values and callables."""

    config: dict[str, Any]
    """`Config.model_dump()`."""
    model_path: str
    """Hugging Face folder that training starts from, also when it is resumed."""
    output_dir: str
    """Checkpoints; on storage that every node sees."""
    num_groups: int
    """Per optimiser step, over all ranks."""
    fetch: Fetch
    publish: Publish
    on_metrics: OnMetrics
    before_update: NotRequired[BeforeUpdate]
    """Is shown each step's mean |trainer - sampler| before the update; raises to prevent it."""
    before_checkpoint: NotRequired[Callable[[int], None]]
    """Returns once the metrics up to the step are on disk: a checkpoint never outruns them."""


def grpo_args(config: Config, *, output_dir: str | Path, num_groups: int) -> GRPOConfig:
    """TRL's arguments: names that `config.grpo` shares with TRL mean what TRL says they mean.

    `num_groups` are those of all ranks together.
    """
    import torch

    from rl_ft.sharding import TRAINER_ARGS
    from rl_ft.trainer import GRPOConfig

    grpo = config.grpo
    in_ranks = torch.distributed.is_initialized()
    num_own = math.ceil(num_groups / (torch.distributed.get_world_size() if in_ranks else 1))
    num_micro_batches = math.ceil(num_own / grpo.groups_per_micro_batch)
    groups_per_micro_batch = math.ceil(num_own / num_micro_batches)
    on_gpu = torch.cuda.is_available()
    sharded = config.ray.learner_sharding != "none"
    return GRPOConfig(
        output_dir=str(output_dir),
        seed=config.seed,
        per_device_train_batch_size=groups_per_micro_batch * grpo.num_generations,
        gradient_accumulation_steps=num_micro_batches,
        **{name: getattr(grpo, name) for name in SHARED_WITH_TRL},
        # Of the policy as it is: what the sampler says of its answers is at temperature 1.
        temperature=1.0,
        use_cpu=not on_gpu,
        # Accelerate would hold, and publish, shards in float32.
        bf16=on_gpu and config.model.dtype == "bfloat16" and not sharded,
        ddp_backend=torch.distributed.get_backend() if in_ranks else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
        save_strategy="steps",
        logging_steps=1,
        # A NaN must be seen, not averaged away.
        logging_nan_inf_filter=False,
        # The clock has no data to skip; the random state is restored either way.
        ignore_data_skip=True,
        report_to=[],
        disable_tqdm=True,
        **(TRAINER_ARGS if sharded else {}),
    )


def build_trainer(
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    output_dir: str | Path,
    fetch: Fetch,
    publish: Publish,
    on_metrics: OnMetrics,
    num_groups: int,
    on_checkpoint: Callable[[Path], None] | None = None,
    before_update: BeforeUpdate | None = None,
    before_checkpoint: Callable[[int], None] | None = None,
) -> PackedGRPOTrainer:
    """A trainer over `model`, which must hold the weights that training starts from.

    `publish` is called once when training begins (version 0, or the resumed checkpoint's), so that
    the sampler can never be behind, and then after every optimiser step.
    """
    from transformers import PrinterCallback

    from rl_ft.adapter import lora_adapter
    from rl_ft.optimizer import use_muon
    from rl_ft.target import Target
    from rl_ft.trainer import PackedGRPOTrainer

    coef = config.grpo.target_coef
    target = Target(coef=coef, temperature=config.grpo.target_temperature) if coef else None
    trainer = PackedGRPOTrainer(
        model=model,
        args=grpo_args(config, output_dir=output_dir, num_groups=num_groups),
        processing_class=tokenizer,
        fetch=fetch,
        publish=publish,
        on_metrics=on_metrics,
        on_checkpoint=on_checkpoint,
        before_update=before_update,
        before_checkpoint=before_checkpoint,
        target=target,
        num_checkpoints=config.grpo.save_total_limit,
        adapter_only=config.ray.weight_transport == "adapter",
        peft_config=lora_adapter(config.model.lora),
    )
    use_muon(
        trainer,
        config.grpo.muon_ratio,
        lr=config.grpo.learning_rate,
        betas=(0.9, config.grpo.adam_beta2),
        weight_decay=config.grpo.weight_decay,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_model(
    model_path: str | Path, config: Config
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a Hugging Face folder, ready to be packed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(model_path),
            dtype=getattr(torch, config.model.dtype),
            attn_implementation="sdpa",
        )
        tokenizer = AutoTokenizer.from_pretrained(str(model_path))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_path} is not a Hugging Face model folder with a causal language model and its "
            f"tokenizer ({str(error).splitlines()[0]}); check model.name_or_path."
        ) from error
    return model, tokenizer


def train_loop(train_config: TrainConfig) -> None:
    """What each Ray Train worker runs: build, resume if there is a checkpoint, train to the end."""
    import ray.train
    import torch
    from transformers.utils.logging import disable_progress_bar

    config = Config.model_validate(train_config["config"])
    torch.set_num_threads(config.ray.torch_threads)
    disable_progress_bar()
    model, tokenizer = load_model(train_config["model_path"], config)
    last: dict[str, float] = {}

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        last.update(metrics, step=step)
        train_config["on_metrics"](step, metrics)

    def on_checkpoint(path: Path) -> None:
        # The checkpoint already lies where the run keeps them: Ray gets a pointer, not a copy.
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, POINTER_FILE).write_text(json.dumps({"path": str(path)}))
            ray.train.report(dict(last), checkpoint=ray.train.Checkpoint.from_directory(folder))

    trainer = build_trainer(
        model=model,
        tokenizer=tokenizer,
        config=config,
        output_dir=train_config["output_dir"],
        fetch=train_config["fetch"],
        publish=train_config["publish"],
        on_metrics=on_metrics,
        num_groups=train_config["num_groups"],
        on_checkpoint=on_checkpoint,
        before_update=train_config.get("before_update"),
        before_checkpoint=train_config.get("before_checkpoint"),
    )
    train(trainer, latest_checkpoint(train_config["output_dir"]))


def train(trainer: PackedGRPOTrainer, resume_from: Path | None) -> None:
    """To the last step, or to the one at which `fetch` raises `TrainingEnded`.

    Either way a checkpoint of the end is left, so that a resumed run finds nothing to train.
    """
    try:
        trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    except TrainingEnded:
        end = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
        if latest_checkpoint(trainer.args.output_dir) != end:
            trainer._save_checkpoint(trainer.model, None)


def run_learner(
    train_config: TrainConfig,
    *,
    storage_path: str | Path,
    num_cpus: float,
    num_gpus: float,
    max_failures: int,
    num_workers: int = 1,
    placement_strategy: str = "PACK",
    name: str = "learner",
) -> Result:
    """Train in Ray Train workers to the end, restarted up to `max_failures` times if one dies.

    Blocks. Resources are those of each worker. Raises `ray.train.TrainingFailedError` with the
    worker's cause when it gives up.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train_loop,
        train_loop_config=dict(train_config),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            placement_strategy=placement_strategy,
            use_gpu=num_gpus > 0,
            resources_per_worker={"CPU": num_cpus, "GPU": num_gpus},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage_path),
            failure_config=FailureConfig(
                max_failures=max_failures, controller_failure_limit=ROOM_ATTEMPTS
            ),
        ),
    )
    return trainer.fit()


class LearnerError(Exception):
    """A learner that hung could not be replaced, or hung more often than `ray.max_failures`."""


class RemoteLearner:
    """A fit in a process of its own on this node: in a thread it could not be stopped.

    `ended` has the cause when Ray Train has given up. Who dies is replaced by Ray Train; who lives
    and does nothing, by `look_after`.
    """

    def __init__(self, train_config: TrainConfig, config: Config, storage_path: str | Path) -> None:
        self._settings = config.ray
        self._train_config, self._storage_path = train_config, storage_path
        self._num_gpus = gpu_share(config.num_gpu_holders)
        self._num_hung = 0
        self._begin()

    def _begin(self) -> None:
        import ray

        fit = ray.remote(_fit).options(
            num_cpus=0, max_retries=0, scheduling_strategy=on_this_node()
        )
        self._task = fit.remote(
            self._train_config, self._settings, self._storage_path, self._num_gpus
        )
        self.ended: Future[None] = self._task.future()
        self.fed(begun=False)

    async def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, once it has or the time is up."""
        # Polled: a future made for each wait would be left with an error that nobody takes.
        until = time.monotonic() + timeout_s
        while not self.ended.done() and time.monotonic() < until:
            await asyncio.sleep(min(POLL_S, timeout_s))
        return self.ended.done()

    def fed(self, *, begun: bool) -> None:
        """From now on it has all that it needs to publish; whether it has done so before."""
        self._since, self._begun = time.monotonic(), begun

    async def look_after(self) -> None:
        """Begin it again, from its newest checkpoint, if it has been silent for too long.

        Raises:
            LearnerError: it does not end, or has hung too often.
        """
        settings = self._settings
        timeout_s = settings.learner_timeout_s if self._begun else START_S
        if time.monotonic() - self._since <= timeout_s:
            return
        self._num_hung += 1
        cause = f"the learner had its groups and published nothing for {timeout_s:g} s"
        self.stop()
        if not await self.wait(STOP_S):
            raise LearnerError(f"{cause}, and does not end")
        if not self.ended.cancelled() and self.ended.exception() is None:
            return
        if self._num_hung > settings.max_failures:
            raise LearnerError(f"{cause}, {self._num_hung} times; is ray.learner_timeout_s enough?")
        log.warning("%s; it begins again from its newest checkpoint", cause)
        self._begin()

    def stop(self) -> None:
        """Wherever it is; nothing happens if it has ended. Does not wait.

        Ray Train takes this for Ctrl-C and gives back what it holds. Were its process killed, what
        cleans up would ask the dashboard, which a private cluster has not, whether it still lives.
        """
        import ray

        ray.cancel(self._task)


def _fit(
    train_config: TrainConfig, settings: RayConfig, storage_path: str | Path, num_gpus: float
) -> None:
    run_learner(
        train_config,
        storage_path=storage_path,
        num_cpus=settings.cpus_per_learner,
        num_gpus=num_gpus,
        max_failures=settings.max_failures,
        num_workers=settings.num_learners,
        placement_strategy=settings.placement_strategy,
    )

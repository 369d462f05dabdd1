"""Supervised warm start: the base model learns to answer as a teacher does, before it explores.

One Ray Train fit serves all teachers, one after the other, because starting a fit costs more than
training a tiny model. A finished teacher is an ordinary Hugging Face folder `sft/<teacher>/`; it
appears whole or not at all, so a resumed run skips it. Rows are tokenised by the same renderer as
rollouts; TRL tokenises nothing and masks everything but the answer. No vLLM here.
"""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from envs.errors import UserError
from rl_ft.cluster import ROOM_ATTEMPTS, gpu_share, in_thread, ray_session
from rl_ft.config import Config
from rl_ft.dataset import read_lessons
from rl_ft.monitor import MetricLog, Relay
from rl_ft.progress import Progress
from rl_ft.question import write_question
from rl_ft.render import Renderer
from rl_ft.rows import SftRow
from rl_ft.run_folder import RunFolder, appearing, replace_folder
from rl_ft.sinks import open_sinks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that carries no loss."""
SUMMARY_FILE = "sft.json"
"""In the model folder: how training ended, and how often the model answers as its teacher."""

OnMetrics = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row as the model sees it: `labels` repeats the answer's ids and ignores the prompt."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherJob:
    """Everything the worker needs to train on one teacher; plain paths, so it travels."""

    teacher: str
    model_dir: str
    train_file: str
    eval_file: str
    out_dir: str


def train_sft(config: Config, folder: RunFolder) -> None:
    """Train a model for every teacher of the configuration that has none yet.

    Needs `model/` and `data/` as `prepare` writes them; leaves `sft/<teacher>/`.
    """
    jobs = [job for job in teacher_jobs(config, folder) if not is_complete(Path(job.out_dir))]
    for job in jobs:
        _require_inputs(job)
    for job in jobs:
        if job.teacher == "given":
            _publish_given(config, job)
    jobs = [job for job in jobs if job.teacher != "given"]
    if not jobs:
        return
    total = sum(num_steps(config, job) for job in jobs)
    with ray_session(config), open_sinks(config, folder.root) as sinks:
        relay = Relay(folder.root, [f"sft/{job.teacher}" for job in jobs], sinks)
        poll = partial(_follow, relay=relay)
        with Progress("sft", total=total, unit="steps", poll=poll):
            _fit(config, jobs, folder)
        relay()
    for job in jobs:
        log.info("sft/%s: %s", job.teacher, (Path(job.out_dir) / SUMMARY_FILE).read_text())


def teacher_jobs(config: Config, folder: RunFolder) -> list[TeacherJob]:
    """One job per configured teacher, finished or not."""
    return [
        TeacherJob(
            teacher=teacher,
            model_dir=str(folder.path("model")),
            train_file=str(folder.path("data", f"sft_{teacher}.jsonl")),
            eval_file=str(folder.path("data", f"eval_{teacher}.jsonl")),
            out_dir=str(folder.path("sft", teacher)),
        )
        for teacher in config.prepare.teachers
    ]


def num_steps(config: Config, job: TeacherJob) -> int:
    """Optimiser steps that training on a teacher takes."""
    with Path(job.train_file).open(encoding="utf-8") as rows:
        num_batches = math.ceil(sum(1 for _ in rows) / config.sft.per_device_train_batch_size)
    return math.ceil(config.sft.num_train_epochs * num_batches)


def is_complete(model_dir: Path) -> bool:
    """The folder was published: its summary is written before the folder gets its name."""
    return (model_dir / SUMMARY_FILE).is_file()


def _publish_given(config: Config, job: TeacherJob) -> None:
    """The model of `prepare` is the start as it is."""
    with appearing(Path(job.out_dir)) as folder:
        shutil.copytree(job.model_dir, folder, dirs_exist_ok=True)
        write_question(folder, config)
        (folder / SUMMARY_FILE).write_text("{}\n", encoding="utf-8")
    log.info("sft/%s: the model as it is", job.teacher)


def with_label_noise(rows: Sequence[SftRow], share: float, seed: int) -> list[SftRow]:
    """Rows of which a share got another legal answer; a row with a single legal one stays."""
    rng = random.Random(seed)
    noisy = []
    for row in rows:
        others = [answer for answer in row.legal_answers if answer != row.answer]
        if rng.random() < share and others:
            row = row.answered(rng.choice(others))
        noisy.append(row)
    return noisy


def tokenise(rows: Sequence[SftRow], renderer: Renderer) -> list[Example]:
    """Prompt and answer ids; a prompt beyond the limit is an error, as it would be in a rollout."""
    examples = []
    for row in rows:
        prompt, answer = renderer.prompt_ids(row.prompt), renderer.answer_ids(row.answer)
        labels = (IGNORED,) * len(prompt) + answer
        examples.append(Example(input_ids=prompt + answer, labels=labels))
    return examples


def fit_teacher(config: Config, job: TeacherJob, *, on_metrics: OnMetrics) -> dict[str, float]:
    """Train, measure and publish one model in this process; returns its summary."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(config.seed)
    renderer = Renderer(job.model_dir, max_prompt_length=config.model.max_prompt_length)
    rows = with_label_noise(
        read_lessons(Path(job.train_file)), config.sft.label_noise, seed=config.seed
    )
    examples = tokenise(rows, renderer)
    held_out = tokenise(read_lessons(Path(job.eval_file)), renderer)

    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    dtype = getattr(torch, config.model.dtype)
    model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=dtype)
    work_dir = Path(f"{job.out_dir}.partial")
    shutil.rmtree(work_dir, ignore_errors=True)
    trained, last = _train(config, model, tokenizer, examples, work_dir, on_metrics)

    summary = {"train/rows": float(len(examples)), "train/loss": last["loss"]}
    if held_out:
        summary |= answer_accuracy(trained, held_out, pad_id=renderer.pad_id)
    on_metrics(int(last["step"]), summary)
    trained.save_pretrained(work_dir)
    tokenizer.save_pretrained(work_dir)
    write_question(work_dir, config)
    (work_dir / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    replace_folder(work_dir, Path(job.out_dir))
    return summary


def answer_accuracy(
    model: PreTrainedModel, examples: Sequence[Example], *, pad_id: int, batch_size: int = 32
) -> dict[str, float]:
    """Share of answers that greedy decoding would give exactly as the teacher does.

    One forward pass: greedy decoding repeats the answer if and only if, with the answer fed in,
    every one of its tokens is the most likely next one.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    model.eval()
    num_exact = num_tokens = num_right = 0
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids = [torch.tensor(example.input_ids) for example in batch]
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        }
        labels = [torch.tensor(example.labels) for example in batch]
        wanted = pad_sequence(labels, batch_first=True, padding_value=IGNORED)[:, 1:]
        with torch.no_grad():
            logits = model(
                **{name: value.to(model.device) for name, value in inputs.items()}
            ).logits
        counted = wanted != IGNORED
        right = (logits[:, :-1].argmax(-1).cpu() == wanted) & counted
        num_exact += int((right.sum(1) == counted.sum(1)).sum())
        num_right += int(right.sum())
        num_tokens += int(counted.sum())
    return {
        "eval/answer_accuracy": num_exact / len(ordered),
        "eval/token_accuracy": num_right / num_tokens,
    }


def _train(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    work_dir: Path,
    on_metrics: OnMetrics,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The trained model, adapters merged, and the last figures logged."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from rl_ft.adapter import lora_adapter
    from rl_ft.optimizer import use_muon

    reporter = _reporter(on_metrics)
    trainer = SFTTrainer(
        model=model,
        args=_arguments(config, work_dir),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [list(example.input_ids) for example in examples],
                "labels": [list(example.labels) for example in examples],
            }
        ),
        processing_class=tokenizer,
        peft_config=lora_adapter(config.model.lora),
        callbacks=[reporter],
    )
    use_muon(
        trainer,
        config.sft.muon_ratio,
        lr=config.sft.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.sft.weight_decay,
    )
    trainer.remove_callback(PrinterCallback)
    with _head_on_answers_only():
        trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if config.model.lora is not None:
        trained = trained.merge_and_unload()
    return trained, reporter.last


@contextmanager
def _head_on_answers_only() -> Iterator[None]:
    """Score only the positions that carry loss, on CPU as on GPU.

    Where there is no Triton, TRL pushes every position through the language-model head, so that
    shapes stay the same for compilers. Nothing is compiled here, and a prompt is 20 times as long
    as an answer: the head was half of the step. The loss is the same.
    """
    from trl.trainer import utils

    original = utils._use_triton
    utils._use_triton = lambda device: True
    try:
        yield
    finally:
        utils._use_triton = original


def _arguments(config: Config, work_dir: Path) -> Any:
    """TRL's `SFTConfig` of this run: no checkpoints, no evaluation."""
    import torch
    from trl import SFTConfig

    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(work_dir),
        seed=config.seed,
        num_train_epochs=config.sft.num_train_epochs,
        per_device_train_batch_size=config.sft.per_device_train_batch_size,
        learning_rate=config.sft.learning_rate,
        warmup_steps=config.sft.warmup_ratio,
        lr_scheduler_type="cosine",
        weight_decay=config.sft.weight_decay,
        max_length=None,
        # Not by length: all tellings of a state are equally long and would fill a batch.
        train_sampling_strategy="random",
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=on_gpu,
        bf16=config.model.dtype == "bfloat16",
        use_cpu=not on_gpu,
        ddp_backend=torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        ddp_find_unused_parameters=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def _reporter(on_metrics: OnMetrics) -> TrainerCallback:
    """A callback that passes on what TRL logs, under our names, and keeps the last."""
    from transformers import TrainerCallback

    names = {
        "loss": "loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
        "entropy": "entropy",
        "mean_token_accuracy": "train/token_accuracy",
    }

    class Reporter(TrainerCallback):
        last: dict[str, float]

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **rest: Any
        ) -> None:
            values = {name: float(logs[key]) for key, name in names.items() if key in logs}
            if "loss" in values:
                self.last = {"step": float(state.global_step), **values}
                on_metrics(state.global_step, values)

    return Reporter()


def _fit(config: Config, jobs: Sequence[TeacherJob], folder: RunFolder) -> None:
    """One Ray Train fit for all jobs, in the running Ray session."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    num_gpus = gpu_share(1)
    resources = {"CPU": config.ray.cpus_per_learner, "GPU": num_gpus}
    trainer = TorchTrainer(
        _worker_loop,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "jobs": list(jobs),
            "run_dir": str(folder.root),
        },
        scaling_config=ScalingConfig(
            num_workers=1, use_gpu=num_gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder.path("sft").absolute()),
            failure_config=FailureConfig(
                max_failures=config.ray.max_failures, controller_failure_limit=ROOM_ATTEMPTS
            ),
        ),
    )
    in_thread(trainer.fit, "sft").result()


def _follow(progress: Progress, *, relay: Relay) -> None:
    """What the worker has written so far, which may be on another machine."""
    done, figures = 0, {}
    for stage, record in relay().items():
        lines = [m for m in record if "loss" in m["values"]]
        if lines:
            done += lines[-1]["step"]
            teacher = stage.removeprefix("sft/")
            figures = {"teacher": teacher, "loss": f"{lines[-1]['values']['loss']:.3f}"}
    if done != progress.done:
        progress.update(done, **figures)


def _worker_loop(loop: dict[str, Any]) -> None:
    """What the Ray Train worker runs: every unfinished job, in order."""
    import ray.train
    import torch

    config = Config.model_validate(loop["config"])
    torch.set_num_threads(config.sft.torch_threads)
    with MetricLog(Path(loop["run_dir"])) as record:
        # Again after a restart: what it finished before stays.
        for job in (job for job in loop["jobs"] if not is_complete(Path(job.out_dir))):
            stage = f"sft/{job.teacher}"
            record.rewind(stage, 0)
            summary = fit_teacher(config, job, on_metrics=partial(record.log, stage))
            ray.train.report({"teacher": job.teacher, **summary})


def _require_inputs(job: TeacherJob) -> None:
    """Say in one sentence which file of `prepare` is missing."""
    for file in (Path(job.model_dir) / "config.json", Path(job.train_file), Path(job.eval_file)):
        if not file.is_file():
            raise UserError(
                f"Supervised training on {job.teacher} expects {file}, which is not there: run "
                "`rl-ft prepare` with the same --out first."
            )
    if Path(job.train_file).stat().st_size == 0:
        raise UserError(f"{job.train_file} has no rows: run `rl-ft prepare` with the same --out.")

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import grpo_case
import pytest
import torch
from grpo_case import config, in_two_ranks, model_folder, ragged_groups
from torch.distributed.tensor import DTensor

from envs.errors import UserError
from rl_ft.buffer import TrainingEnded
from rl_ft.checkpoints import checkpoint_steps, latest_checkpoint
from rl_ft.cluster import gpu_share
from rl_ft.config import Config
from rl_ft.learner import (
    POINTER_FILE,
    TrainConfig,
    build_trainer,
    grpo_args,
    load_model,
    run_learner,
    train,
)
from rl_ft.merging import merge
from rl_ft.weights import fetch, publish, read_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("learner"))


class Run:
    """A trainer with everything that came out of it."""

    def __init__(self, folder: Path, output_dir: Path, conf: Config, num_groups: int = 3) -> None:
        self.fetched: list[int] = []
        self.published: list[tuple[int, dict[str, torch.Tensor]]] = []
        self.metrics: dict[int, dict[str, float]] = {}
        self.saved: list[Path] = []
        self.before_saving: list[tuple[int, int, bool]] = []
        self.num_groups = num_groups
        self.model, tokenizer = load_model(folder, conf)
        self.trainer = build_trainer(
            model=self.model,
            tokenizer=tokenizer,
            config=conf,
            output_dir=output_dir,
            fetch=self.fetch,
            publish=lambda state, version: self.published.append(
                (version, {name: tensor.clone() for name, tensor in state.items()})
            ),
            on_metrics=self.metrics.__setitem__,
            num_groups=num_groups,
            on_checkpoint=self.saved.append,
            before_checkpoint=lambda step: self.before_saving.append(
                (step, max(self.metrics, default=0), (output_dir / f"checkpoint-{step}").exists())
            ),
        )

    def fetch(self, step):
        self.fetched.append(step)
        return ragged_groups(self.num_groups, seed=step)

    def train(self, checkpoint=None):
        self.trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return self


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def with_lora(conf, **lora):
    return Config.model_validate(conf.model_dump() | {"model": {"lora": {"r": 4, **lora}}})


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Four steps, checkpoints at two and four."""
    conf = config(max_steps=4, save_steps=2, learning_rate=1e-2, groups_per_micro_batch=2)
    return Run(folder, tmp_path_factory.mktemp("run"), conf).train()


def test_every_step_fetches_its_own_groups_once(run):
    assert run.fetched == [0, 1, 2, 3]


def test_the_starting_weights_and_every_step_are_published_once(run):
    assert [version for version, _ in run.published] == [0, 1, 2, 3, 4]


def test_before_a_checkpoint_its_step_was_reported(run):
    assert run.before_saving == [(2, 2, False), (4, 4, False)]


def test_what_is_published_is_the_whole_model(run, folder):
    fresh, _ = load_model(folder, config())
    assert equal(run.published[0][1], fresh.state_dict())
    assert equal(run.published[-1][1], run.model.state_dict())
    assert not equal(run.published[0][1], run.published[1][1])


def test_metrics_come_with_every_step(run):
    assert list(run.metrics) == [1, 2, 3, 4]
    expected = {
        "loss",
        "grad_norm",
        "learning_rate",
        "entropy",
        "clip_ratio/region_mean",
        "mismatch/mean_abs_logp_diff",
        "mismatch/max_abs_logp_diff",
        "mismatch/mean_logp_diff",
        "learner/forward_s",
        "learner/backward_s",
        "learner/fetch_s",
        "learner/publish_s",
        "learner/step_s",
    }
    for metrics in run.metrics.values():
        assert expected <= metrics.keys()
        assert all(isinstance(value, float) for value in metrics.values())


def test_the_mismatch_is_trainer_minus_sampler_before_the_step(run, folder):
    model, _ = load_model(folder, config())
    differences = []
    for group in ragged_groups(3, seed=0):
        for answer in group.completions:
            ids = torch.tensor([group.prompt_ids + answer.token_ids])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1]
            scores = torch.log_softmax(logits, -1)[range(len(answer.token_ids)), answer.token_ids]
            differences.append(scores - torch.tensor(answer.logprobs))
    difference = torch.cat(differences)
    first = run.metrics[1]
    assert first["mismatch/mean_abs_logp_diff"] == pytest.approx(
        difference.abs().mean().item(), rel=1e-4
    )
    assert first["mismatch/max_abs_logp_diff"] == pytest.approx(
        difference.abs().max().item(), rel=1e-4
    )
    assert first["mismatch/mean_logp_diff"] == pytest.approx(difference.mean().item(), rel=1e-4)


def test_checkpoints_are_whole_folders_and_leave_nothing_beside_them(run):
    output_dir = Path(run.trainer.args.output_dir)
    assert sorted(p.name for p in output_dir.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert run.saved == [output_dir / "checkpoint-2", output_dir / "checkpoint-4"]
    names = {p.name for p in (output_dir / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names


def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(run, folder, tmp_path):
    shutil.copytree(Path(run.trainer.args.output_dir) / "checkpoint-2", tmp_path / "checkpoint-2")
    conf = config(max_steps=4, save_steps=2, learning_rate=1e-2, groups_per_micro_batch=2)
    resumed = Run(folder, tmp_path, conf).train(latest_checkpoint(tmp_path))
    assert resumed.fetched == [2, 3]
    assert [version for version, _ in resumed.published] == [2, 3, 4]
    assert equal(resumed.published[0][1], run.published[2][1])
    assert equal(resumed.published[-1][1], run.published[-1][1])


def test_a_run_that_is_done_only_publishes_its_weights_again(run, folder):
    conf = config(max_steps=4, save_steps=2, learning_rate=1e-2, groups_per_micro_batch=2)
    output_dir = Path(run.trainer.args.output_dir)
    again = Run(folder, output_dir, conf).train(latest_checkpoint(output_dir))
    assert again.fetched == []
    assert [version for version, _ in again.published] == [4]
    assert equal(again.published[0][1], run.published[-1][1])


def test_a_learning_rate_of_zero_moves_nothing(folder, tmp_path):
    conf = config(max_steps=2, learning_rate=0.0, weight_decay=0.1)
    run = Run(folder, tmp_path, conf).train()
    assert equal(run.published[0][1], run.published[2][1])
    assert run.metrics[1]["grad_norm"] > 0


def test_the_entropy_coefficient_raises_entropy(folder, tmp_path):
    ends = []
    for coefficient in (0.0, 1.0):
        conf = config(max_steps=6, learning_rate=3e-3, entropy_coef=coefficient)
        run = Run(folder, tmp_path / str(coefficient), conf)
        run.fetch = run.trainer._fetch = lambda _: ragged_groups(3)
        ends.append(run.train().metrics[6]["entropy"])
    assert ends[1] > ends[0] + 1e-3


def test_the_reference_is_what_training_started_from_even_after_a_resume(folder, tmp_path):
    conf = config(max_steps=2, save_steps=1, learning_rate=1e-2, beta=0.1)
    run = Run(folder, tmp_path, conf).train()
    assert run.metrics[1]["kl"] == pytest.approx(0, abs=1e-9)
    assert run.metrics[2]["kl"] > 1e-4
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = Run(folder, tmp_path, conf).train(latest_checkpoint(tmp_path))
    assert resumed.metrics[2]["kl"] == pytest.approx(run.metrics[2]["kl"], rel=1e-6)
    fresh, _ = load_model(folder, config())
    assert equal(resumed.trainer.ref_model.state_dict(), fresh.state_dict())


def test_an_adapter_is_published_merged_under_the_names_of_the_model(folder, tmp_path):
    conf = with_lora(config(max_steps=2, learning_rate=1e-2, beta=0.1))
    run = Run(folder, tmp_path, conf).train()
    fresh, _ = load_model(folder, conf)
    assert equal(run.published[0][1], fresh.state_dict())
    version, state = run.published[-1]
    assert version == 2
    assert run.metrics[2]["kl"] > 0
    plain, _ = load_model(folder, conf)
    plain.load_state_dict(state, strict=True)
    ids = torch.tensor([[5, 9, 17, 33]])
    with torch.no_grad():
        merged, adapted = plain(ids).logits, run.trainer.model.eval()(ids).logits
        start = fresh(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-5, rtol=1e-5)
    assert (merged - start).abs().max() > 1e-3


def test_an_adapter_that_travels_alone_makes_the_same_model(folder, tmp_path):
    conf = with_lora(config(max_steps=2, learning_rate=1e-2))
    whole = Run(folder, tmp_path / "whole", conf).train()
    ray = conf.ray.model_copy(update={"weight_transport": "adapter"})
    alone = Run(folder, tmp_path / "alone", conf.model_copy(update={"ray": ray})).train()
    version, adapter = alone.published[-1]
    ref = publish(adapter, version, lambda arrays: arrays, base=str(folder))
    came = fetch(ref, lambda payload: payload)
    assert sum(t.numel() for t in adapter.values()) < sum(t.numel() for t in came.values()) / 2
    expected = whole.published[-1][1]
    assert came.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(came[name], tensor, atol=1e-6, rtol=1e-6)
    assert not equal(came, alone.published[0][1])


def test_an_adapter_of_named_modules_touches_nothing_else(folder, tmp_path):
    conf = with_lora(config(learning_rate=1e-2), target_modules=("q_proj",))
    run = Run(folder, tmp_path, conf).train()
    before, after = run.published[0][1], run.published[-1][1]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("q_proj" in name for name in changed)


def test_an_adapter_can_be_resumed(folder, tmp_path):
    conf = with_lora(config(max_steps=2, save_steps=1, learning_rate=1e-2))
    run = Run(folder, tmp_path, conf).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    resumed = Run(folder, tmp_path, conf).train(latest_checkpoint(tmp_path))
    assert equal(resumed.published[-1][1], run.published[-1][1])


@pytest.mark.parametrize(
    ("num_groups", "per_micro_batch", "steps", "rows"),
    [(48, 16, 3, 64), (5, 100, 1, 20), (10, 4, 3, 16), (3, 2, 2, 8)],
)
def test_micro_batches_hold_whole_groups(tmp_path, num_groups, per_micro_batch, steps, rows):
    conf = config(groups_per_micro_batch=per_micro_batch)
    args = grpo_args(conf, output_dir=tmp_path, num_groups=num_groups)
    assert args.gradient_accumulation_steps == steps
    assert args.per_device_train_batch_size == rows


def test_names_shared_with_trl_keep_their_values(tmp_path):
    conf = config(epsilon_high=0.4, adam_beta2=0.95, lr_scheduler_type="cosine")
    args = grpo_args(conf, output_dir=tmp_path, num_groups=5)
    assert (args.epsilon_high, args.adam_beta2) == (0.4, 0.95)
    # The sampler's log-probs are at temperature 1.
    assert args.temperature == 1.0
    assert args.lr_scheduler_type == "cosine"
    assert args.report_to == []


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a Hugging Face model folder"):
        load_model(tmp_path, config())


def test_the_learner_can_be_imported_without_trl():
    import subprocess

    code = "import sys, rl_ft.learner; print({'torch', 'trl', 'ray', 'peft'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


class Recorder:
    """Callables that a worker process can carry; what they see goes to a file."""

    def __init__(self, folder: Path, die_at: int | None) -> None:
        self.folder, self.die_at = folder, die_at

    def fetch(self, step):
        marker = self.folder / "died"
        if step == self.die_at and not marker.exists():
            marker.touch()
            os._exit(1)
        return ragged_groups(4, seed=step)

    def publish(self, state, version):
        torch.save({n: t.clone() for n, t in state.items()}, self.folder / f"{version}.pt")
        self.note("publish", version)

    def on_metrics(self, step, metrics):
        self.note("metrics", step)

    def note(self, kind, number):
        with (self.folder / "notes.jsonl").open("a") as notes:
            notes.write(json.dumps([kind, number, time.time()]) + "\n")


CLIPPED_WITH_KL = {
    "max_steps": 4,
    "save_steps": 2,
    "learning_rate": 1e-2,
    # Muon works in bfloat16, which would hide everything else.
    "muon_ratio": None,
    "max_grad_norm": 0.5,
    "beta": 0.5,
}
"""Gradients are clipped and KL has a reference: neither may see a part for the whole."""


def sharded(conf, **ray):
    settings = {"num_learners": 2, "learner_sharding": "fsdp", **ray}
    return Config.model_validate(conf.model_dump() | {"ray": conf.ray.model_dump() | settings})


def fit(conf, folder, place, num_workers, die_at=None):
    """What the last step reported, and the weights of every version."""
    place.mkdir()
    recorder = Recorder(place, die_at)
    result = run_learner(
        TrainConfig(
            config=conf.model_dump(mode="json"),
            model_path=str(folder),
            output_dir=str(place / "checkpoints"),
            num_groups=4,
            fetch=recorder.fetch,
            publish=recorder.publish,
            on_metrics=recorder.on_metrics,
        ),
        storage_path=place / "ray",
        num_cpus=1,
        num_gpus=gpu_share(1),
        max_failures=1,
        num_workers=num_workers,
    )
    notes = [json.loads(line)[:2] for line in (place / "notes.jsonl").open()]
    versions = [number for kind, number in notes if kind == "publish"]
    assert versions == ([0, 1, 2, 3, 2, 3, 4] if die_at else [0, 1, 2, 3, 4])
    assert result.metrics["step"] == 4
    pointer = json.loads((Path(result.checkpoint.path) / POINTER_FILE).read_text())
    assert Path(pointer["path"]) == place / "checkpoints" / "checkpoint-4"
    return result.metrics, [torch.load(place / f"{version}.pt") for version in range(5)]


@pytest.fixture(scope="module")
def whole_life(ray_cluster, folder, tmp_path_factory):
    """Configuration, metrics and weights of one rank that lives."""
    from ray import cloudpickle

    for module in (sys.modules[__name__], grpo_case):
        cloudpickle.register_pickle_by_value(module)
    conf = config(**CLIPPED_WITH_KL)
    return conf, *fit(conf, folder, tmp_path_factory.mktemp("fit") / "whole", 1)


@pytest.mark.ray
@pytest.mark.parametrize(("num_ranks", "sharding"), [(1, "none"), (2, "fsdp")])
def test_a_killed_worker_resumes_and_ends_with_the_same_weights(
    whole_life, folder, tmp_path, num_ranks, sharding
):
    """The same as one rank that lives, on one and on two ranks of which one dies.

    Sums over two ranks round differently, and where a gradient is next to nothing Adam makes a step
    of its sign: of all that training changed, the difference is a small part. Gradients that are
    too large by a factor would not show in Adam's steps, but do in their norm.
    """
    conf, expected, (begin, *_, end) = whole_life
    conf = conf if sharding == "none" else sharded(conf)
    metrics, (first, *_, last) = fit(conf, folder, tmp_path / "killed", num_ranks, die_at=3)
    assert equal(first, begin)
    assert last.keys() == end.keys()
    if num_ranks == 1:
        assert equal(last, end)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    for name, tensor in last.items():
        changed = (end[name] - begin[name]).norm()
        assert changed > 0
        assert (tensor - end[name]).norm() < 0.02 * changed


def train_in_rank(rank, conf, folder, out):
    """Four steps, and the last two again and again, from the checkpoint in between."""
    for name, transport in (("straight", None), ("resumed", None), ("alone", "adapter")):
        if transport is not None:
            conf = sharded(conf, weight_transport=transport)
        run = Run(folder, out, conf, num_groups=4)
        run.train(latest_checkpoint(out))
        assert all(isinstance(part, DTensor) for part in run.trainer.model.parameters())
        assert rank == 0 or not run.published
        torch.distributed.barrier()
        if rank == 0:
            torch.save((dict(run.published), run.metrics), out / f"{name}.pt")
            shutil.rmtree(out / "checkpoint-4")
        torch.distributed.barrier()


def test_an_adapter_in_shards_is_that_of_one_rank_and_resumes_to_the_bit(folder, tmp_path):
    conf = with_lora(config(**CLIPPED_WITH_KL, gradient_checkpointing=True))
    in_two_ranks(train_in_rank, sharded(conf), folder, tmp_path)
    one = Run(folder, tmp_path / "one", conf, num_groups=4).train()
    straight, metrics = torch.load(tmp_path / "straight.pt")
    for version, expected in one.published:
        assert straight[version].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(straight[version][name], tensor, atol=1e-4, rtol=1e-3)
    for step, came in metrics.items():
        assert came["grad_norm"] == pytest.approx(one.metrics[step]["grad_norm"], rel=1e-3)
    resumed, _ = torch.load(tmp_path / "resumed.pt")
    assert list(resumed) == [2, 3, 4]
    assert equal(resumed[4], straight[4])
    alone, _ = torch.load(tmp_path / "alone.pt")
    for name, tensor in merge(read_folder(folder), alone[4]).items():
        torch.testing.assert_close(tensor, straight[4][name], atol=1e-6, rtol=1e-6)


# ---- an end before the last step


def ends_at(last: int):
    def fetch(step):
        if step == last:
            raise TrainingEnded
        return ragged_groups(3, seed=step)

    return fetch


@pytest.mark.parametrize("save_steps", [2, 3])
def test_an_end_that_is_asked_for_leaves_a_checkpoint_to_which_nothing_is_added(
    folder, tmp_path, save_steps
):
    conf = config(max_steps=9, save_steps=save_steps, learning_rate=1e-2)
    run = Run(folder, tmp_path, conf)
    run.trainer._fetch = ends_at(2)
    train(run.trainer, None)
    assert checkpoint_steps(tmp_path)[-1] == 2
    again = Run(folder, tmp_path, conf)
    again.trainer._fetch = ends_at(2)
    train(again.trainer, latest_checkpoint(tmp_path))
    assert [version for version, _ in again.published] == [2]
    assert equal(again.published[0][1], run.published[-1][1])
    assert checkpoint_steps(tmp_path)[-1] == 2

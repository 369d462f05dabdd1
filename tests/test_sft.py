from __future__ import annotations

import json
import signal
from contextlib import nullcontext
from pathlib import Path

import pytest
from lesson_case import answer, write_rows

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.dataset import read_lessons
from rl_ft.question import asked_as_taught
from rl_ft.render import Renderer
from rl_ft.rows import SftRow
from rl_ft.run_folder import RunFolder
from rl_ft.sft import (
    IGNORED,
    SUMMARY_FILE,
    TeacherJob,
    answer_accuracy,
    fit_teacher,
    is_complete,
    teacher_jobs,
    tokenise,
    train_sft,
    with_label_noise,
)


def small_config(**sft: object) -> Config:
    return Config.model_validate(
        {
            "model": {
                "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
            },
            "prepare": {"teachers": ["max_pressure"]},
            "sft": {"per_device_train_batch_size": 16, **sft},
            "ray": {"torch_threads": 1},
        }
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    from rl_ft.tiny import build_tiny

    return build_tiny(
        tmp_path_factory.mktemp("base") / "model", config=small_config().model.tiny, seed=1
    )


@pytest.fixture(scope="module")
def renderer(model_dir):
    return Renderer(str(model_dir), max_prompt_length=512)


def job_in(folder: Path, model_dir: Path, *, num: int = 64, num_eval: int = 8) -> TeacherJob:
    return TeacherJob(
        teacher="max_pressure",
        model_dir=str(model_dir),
        train_file=str(write_rows(folder / "data" / "sft_max_pressure.jsonl", num=num)),
        eval_file=str(write_rows(folder / "data" / "eval_max_pressure.jsonl", num=num_eval)),
        out_dir=str(folder / "sft" / "max_pressure"),
    )


def test_only_the_answer_and_its_end_carry_loss(tmp_path, renderer):
    rows = read_lessons(write_rows(tmp_path / "rows.jsonl", num=1))
    (example,) = tokenise(rows, renderer)
    prompt = tuple(renderer.prompt_ids(rows[0].prompt))
    learnt = tuple(label for label in example.labels if label != IGNORED)
    assert example.input_ids == prompt + learnt
    assert learnt == tuple(renderer.answer_ids(rows[0].answer))
    assert example.labels[: len(prompt)] == (IGNORED,) * len(prompt)


def test_a_prompt_over_the_limit_is_refused_not_cut(tmp_path, model_dir):
    rows = read_lessons(write_rows(tmp_path / "rows.jsonl", num=1))
    with pytest.raises(UserError, match="max_prompt_length is 20"):
        tokenise(rows, Renderer(str(model_dir), max_prompt_length=20))


def test_a_broken_row_is_named_by_its_line(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", num=2)
    file.write_text(file.read_text() + '{"id": "x"}\n')
    with pytest.raises(UserError, match="row 3"):
        read_lessons(file)


def taught(number: int, said: str, *legal: str) -> SftRow:
    return SftRow(
        id=str(number),
        messages=({"role": "user"}, {"role": "assistant", "content": answer(said)}),
        legal_answers=tuple(map(answer, legal)),
        cost_veh_s={},
    )


def test_label_noise_replaces_the_asked_share_by_other_legal_answers():
    rows = [taught(i, "A", "A", "B") for i in range(1000)]
    noisy = with_label_noise(rows, 0.2, seed=1)
    assert 150 < sum(row.answer == answer("B") for row in noisy) < 250
    assert noisy == with_label_noise(rows, 0.2, seed=1)
    assert with_label_noise(rows, 0.0, seed=1) == rows


def test_label_noise_leaves_a_row_with_one_legal_answer():
    row = taught(1, "A", "A")
    assert with_label_noise([row] * 50, 0.9, seed=1) == [row] * 50


def test_accuracy_is_what_greedy_decoding_would_reach(tmp_path, model_dir, renderer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    rows = read_lessons(write_rows(tmp_path / "rows.jsonl", num=12))
    own = []
    for row in rows:
        prompt = torch.tensor([list(renderer.prompt_ids(row.prompt))])
        with torch.no_grad():
            ids = model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=-1)
        own.append(ids[0, prompt.shape[1] :].tolist())
    examples = tokenise(rows, renderer)
    spoken = [
        type(example)(
            input_ids=example.input_ids[: example.labels.count(IGNORED)] + tuple(ids),
            labels=(IGNORED,) * example.labels.count(IGNORED) + tuple(ids),
        )
        for example, ids in zip(examples, own, strict=True)
    ]
    pad_id = model.config.pad_token_id
    assert answer_accuracy(model, spoken, pad_id=pad_id, batch_size=5) == {
        "eval/answer_accuracy": 1.0,
        "eval/token_accuracy": 1.0,
    }
    assert answer_accuracy(model, examples, pad_id=pad_id)["eval/answer_accuracy"] == 0.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("run")
    job = job_in(folder, model_dir, num=400, num_eval=40)
    log: list[tuple[int, dict[str, float]]] = []
    config = small_config(num_train_epochs=2, learning_rate=4e-3)
    summary = fit_teacher(
        config, job, on_metrics=lambda step, values: log.append((step, dict(values)))
    )
    return job, log, summary


def test_training_learns_the_answer_format_and_some_of_the_task(trained):
    _, log, summary = trained
    losses = [values["loss"] for _, values in log if "loss" in values]
    assert losses[-1] < 0.4 * losses[0]
    assert summary["eval/token_accuracy"] > 0.7
    assert summary["eval/answer_accuracy"] > 0.3


def test_the_metric_log_ends_with_the_accuracy_on_held_out_states(trained):
    _, log, summary = trained
    steps = [step for step, _ in log]
    assert steps == sorted(steps)
    assert steps[-1] == 50
    assert log[-1][1] == summary


def test_what_is_left_is_an_ordinary_model_folder(trained, renderer):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job, _, summary = trained
    out = Path(job.out_dir)
    assert is_complete(out)
    assert json.loads((out / SUMMARY_FILE).read_text()) == summary
    assert not Path(f"{job.out_dir}.partial").exists()
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out),
        AutoTokenizer.from_pretrained(out),
    )
    examples = tokenise(read_lessons(Path(job.eval_file)), renderer)
    again = answer_accuracy(model, examples, pad_id=tokenizer.pad_token_id)
    assert again["eval/answer_accuracy"] == summary["eval/answer_accuracy"]


def test_adapters_are_merged_into_an_ordinary_model(tmp_path, model_dir):
    from safetensors.torch import load_file

    plain = small_config(num_train_epochs=1).model_dump()
    config = Config.model_validate({**plain, "model": {**plain["model"], "lora": {"r": 4}}})
    job = job_in(tmp_path, model_dir, num=32, num_eval=0)
    summary = fit_teacher(config, job, on_metrics=lambda step, values: None)
    before = load_file(model_dir / "model.safetensors")
    after = load_file(Path(job.out_dir) / "model.safetensors")
    assert set(before) == set(after)
    moved = {name for name in before if not before[name].equal(after[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in moved
    assert "model.embed_tokens.weight" not in moved
    assert "eval/answer_accuracy" not in summary


def test_missing_inputs_name_the_stage_that_makes_them(tmp_path):
    with pytest.raises(UserError, match="rl-ft prepare"):
        train_sft(small_config(), RunFolder(root=tmp_path, config=small_config()))


def test_an_empty_training_set_is_refused(tmp_path, model_dir):
    job_in(tmp_path, model_dir, num=0)
    (tmp_path / "model").symlink_to(model_dir)
    with pytest.raises(UserError, match="has no rows"):
        train_sft(small_config(), RunFolder(root=tmp_path, config=small_config()))


def test_finished_teachers_are_skipped_without_starting_anything(tmp_path):
    config = small_config()
    (job,) = teacher_jobs(config, RunFolder(root=tmp_path, config=small_config()))
    Path(job.out_dir).mkdir(parents=True)
    (Path(job.out_dir) / SUMMARY_FILE).write_text("{}")
    train_sft(config, RunFolder(root=tmp_path, config=config))


def test_a_given_model_is_the_start_as_it_is(tmp_path, model_dir):
    config = small_config()
    prepare = config.prepare.model_copy(update={"teachers": ("given",)})
    config = config.model_copy(update={"prepare": prepare})
    folder = RunFolder(root=tmp_path, config=config)
    (tmp_path / "model").symlink_to(model_dir)
    for split in ("sft", "eval"):
        write_rows(folder.path("data", f"{split}_given.jsonl"), num=2)
    train_sft(config, folder)
    start = folder.path("sft", "given")
    assert is_complete(start)
    assert asked_as_taught(start, config) == config
    weights = "model.safetensors"
    assert (start / weights).read_bytes() == (model_dir / weights).read_bytes()


@pytest.mark.ray
def test_one_fit_under_ray_train_serves_both_teachers(tmp_path, model_dir):
    config = small_config(num_train_epochs=1)
    teachers = ("max_pressure", "lookahead")
    config = config.model_copy(
        update={"prepare": config.prepare.model_copy(update={"teachers": teachers})}
    )
    folder = RunFolder(root=tmp_path, config=config)
    (tmp_path / "model").symlink_to(model_dir)
    for seed, teacher in enumerate(teachers):
        write_rows(folder.path("data", f"sft_{teacher}.jsonl"), num=48, seed=seed)
        write_rows(folder.path("data", f"eval_{teacher}.jsonl"), num=8, seed=seed)
    on_interrupt = signal.getsignal(signal.SIGINT)
    train_sft(config, folder)
    # Ray Train would keep Ctrl-C for itself, and later stages would never hear of it.
    assert signal.getsignal(signal.SIGINT) is on_interrupt
    assert all(is_complete(folder.path("sft", teacher)) for teacher in teachers)
    lines = folder.path("metrics.jsonl").read_text().splitlines()
    stages = {json.loads(line)["stage"] for line in lines}
    assert stages == {"sft/max_pressure", "sft/lookahead"}


def test_scoring_answers_only_changes_no_loss(tmp_path, model_dir, monkeypatch):
    def losses(folder: Path) -> list[float]:
        seen: list[float] = []
        job = job_in(folder, model_dir, num=48, num_eval=0)
        fit_teacher(
            small_config(num_train_epochs=1),
            job,
            on_metrics=lambda step, values: seen.append(values.get("loss", 0.0)),
        )
        return seen

    compact = losses(tmp_path / "compact")
    monkeypatch.setattr("rl_ft.sft._head_on_answers_only", nullcontext)
    assert compact == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)

"""The pipeline on small data: 50 rows and 20 lessons of a real simulation, ten steps of each stage.

`scripts/run_integration_test.sh` has run it already and names the folder; else it is run here.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from envs import dialect
from envs.answers import Parsed, parse
from rl_ft.dataset import read_lessons, read_states
from rl_ft.generation import Generator
from rl_ft.monitor import read_metrics
from rl_ft.recipe import read_config
from rl_ft.render import Renderer
from rl_ft.states import collect_states

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS, NUM_LESSONS, NUM_STEPS = 50, 20, 10
FRESH = ("generated:1001-1003",)
"""Cities that neither base nor run has seen."""
START = "max_pressure"


def call(log, *command):
    with log.open("w") as out:
        done = subprocess.run(
            [*map(str, command)], stdout=out, stderr=out, timeout=900, cwd=ROOT, check=False
        )
    assert done.returncode == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The folder with `base`, `testdata` and `run`, which everything here only looks at."""
    if "RLFT_SMALL_SCALE" in os.environ:
        return Path(os.environ["RLFT_SMALL_SCALE"])
    folder = tmp_path_factory.mktemp("small")
    rl_ft = Path(sys.executable).with_name("rl-ft")
    base, run = ("--out", folder / "base"), ("--out", folder / "run")
    chosen = {
        "prepare.dataset": folder / "testdata" / "data",
        "model.name_or_path": folder / "base" / "sft" / START,
    }
    settings = [word for key, value in chosen.items() for word in ("--set", f"{key}={value}")]
    commands = [
        (rl_ft, "prepare", "--recipe", "small-base", *base),
        (rl_ft, "sft", *base),
        (sys.executable, "scripts/prepare_test_data.py", "--out", folder / "testdata"),
        (rl_ft, "prepare", "--recipe", "small-scale", *settings, *run),
        (rl_ft, "sft", *run),
        (rl_ft, "grpo", *run),
    ]
    for number, command in enumerate(commands, start=1):
        call(folder / f"local-{number}.log", *command)
    return folder


@pytest.fixture(scope="module")
def config(small):
    return read_config(small / "run" / "config.yaml")


def steps_of(small, stage):
    return [m for m in read_metrics(small / "run", stage) if "loss" in m["values"]]


def test_the_data_is_what_was_asked_for(small):
    data = small / "testdata"
    rows = json.loads((data / "small_grpo_dataset.json").read_text())
    assert len(rows) == NUM_ROWS == len({row["id"] for row in rows})
    lessons = json.loads((data / "small_sft_dataset.json").read_text())
    lines = (data / "small_sft_dataset.jsonl").read_text().splitlines()
    assert lessons == [json.loads(line) for line in lines]
    assert len(lessons) == NUM_LESSONS
    assert all(row["messages"][-1]["role"] == "assistant" for row in lessons)
    assert len(read_states(data / "data")) == NUM_ROWS
    assert len(read_lessons(data / "data" / f"sft_{START}.jsonl")) == NUM_LESSONS


def test_the_supervised_start_takes_its_steps_with_a_finite_loss(small):
    steps = steps_of(small, f"sft/{START}")
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    losses = [step["values"]["loss"] for step in steps]
    assert all(map(math.isfinite, losses))


def test_reinforcement_takes_its_steps_with_a_finite_loss(small):
    steps = steps_of(small, f"grpo/{START}")
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all(math.isfinite(step["values"]["loss"]) for step in steps)


def test_no_log_holds_an_error(small):
    """Neither what the commands printed nor what the runs noted."""
    logs = [*small.glob("local-*.log"), small / "base" / "run.log", small / "run" / "run.log"]
    assert len(logs) > 6
    assert [(log.name, line) for log in logs for line in log.open() if "ERROR" in line] == []


def test_reward_statistics_are_there_and_not_all_zero(small):
    steps = [step["values"] for step in steps_of(small, f"grpo/{START}")]
    for name in ("avg_format_reward", "avg_tsc_reward", "avg_final_reward", "format_accuracy"):
        assert all(math.isfinite(values[name]) for values in steps)
    assert any(values["avg_tsc_reward"] for values in steps)
    for values in steps:
        counts = [values[f"format/{kind}"] for kind in ("strict", "partial", "invalid")]
        assert sum(counts) > 0
        assert values["format_accuracy"] == counts[0] / sum(counts)


def test_the_output_is_what_peft_and_transformers_load(small):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = small / "run" / "grpo" / START / "model"
    assert load_file(model / "model.safetensors")
    _, loading = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not any(loading.values())
    checkpoint = small / "run" / "grpo" / START / "checkpoints" / f"checkpoint-{NUM_STEPS}"
    settings = json.loads((checkpoint / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    base = AutoModelForCausalLM.from_pretrained(small / "run" / "sft" / START)
    adapted = PeftModel.from_pretrained(base, checkpoint)
    moved = [p.abs().sum() for n, p in adapted.named_parameters() if "lora_B" in n]
    assert any(float(total) > 0 for total in moved)


@pytest.mark.vllm
def test_on_fresh_states_every_answer_through_vllm_is_in_the_format(small, config):
    fresh = config.model_copy(update={"seed": 77})
    fresh = fresh.model_copy(
        update={"scenarios": config.scenarios.model_copy(update={"train": FRESH})}
    )
    decisions = [state.decision for state in collect_states(fresh)]
    model = str(small / "run" / "grpo" / START / "model")
    renderer = Renderer(model, max_prompt_length=config.model.max_prompt_length)
    prompts = [renderer.prompt_ids(dialect.messages(d, instructions=False)) for d in decisions]
    generator = Generator(model, config=config, seed=1)
    try:
        answers = generator.generate(prompts, num_samples=1, temperature=0.0, max_tokens=16)
    finally:
        generator.close()
    parsed = [parse(d, a.text) for d, (a,) in zip(decisions, answers, strict=True)]
    assert [isinstance(answer, Parsed) and answer.strict for answer in parsed] == [True] * len(
        decisions
    )

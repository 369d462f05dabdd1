"""What differs on a GPU: the device of learner and sampler, their precision, and who has how much.

Skipped without a CUDA device.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from grpo_case import model_folder, ragged_groups

from rl_ft.config import Config
from rl_ft.monitor import read_metrics

pytestmark = pytest.mark.gpu

BOUNDS = {"float32": 1e-3, "bfloat16": 5e-2}
"""What the gate is set to for a precision (`parity.max_logprob_diff`)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("gpu"))


def test_loss_and_gradient_on_a_gpu_are_those_of_stock_trl(folder, tmp_path):
    from test_trainer import packed, stock

    groups = ragged_groups()
    (loss, gradient, _), (its_loss, its_gradient, _) = (
        kind(folder, groups, tmp_path) for kind in (packed, stock)
    )
    assert gradient.is_cuda
    assert loss == pytest.approx(its_loss, abs=1e-4)
    assert (gradient - its_gradient).norm() < 1e-2 * its_gradient.norm()


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", BOUNDS)
def test_trainer_and_sampler_agree_on_a_gpu(folder, dtype):
    from rl_ft.generation import Generator
    from rl_ft.parity import check
    from rl_ft.weights import read_folder

    config = Config.model_validate(
        {
            "model": {"max_prompt_length": 200, "dtype": dtype},
            "generation": {"max_model_len": 256, "gpu_memory_utilization": 0.2},
        }
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 200) for _ in range(90)] for _ in range(6)]
    generator = Generator(str(folder), config=config, seed=1)
    try:
        report = check(
            generator, read_folder(folder), folder, prompts, max_tokens=4, bound=BOUNDS[dtype]
        )
    finally:
        generator.close()
    assert report.visible_change > BOUNDS[dtype]


@pytest.mark.e2e
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_whole_pipeline_runs_on_a_gpu(tmp_path, dtype):
    out = tmp_path / "run"
    settings = (f"model.dtype={dtype}", f"parity.max_logprob_diff={BOUNDS[dtype]}")
    arguments = [text for setting in settings for text in ("--set", setting)]
    subprocess.run(
        [
            Path(sys.executable).with_name("rl-ft"),
            "run",
            "--recipe",
            "smoke",
            "--out",
            out,
            *arguments,
        ],
        check=True,
    )
    steps = [line["step"] for line in read_metrics(out, "grpo/max_pressure")]
    assert steps == [1, 2]
    assert (out / "report.html").is_file()

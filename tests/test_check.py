"""Checks in the closed loop: which version is the best, when it is enough, what a resume knows."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from envs.answers import answer_text
from envs.controllers import CONTROLLERS
from envs.errors import WorldError
from envs.types import Action
from rl_ft.check import Check, Checks, read_checks, read_left
from rl_ft.monitor import MetricLog, read_metrics, write_summary
from rl_ft.recipe import load_config
from rl_ft.run_folder import RunFolder
from rl_ft.types import Completion

START, STAGE = "lookahead", "check/lookahead"
SETTINGS = (
    "check.every_steps=10",
    'scenarios.train=["generated:2"]',
    'check.scenarios=["generated:1","generated:6"]',
    "check.episode_s=200",
    "check.num_worlds=2",
)


def check(delay_s: float, gridlocks: int = 0, invalid_share: float = 0.0) -> Check:
    return Check(
        delay_s=delay_s, gridlocks=gridlocks, scenario_delay_s={}, invalid_share=invalid_share
    )


@pytest.mark.parametrize(
    ("one", "other", "better"),
    [
        (check(14.0), check(15.0), True),
        (check(14.95), check(15.0), False),
        (check(15.0), check(14.0), False),
        (check(90.0), check(12.0, gridlocks=1), True),
        (check(12.0, gridlocks=1), check(90.0), False),
        (check(80.0, gridlocks=1), check(90.0, gridlocks=1), True),
    ],
)
def test_a_gridlock_is_worse_than_any_delay(one, other, better):
    assert one.beats(other, by_s=0.1) is better


def test_a_policy_for_which_max_pressure_drove_is_no_better_than_one_that_drives_itself():
    silent, driving = check(10.7, invalid_share=1.0), check(29.1)
    assert driving.beats(silent, by_s=1.0)
    assert not silent.beats(driving, by_s=1.0)
    assert str(silent) == "10.7 s, 100% invalid"


class Driver:
    """A sampler whose versions drive like controllers: the later in `likes`, the newer."""

    def __init__(self, **likes: str) -> None:
        self.likes = {int(version[1:]): name for version, name in likes.items()}
        self.loaded = 0
        self.num_asked = 0

    def __call__(self, decisions):
        self.num_asked += 1
        drive = CONTROLLERS[self.likes[self.loaded]]
        return [
            Completion(
                token_ids=(1,),
                logprobs=(0.0,),
                text=answer_text(d, Action(phase=drive(d).phase)),
                finish_reason="stop",
                weights_version=self.loaded,
            )
            for d in decisions
        ]


class Stage:
    """What the loop does with checks, on a folder that may be resumed."""

    def __init__(self, root, driver: Driver, *overrides: str) -> None:
        config = load_config("smoke", [*SETTINGS, *overrides])
        self.root, self.driver = root, driver
        self.record = MetricLog(root)
        folder = RunFolder(root=root, config=config)
        self.checks = Checks(config, folder, START, driver, self.record)

    def go(self, *versions: int, resumable_from: Sequence[int] = ()) -> Stage:
        for version in versions:
            self.driver.loaded = version
            if self.checks.is_due(version):
                asyncio.run(
                    self.checks.look(
                        version, lambda: weights(self.driver.loaded), resumable_from=resumable_from
                    )
                )
        return self

    def kept(self) -> list[int]:
        folder = self.root / "grpo" / START / "best"
        return sorted(int(file.stem) for file in folder.glob("*.safetensors"))

    def lines(self) -> dict[int, dict[str, float]]:
        return {line["step"]: line["values"] for line in read_metrics(self.root, STAGE)}


def weights(version: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((2,), float(version))}


def test_versions_between_two_checks_are_not_checked(tmp_path):
    stage = Stage(tmp_path, Driver(v0="random", v10="max_wave")).go(0, 1, 9, 10, 11)
    assert list(stage.lines()) == [0, 10]


def test_without_checks_nothing_is_asked(tmp_path):
    stage = Stage(tmp_path, Driver(), "check.every_steps=0").go(0, 10)
    assert stage.driver.num_asked == 0
    assert stage.checks.best is None
    assert not stage.checks.on_plateau


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Stage:
    """Bad, good, bad again; nothing to resume from."""
    root = tmp_path_factory.mktemp("stage")
    driver = Driver(v0="random", v10="max_pressure", v20="random")
    return Stage(root, driver, "check.patience=1").go(0, 10, 20)


def test_a_check_is_recorded_with_its_scenarios_and_the_reference(stage):
    values = stage.lines()[20]
    each = [values[f"check/delay_s/generated:{seed}"] for seed in (1, 6)]
    assert values["check/delay_s"] == pytest.approx(sum(each) / 2)
    assert values["check/gridlocks"] == 0
    assert values["time/check_s"] > 0
    assert values["check/max_pressure_delay_s"] < values["check/delay_s"]


def test_driving_like_max_pressure_is_as_good_as_max_pressure(stage):
    values = stage.lines()[10]
    assert values["check/delay_s"] == values["check/max_pressure_delay_s"]


def test_the_best_version_is_the_one_with_the_least_delay(stage):
    assert stage.checks.best == 10
    assert "at step 20" in stage.checks.latest


def test_a_check_without_improvement_is_a_plateau_of_one(stage):
    assert stage.checks.on_plateau


def test_what_can_be_the_best_after_a_resume_is_kept(stage):
    assert stage.kept() == [0, 10]


def test_what_no_resume_can_need_is_forgotten(tmp_path):
    driver = Driver(v0="random", v10="max_wave", v20="max_pressure")
    stage = Stage(tmp_path, driver, "check.min_improvement_s=0").go(0, 10, 20, resumable_from=[20])
    assert stage.kept() == [0, 20]


def test_the_same_version_is_checked_to_the_same_figures(tmp_path):
    driver = Driver(v0="max_wave", v10="max_wave")
    first, second = Stage(tmp_path, driver).go(0, 10).lines().values()
    drop = {"time/check_s"}
    assert {k: first[k] for k in first.keys() - drop} == {
        k: second[k] for k in second.keys() - drop
    }


def test_equally_good_is_no_improvement(tmp_path):
    driver = Driver(v0="max_wave", v10="max_wave", v20="max_wave")
    stage = Stage(tmp_path, driver, "check.patience=2").go(0, 10)
    assert (stage.checks.best, stage.checks.on_plateau) == (0, False)
    stage.go(20)
    assert (stage.checks.best, stage.checks.on_plateau) == (0, True)


def test_decisions_that_the_fallback_made_are_counted(tmp_path):
    class Silent(Driver):
        """Every second time it says nothing."""

        def __call__(self, decisions):
            given = super().__call__(decisions)
            return [replace(answer, text="") for answer in given] if self.num_asked % 2 else given

    stage = Stage(tmp_path, Silent(v0="max_wave"), 'check.scenarios=["generated:1"]').go(0)
    share = stage.lines()[0]["check/invalid_share"]
    assert 0.2 < share < 0.8
    assert read_checks(tmp_path, START)[0].invalid_share == share
    assert stage.lines()[0]["check/max_pressure_invalid_share"] == 0


def test_what_is_left_is_read_back(stage):
    choice(stage, "max_pressure")
    assert read_left(stage.root, START).delay_s == stage.lines()[10]["check/delay_s"]
    choice(stage, "random")
    assert read_left(stage.root, START) == read_checks(stage.root, START)[10]


@pytest.mark.parametrize(("left", "delay_s"), [("mean", 20.0), ("step 10", 12.0), ("step 0", 20.0)])
def test_a_start_that_was_left_says_nothing_of_the_training(tmp_path, left, delay_s):
    found = {
        f"{which}_{figure}": value
        for which, delay in (("mean", 20.0), ("best", 12.0))
        for figure, value in (("delay_s", delay), ("gridlocks", 0), ("invalid_share", 0.0))
    }
    write_summary(tmp_path, STAGE, {"left": left, **found})
    assert read_left(tmp_path, START, but_the_start=True).delay_s == delay_s
    assert read_left(tmp_path, START).delay_s == (20.0 if left == "mean" else 12.0)


# ---- resume


def resumed(stage: Stage, at: int, tmp_path) -> Stage:
    """The same folder in another process, from the checkpoint of step `at`."""
    root = tmp_path / "resumed"
    shutil.copytree(stage.root, root)
    other = Stage(root, Driver(v20="max_pressure"), "check.patience=1")
    other.checks.rewind(at)
    return other


def test_a_resumed_run_knows_what_was_checked(stage, tmp_path):
    again = resumed(stage, 20, tmp_path).go(20)
    assert again.driver.num_asked == 0
    assert again.checks.best == 10
    assert again.checks.on_plateau
    assert again.checks.latest == stage.checks.latest


def test_checks_beyond_the_checkpoint_are_forgotten(stage, tmp_path):
    again = resumed(stage, 9, tmp_path)
    assert list(again.lines()) == [0]
    assert again.checks.best == 0
    assert again.kept() == [0]


def test_a_check_beyond_the_checkpoint_is_made_anew(stage, tmp_path):
    again = resumed(stage, 19, tmp_path).go(20)
    assert again.driver.num_asked > 0
    assert again.lines()[20]["check/delay_s"] != stage.lines()[20]["check/delay_s"]


# ---- what is left


def choice(stage: Stage, like: str, averaged=(15, 20)):
    stage.driver.likes[99], stage.driver.loaded = like, 99
    return asyncio.run(stage.checks.choose(averaged))


def test_the_best_version_is_left_where_the_mean_is_worse(stage):
    assert torch.equal(choice(stage, "random")["w"], weights(10)["w"])
    summary = json.loads((stage.root / "metrics.json").read_text())[STAGE]
    assert summary["left"] == "step 10"
    assert summary["best_delay_s"] < summary["mean_delay_s"]


def test_the_mean_is_left_where_it_is_as_good(stage):
    assert choice(stage, "max_pressure") is None
    summary = json.loads((stage.root / "metrics.json").read_text())[STAGE]
    assert summary["left"] == "mean"
    assert summary["averaged"] == [15, 20]


def test_the_mean_of_one_version_is_that_version(stage):
    num_asked = stage.driver.num_asked
    assert choice(stage, "random", averaged=(20,)) is not None
    assert stage.driver.num_asked == num_asked


# ---- when something goes wrong


def test_a_world_that_dies_costs_its_check_a_second_try(tmp_path):
    class Unlucky(Driver):
        def __call__(self, decisions):
            if self.num_asked == 2:
                self.num_asked += 1
                raise WorldError("died", "on the way")
            return super().__call__(decisions)

    lucky = Stage(tmp_path / "a", Driver(v0="max_wave")).go(0).lines()[0]
    unlucky = Stage(tmp_path / "b", Unlucky(v0="max_wave")).go(0).lines()[0]
    assert unlucky["check/delay_s"] == lucky["check/delay_s"]


def test_an_interrupted_loop_does_not_wait_for_its_check(tmp_path):
    stage = Stage(tmp_path, Driver(v0="max_wave"), "check.episode_s=3600", "check.seeds=9")

    async def interrupted() -> None:
        task = asyncio.create_task(stage.checks.look(0, lambda: weights(0), resumable_from=()))
        await asyncio.sleep(0.5)
        task.cancel()
        await task

    started = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert time.monotonic() - started < 15
    assert stage.lines() == {}

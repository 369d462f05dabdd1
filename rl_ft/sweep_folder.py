"""A sweep on disk: what was asked for, its trials, and what several of them have in common.

    sweep.yaml       recipe, seed, space and every trial's settings, drawn once
    recipe.yaml      the recipe as it was then, with the overrides
    shared/NAME/     run folders of stages that several trials share
    trials/NNN/      one ordinary run folder per trial
    results.json, sweep.png, run.log, promoted/RECIPE/

Runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from envs.errors import UserError
from rl_ft.config import Config
from rl_ft.prepare import require_model
from rl_ft.recipe import flatten, load_config, read_config
from rl_ft.run_folder import STAGE_SECTIONS, take_lock, write_atomically
from rl_ft.space import Point, read_space

SWEEP_FILE = "sweep.yaml"
RECIPE_FILE = "recipe.yaml"

SHARED = ("prepare", "sft")
"""Stages that trials can share."""

IRRELEVANT = {
    "sft": (
        "scenarios.held_out",
        "reward.traffic",
        "reward.scale_veh_s",
        "reward.max_regret_veh_s",
        "reward.format_strict",
        "reward.format_partial",
        "reward.format_invalid",
    )
}
"""What of their sections does not decide what they make after all: what an answer earns is looked
at by GRPO alone."""
IRRELEVANT["prepare"] = (*IRRELEVANT["sft"], "model.lora", "model.dtype", "model.max_prompt_length")

CHECKS_PER_TRIAL = 4
"""For a recipe without checks: no trial can be compared or stopped without any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One run of the sweep.

    Example:
        Trial(number=3, settings={"grpo.learning_rate": 0.001374}, config=config,
              shared={"prepare": "prepare-1", "sft": "sft-1"})
    """

    number: int
    settings: Point
    config: Config
    shared: Mapping[str, str]
    """Stages that it takes from a folder in `shared/`; it makes the others itself."""

    @property
    def name(self) -> str:
        """Its folder in `trials/`."""
        return f"{self.number:03}"

    @property
    def start(self) -> str:
        """The one supervised start that it reinforces."""
        return self.config.prepare.teachers[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepFolder:
    """The folder of a sweep that was planned; see `plan` and `open`."""

    root: Path
    trials: tuple[Trial, ...]
    early_stop: bool
    """Whether trials that are behind are stopped."""

    @classmethod
    def plan(
        cls,
        path: Path,
        *,
        space_file: Path,
        recipe: str,
        overrides: Sequence[str],
        num_samples: int,
        seed: int | None,
        early_stop: bool,
    ) -> SweepFolder:
        """A new sweep; every trial's configuration is built before anything is written.

        Raises:
            UserError: space, recipe or one of the points does not make a run.
        """
        if path.exists() and not path.is_dir():
            raise UserError(f"--out {path} is a file; expected a folder or a new name")
        if path.is_dir() and any(f.name != ".lock" for f in path.iterdir()):
            raise UserError(
                f"--out {path} is not empty; pass --resume alone to go on with a sweep that was "
                "started there, or give another --out"
            )
        common = [*overrides, *([] if seed is None else [f"seed={seed}"])]
        common += _checks(load_config(recipe, common))
        base = load_config(recipe, common)
        points = read_space(space_file).points(num_samples, base.seed)
        configs = [_config(recipe, common, point, space_file) for point in points]
        content = {
            "recipe": recipe,
            "overrides": list(overrides),
            "seed": base.seed,
            "samples": num_samples,
            "early_stop": early_stop,
            "space": yaml.safe_load(space_file.read_text(encoding="utf-8")),
            "trials": points,
        }
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / RECIPE_FILE, _dump(base.model_dump(mode="json")))
        write_atomically(path / SWEEP_FILE, _dump(content))
        return cls(root=path.absolute(), trials=_trials(points, configs), early_stop=early_stop)

    @classmethod
    def open(cls, path: Path) -> SweepFolder:
        """The sweep that was started in a folder."""
        if not (path / SWEEP_FILE).is_file():
            raise UserError(
                f"expected a sweep in {path} to go on with, found no {SWEEP_FILE}; start one with "
                "`rl-ft sweep --space FILE` without --resume"
            )
        asked = yaml.safe_load((path / SWEEP_FILE).read_text(encoding="utf-8"))
        points = asked["trials"]
        configs = [load_config(str(path / RECIPE_FILE), as_overrides(p)) for p in points]
        return cls(
            root=path.absolute(), trials=_trials(points, configs), early_stop=asked["early_stop"]
        )

    @property
    def base(self) -> Config:
        """The recipe, without any trial's settings."""
        return read_config(self.root / RECIPE_FILE)

    @property
    def swept_keys(self) -> tuple[str, ...]:
        """Keys that are not the same in all trials, in the order of the space."""
        keys = self.trials[0].settings
        first = self.trials[0]
        return tuple(
            key for key in keys if any(t.settings[key] != first.settings[key] for t in self.trials)
        )

    def lock(self) -> IO[str]:
        """One process at a time sweeps in a folder."""
        return take_lock(self.root, self.root)

    def trial_path(self, trial: Trial) -> Path:
        """The trial's run folder, there or not."""
        return self.root / "trials" / trial.name

    def shared_path(self, name: str) -> Path:
        """The run folder of a shared stage, there or not."""
        return self.root / "shared" / name


def as_overrides(point: Mapping[str, Any]) -> list[str]:
    """A trial's settings as `--set` would have them."""
    return [f"{key}={json.dumps(value)}" for key, value in point.items()]


def shared_stages(configs: Sequence[Config]) -> list[dict[str, str]]:
    """For each configuration the stages that it has in common with another, by name of what is
    made: `prepare-2` is what the second group of alike ones shares."""
    shared: list[dict[str, str]] = [{} for _ in configs]
    for stage in SHARED:
        alike: dict[str, list[int]] = {}
        for index, config in enumerate(configs):
            alike.setdefault(_fingerprint(config, stage), []).append(index)
        groups = [group for group in alike.values() if len(group) > 1]
        for number, group in enumerate(groups, start=1):
            for index in group:
                shared[index][stage] = f"{stage}-{number}"
    return shared


def _trials(points: Sequence[Point], configs: Sequence[Config]) -> tuple[Trial, ...]:
    return tuple(
        Trial(number=number, settings=point, config=config, shared=shared)
        for number, (point, config, shared) in enumerate(
            zip(points, configs, shared_stages(configs), strict=True), start=1
        )
    )


def _fingerprint(config: Config, stage: str) -> str:
    leaves = flatten(config.model_dump(mode="json", include=set(STAGE_SECTIONS[stage])))
    decisive = {
        key: value
        for key, value in leaves.items()
        if not any(key == name or key.startswith(f"{name}.") for name in IRRELEVANT[stage])
    }
    return json.dumps(decisive, sort_keys=True)


def _checks(config: Config) -> list[str]:
    """Overrides that make up for a recipe without checks."""
    every = max(1, config.grpo.max_steps // CHECKS_PER_TRIAL)
    return [] if config.check.every_steps else [f"check.every_steps={every}"]


def _config(recipe: str, common: Sequence[str], point: Point, space_file: Path) -> Config:
    """A trial's configuration; what is wrong is said of the space, not of options."""
    try:
        config = load_config(recipe, [*common, *as_overrides(point)])
        require_model(config)
    except UserError as error:
        text = str(error).replace("--set ", f"{space_file}: ", 1)
        where = "" if str(space_file) in text else f"{space_file}: with {json.dumps(point)} "
        raise UserError(f"{where}{text}") from error
    if len(config.prepare.teachers) != 1:
        raise UserError(
            f"prepare.teachers is {list(config.prepare.teachers)}; a trial reinforces one start: "
            "--set prepare.teachers=[max_pressure], or try both: "
            "prepare.teachers: {choice: [[max_pressure], [lookahead]]}"
        )
    if config.monitor.mirror is not None:
        raise UserError(
            f"monitor.mirror is {config.monitor.mirror}: a copy is of one run, a sweep has many; "
            "leave it out, and copy the sweep's folder"
        )
    return config


def _dump(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

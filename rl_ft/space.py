"""What a sweep tries: a YAML file of dotted configuration keys, and the points drawn from it.

    grpo.learning_rate: {loguniform: [0.0005, 0.005]}
    grpo.num_generations: {choice: [4, 8]}
    reward.horizon_s: {grid: [30, 60]}
    sft.num_train_epochs: 2        # the same in every trial

Pure: the same file, number and seed give the same points, and a larger number only adds to them.
Whether a point makes a run is checked when its configuration is built.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from envs.errors import UserError

RANGES = ("uniform", "loguniform", "randint")
LISTS = ("choice", "grid")

METRIC_KEYS = ("check.every_steps", "check.scenarios", "check.seeds", "check.episode_s", "evaluate")
"""Keys and sections that decide how a trial is judged: the same for all, or nothing compares."""
RUN_KEYS = ("recipe", "ray")

Point = dict[str, Any]
"""Values by dotted key."""

_DIGITS = 4
"""A drawn number says no more: 0.001374, not 0.0013740983151."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimension:
    """One key that is tried with several values.

    Example:
        Dimension(key="grpo.learning_rate", kind="loguniform", values=(0.0005, 0.005))
    """

    key: str
    kind: str
    values: tuple[Any, ...]
    """The two ends of a range, both included, or everything there is to choose from."""

    def draw(self, rng: random.Random) -> Any:
        """One value; of a grid there is nothing to draw."""
        if self.kind == "choice":
            return rng.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return rng.randint(low, high)
        if self.kind == "uniform":
            return _short(rng.uniform(low, high))
        return _short(math.exp(rng.uniform(math.log(low), math.log(high))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Dimensions, and keys with one value for all trials."""

    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Any]

    def points(self, num_samples: int, seed: int) -> list[Point]:
        """So many draws of the random keys, each at every point of the grid; none twice.

        Fixed keys are in every point. A key's draws do not depend on which other keys there are.
        """
        drawn = [d for d in self.dimensions if d.kind != "grid"]
        grids = [d for d in self.dimensions if d.kind == "grid"]
        found: dict[str, Point] = {}
        for number in range(num_samples):
            sample = {d.key: d.draw(random.Random(f"{seed}/{d.key}/{number}")) for d in drawn}
            for values in itertools.product(*(grid.values for grid in grids)):
                on_grid = dict(zip((grid.key for grid in grids), values, strict=True))
                point = {d.key: (sample | on_grid)[d.key] for d in self.dimensions}
                found.setdefault(json.dumps(point), dict(self.fixed) | point)
        return list(found.values())


def read_space(file: Path) -> Space:
    """The search space in a YAML file.

    Raises:
        UserError: it is not one; the message names the key and what was expected.
    """
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--space {file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(
            f"{file}: expected keys with what to try, like grpo.learning_rate: "
            f"{{loguniform: [0.0005, 0.005]}}, got {type(tree).__name__}"
        )
    return parse_space(tree, source=str(file))


def parse_space(tree: Mapping[str, Any], *, source: str) -> Space:
    """The search space that was written down; `source` is what messages call it.

    Raises:
        UserError: see `read_space`.
    """
    dimensions, fixed = [], {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _require_free(source, key)
            dimensions.append(_dimension(source, key, value))
        else:
            fixed[key] = value
    if not dimensions:
        raise UserError(
            f"{source}: every key has one value; expected at least one to try several of, like "
            "grpo.learning_rate: {loguniform: [0.0005, 0.005]}"
        )
    return Space(dimensions=tuple(dimensions), fixed=fixed)


def _require_free(source: str, key: str) -> None:
    for held, why in (
        (METRIC_KEYS, "trials are compared by it, so it must be the same in all"),
        (RUN_KEYS, "it says what a run is called or where it works, not how it learns"),
    ):
        if any(key == name or key.startswith(f"{name}.") for name in held):
            raise UserError(f"{source}: {key} cannot be tried with several values: {why}")


def _dimension(source: str, key: str, said: Mapping[Any, Any]) -> Dimension:
    kinds = ", ".join((*RANGES, *LISTS))
    if len(said) != 1 or (kind := str(next(iter(said)))) not in (*RANGES, *LISTS):
        raise UserError(
            f"{source}: {key} should be one value or one of {kinds} with its values, like "
            f"{{choice: [4, 8]}}, got {dict(said)}; keys are dotted, as grpo.learning_rate"
        )
    values = said[kind]
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"{source}: {key}: {kind} wants a list of values, got {values!r}")
    if kind in RANGES:
        _require_range(f"{source}: {key}: {kind}", kind, values)
    return Dimension(key=key, kind=kind, values=tuple(values))


def _require_range(where: str, kind: str, values: Sequence[Any]) -> None:
    numbers = (int,) if kind == "randint" else (int, float)
    what = "two whole numbers" if kind == "randint" else "two numbers"
    if len(values) != 2 or any(type(v) not in numbers or not math.isfinite(v) for v in values):
        hint = "; YAML reads 1e-3 as text, write 0.001 or 1.0e-3" if "e" in str(values) else ""
        raise UserError(f"{where} wants {what}, the lower one first, got {list(values)}{hint}")
    low, high = values
    if low >= high:
        raise UserError(f"{where} wants the lower end first, got {list(values)}")
    if kind == "loguniform" and low <= 0:
        raise UserError(f"{where} wants ends above 0, got {list(values)}")


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")

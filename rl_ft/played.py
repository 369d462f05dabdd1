"""The episodes of an evaluation, a line each as soon as it ends: one that was stopped goes on.

More seeds, scenarios or policies may be asked for when it does; what was played is not played again
as long as the same code, weights, settings and scenario would play it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from envs.errors import UserError
from envs.scenario import load_scenario
from rl_ft.closed_loop import Job
from rl_ft.config import Config
from rl_ft.run_folder import versions

Row = dict[str, Any]

SOURCES = ("envs", "rl_ft")


class Played:
    """Rows by policy, scenario and seed; without a file only as long as this process lives.

    Example:
        played = Played(Path("runs/maps/episodes.jsonl"))
        played.begin("max_pressure", "generated:7", signature(config, None, "generated:7"))
        for job in played.missing("max_pressure", jobs): played.add(row)
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._signatures: dict[tuple[str, str], str] = {}
        self._rows: dict[tuple[str, str, int], Row] = {}
        if file is not None and file.is_file():
            self._read(file)

    def __len__(self) -> int:
        return len(self._rows)

    def begin(self, policy: str, scenario: str, signature: str) -> None:
        """Raises UserError if what the policy played of the scenario was played otherwise."""
        if self._signatures.setdefault((policy, scenario), signature) != signature:
            raise UserError(
                f"{self._file} holds episodes of {policy} on {scenario} with other weights, "
                "settings, files or code; give another --out"
            )

    def missing(self, policy: str, jobs: Iterable[Job]) -> list[Job]:
        """Those of the jobs that the policy has not played."""
        return [job for job in jobs if (policy, job.scenario, job.seed) not in self._rows]

    def chosen(self, policies: Sequence[str], jobs: Sequence[Job]) -> list[Row]:
        """The rows of these policies and jobs, in the order of their names."""
        keys = {(policy, job.scenario, job.seed) for policy in policies for job in jobs}
        return [self._rows[key] for key in sorted(keys & self._rows.keys())]

    def add(self, row: Row) -> None:
        """Keep an episode; in a file, of a policy that has begun its scenario."""
        self._keep(row)
        if self._file is not None:
            signature = self._signatures[row["policy"], row["scenario"]]
            line = json.dumps({"signature": signature, "row": row})
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")

    def _keep(self, row: Row) -> None:
        self._rows[row["policy"], row["scenario"], row["seed"]] = row

    def _read(self, file: Path) -> None:
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # Killed while it wrote: that episode is played again.
            os.truncate(file, len(whole))
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
                row = line["row"]
                self.begin(row["policy"], row["scenario"], line["signature"])
                self._keep(row)
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{file}, line {number} is no episode ({type(error).__name__}: {error}): "
                    "restore it, or give another --out"
                ) from error


def signature(config: Config, model: Path | None, scenario: str) -> str:
    """What decides how a model, or if None a controller, plays a scenario."""
    decides: dict[str, object] = {"lookahead_horizon_s": config.lookahead_horizon_s}
    if model is not None:
        decides = {
            "model": _digest(tuple(sorted(file for file in model.iterdir() if file.is_file()))),
            "seed": config.seed,
            "decision_format": config.decision_format,
            "settings": config.model.model_dump(mode="json", exclude={"tiny", "lora"}),
            "reproducible": config.generation.reproducible,
            "max_completion_length": config.grpo.max_completion_length,
            "fallback": config.evaluate.fallback,
            "num_tellings": config.evaluate.num_tellings,
        }
    said = [_code(), _traffic(scenario), decides]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _code() -> list[object]:
    root = Path(__file__).parent.parent
    files = sorted(file for source in SOURCES for file in (root / source).rglob("*.py"))
    return [versions(), _digest(tuple(files))]


@functools.cache
def _traffic(name: str) -> list[object]:
    scenario = load_scenario(name)
    window = (scenario.begin_s, scenario.end_s, scenario.step_length_s)
    said: list[object] = [name, *window, scenario.options]
    if scenario.kind == "generated":
        # Its files say when they were made; its name and the code make them.
        return said
    files = (scenario.net_file, *scenario.route_files, *scenario.additional_files)
    return [*said, _digest(tuple(map(Path, files)))]


@functools.cache
def _digest(files: tuple[Path, ...]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
